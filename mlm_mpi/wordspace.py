"""Words as directions: which lie near each other, and whether what one pair of words has in common another has too."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlm_mpi.errors import ConfigError, DataError, nearest
from mlm_mpi.files import read_whole

_FILE_BYTES = 64 << 20
_QUESTIONS_AT_ONCE = 256  # of a million words their cosines take 1 GB
_GUESSED = 50_000  # words among which one that is like an unknown one is looked for


@dataclass
class Score:
    """Analogies of a section: how many were asked, how many of them answered rightly, how many had unknown words."""

    name: str
    asked: int = 0
    right: int = 0
    unknown: int = 0


class WordSpace:
    """Words and their vectors, of length one. A vector of zeros is near nothing."""

    def __init__(self, words: Sequence[str], rows: np.ndarray) -> None:
        """Shapes: (N, C), finite."""
        self.words = words
        self._places: dict[str, int] = {}
        for place, word in enumerate(words):
            self._places.setdefault(word, place)
        rows = rows.astype(np.float32)
        lengths = np.sqrt(np.einsum("nc,nc->n", rows, rows, dtype=np.float64))[:, None]
        self.rows = (rows / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)

    def place(self, word: str) -> int | None:
        """Where a word stands, as it is or else in small letters."""
        return self._places.get(word, self._places.get(word.lower()))

    def near(self, word: str, count: int) -> list[tuple[str, float]]:
        """The words with the largest cosine to this one, the largest first, without itself. Raises ConfigError."""
        place = self.place(word)
        if place is None:
            hint = nearest(word, self.words[:_GUESSED], every=False)
            raise ConfigError(f"{word!r} is none of the {len(self.words):,} words{hint or ': give another'}")
        cosines = self.rows @ self.rows[place]
        cosines[place] = -np.inf
        count = min(count, len(cosines) - 1)
        best = np.argsort(-cosines, kind="stable")[:count]
        return [(self.words[at], float(cosines[at])) for at in best]

    def answer(self, questions: Iterable["Question"]) -> list[Score]:
        """Scores by section, in their order. Of "a b c d" d is right if no other word but a, b, c has a larger
        cos(x, b) − cos(x, a) + cos(x, c), 3CosAdd of Levy, Goldberg, CoNLL 2014.
        """
        scores: dict[str, Score] = {}
        known: list[tuple[Score, list[int]]] = []
        for question in questions:
            score = scores.setdefault(question.section, Score(question.section))
            places = [self.place(word) for word in question.words]
            if None in places:
                score.unknown += 1
            else:
                known.append((score, [place for place in places if place is not None]))
        for first in range(0, len(known), _QUESTIONS_AT_ONCE):
            some = known[first : first + _QUESTIONS_AT_ONCE]
            a, b, c, d = np.array([places for _, places in some]).T
            cosines = (self.rows[b] - self.rows[a] + self.rows[c]) @ self.rows.T  # (Q, N)
            for given in (a, b, c):
                cosines[np.arange(len(some)), given] = -np.inf
            for (score, _), is_right in zip(some, cosines.argmax(axis=1) == d, strict=True):
                score.asked += 1
                score.right += int(is_right)
        return list(scores.values())


@dataclass(frozen=True)
class Question:
    """a is to b as c is to d."""

    section: str
    words: tuple[str, str, str, str]


def questions(path: Path) -> Iterator[Question]:
    """Those of a file in the format of word2vec's questions-words.txt: `: section`, then lines of four words.

    Raises DataError.
    """
    try:
        lines = read_whole(path, _FILE_BYTES).decode().splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}: give a file such as questions-words.txt") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: convert it (iconv -t UTF-8)") from None
    section = "all"
    for number, line in enumerate(lines, 1):
        words = line.split()
        if words[:1] == [":"] and len(words) > 1:
            section = " ".join(words[1:])
        elif len(words) == 4:
            a, b, c, d = words
            yield Question(section, (a, b, c, d))
        elif words:
            raise DataError(
                f"{path}:{number} has {len(words)} words, not four, nor is it a section (: name): mend it, or leave it "
                "out"
            )
