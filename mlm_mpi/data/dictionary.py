"""A dictionary from pairs of texts: the likeliest word for each word by IBM model 1 (Brown et al., Computational
Linguistics 19, 1993, section 4.1), and translating word by word with it, for a baseline or as a hint.

A hint stands in front of a source, an end of text between them, so that a model finds words of the target's language
to copy and to mend (Arthur et al., arXiv:1606.02006, gave a dictionary's words to the output instead).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.data.tokenizing import encode

_WORD = re.compile(r"\w+")
_ROUNDS = 5  # of expectation maximisation
BYTES_A_MEETING = 75  # at most at once: 16.5 million took 1.25 GB
_NOTHING = ""  # what target words come from that no source word explains


def learned(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Each word of the sources, in small letters, and the word of the targets that it becomes most often; of equal
    ones that which is seen first."""
    return Lexicon(pairs).without()


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def meetings(pairs: Iterable[tuple[str, str]]) -> int:
    """How often a word of a source meets one of its target: each takes a lexicon BYTES_A_MEETING."""
    return sum((1 + len(_WORD.findall(source))) * len(_WORD.findall(target)) for source, target in pairs)


class Lexicon:
    """Which words of targets come from which words of sources, in each pair."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        """(source, target) each. Time and memory go with `meetings`."""
        sides = [[_words(text) for text in pair] for pair in pairs]
        self._sources = [*dict.fromkeys([_NOTHING, *(word for source, _ in sides for word in source)])]
        self._targets = [*dict.fromkeys(word for _, target in sides for word in target)]
        numbers = [{word: number for number, word in enumerate(words)} for words in (self._sources, self._targets)]
        codes = [
            (
                np.array([numbers[0][word] for word in (_NOTHING, *source)]),
                np.array([numbers[1][word] for word in target]),
            )
            for source, target in sides
            if target
        ]
        some = np.array([number for number, (_, target) in enumerate(sides) if target], np.int64)
        self._meet(codes, some)

    def _meet(self, codes: Sequence[tuple[np.ndarray, np.ndarray]], numbers: np.ndarray) -> None:
        """All words that meet in a pair, and how likely it is in each place that the one became the other.

        Shapes: (s,), (t,) of each pair, (pairs,).
        """
        nothing = [np.zeros(0, np.int64)]
        sources = np.concatenate(nothing + [np.tile(source, len(target)) for source, target in codes])
        targets = np.concatenate(nothing + [np.repeat(target, len(source)) for source, target in codes])
        widths = np.concatenate(nothing + [np.full(len(target), len(source)) for source, target in codes])
        places = np.repeat(np.arange(len(widths)), widths)  # the occurrence of a target's word that is to be explained
        kinds, self._kind = np.unique(sources * len(self._targets) + targets, return_inverse=True)
        self._word, self._became = np.divmod(kinds, max(1, len(self._targets)))
        self._pair = np.repeat(numbers, [len(source) * len(target) for source, target in codes])
        likely = np.ones(len(kinds))
        for _ in range(_ROUNDS):
            self._share = likely[self._kind] / np.bincount(places, likely[self._kind])[places]
            likely = self._likely(np.bincount(self._kind, self._share, len(kinds)))

    def _likely(self, counts: np.ndarray) -> np.ndarray:
        """Of the words that one becomes. Shapes: (kinds,) -> the same; 0 where a word does not come up."""
        return counts / np.maximum(np.bincount(self._word, counts)[self._word], np.finfo("f8").tiny)

    def without(self, pairs: np.ndarray | None = None) -> dict[str, str]:
        """The dictionary, as if these pairs were not there. Shapes: (pairs,) bool; None: of all."""
        kept = slice(None) if pairs is None else ~pairs[self._pair]
        likely = self._likely(np.bincount(self._kind[kept], self._share[kept], len(self._word)))
        best: dict[str, str] = {}
        for row in np.lexsort((self._became, -likely)):
            if likely[row] > 0:
                best.setdefault(self._sources[self._word[row]], self._targets[self._became[row]])
        best.pop(_NOTHING, None)
        return best


def translated(text: str, dictionary: Mapping[str, str]) -> str:
    """Word by word; what stands between words stays, and so do unknown words. A capital at the beginning is kept."""

    def one(found: re.Match[str]) -> str:
        word = found[0]
        became = dictionary.get(word.lower())
        if became is None:
            return word
        return became[:1].upper() + became[1:] if word[0].isupper() else became

    return _WORD.sub(one, text)


def hinted(tokenizer: Tokenizer, texts: Iterable[str], hints: Iterable[str]) -> Iterator[np.ndarray]:
    """Token ids of sources, (s,) each without an end of text; of an empty text none."""
    for hint, ids in zip(encode(tokenizer, hints), encode(tokenizer, texts), strict=True):
        yield np.concatenate([hint, ids[:-1]]) if len(ids) > 1 else ids[:0]


def bare(ids: np.ndarray, eot: int) -> np.ndarray:
    """A source without its hint. Shapes: (s,) -> (t,)."""
    return ids[int((ids == eot).argmax()) + 1 :]
