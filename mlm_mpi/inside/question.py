"""What a model is asked of a text: the next token, a hidden one, or its label."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlm_mpi.data.batch import Batch
from mlm_mpi.data.dictionary import translated
from mlm_mpi.data.labelled import Example
from mlm_mpi.data.texts import batch_of
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.data.translation import pair_of
from mlm_mpi.errors import ConfigError, DataError, nearest

MOST = 256  # tokens of a text: their maps of 12 layers of 12 heads are 9 MiB
_LISTED = 40  # tokens in a message


@dataclass(frozen=True)
class Question:
    """A text as the model reads it, and what it is asked.

    `source` (S,): likewise of a text that another is made of, which the model writes; [] where there is none.
    `tokens` (T,): what is shown of the positions that are the text's; a batch may be filled up behind them. `at`: the
    position whose output is asked for; None: there is one of the whole text. `target`: the output whose score is
    explained; None: the likeliest. `came`: for each output the one that was to come, −1 where nobody knows it.
    """

    batch: Batch
    tokens: list[str]
    at: int | None
    target: int | None
    came: np.ndarray
    name: Callable[[int], str]  # of an output
    says: str
    source: list[str] = field(default_factory=list)

    @property
    def explained(self) -> list[str]:
        """The tokens that attributions are of."""
        return self.source or self.tokens


def next_token(tokenizer: Tokenizer, text: str, context: int, at: int | None, target: str | None) -> Question:
    """Of a model that continues texts: which token follows the text, or, with `at`, comes as the at-th of it.

    Raises DataError for a text that is empty or too long, ConfigError for an `at` or a `target` that is none.
    """
    found = _encoded(tokenizer, text, context, 1)
    ids = np.array([[tokenizer.eot, *found]], np.int32)
    _check_at(at, tokenizer, found)
    came = np.append(ids[0, 1:], -1)
    place = len(found) if at is None else at - 1
    wanted = int(came[place]) if target is None else _token(tokenizer, target)
    says = "which token follows the text" if at is None else f"which token comes as number {at}"
    return Question(
        Batch(0, 0, {"ids": ids}, {}, 0), _shown(tokenizer, ids[0]), place, None if wanted < 0 else wanted, came,
        lambda number: shown(tokenizer, number), says,
    )  # fmt: skip


def hidden_token(tokenizer: Tokenizer, text: str, context: int, at: int | None, target: str | None) -> Question:
    """Of a model that sees both ways: which token is the at-th of the text, hidden. Raises as `next_token`."""
    found = _encoded(tokenizer, text, context, 2)
    if at is None:
        raise ConfigError(
            f"this model is asked for a hidden token: give its number by --at, {_listed(tokenizer, found)}"
        )
    _check_at(at, tokenizer, found)
    ids = np.array([[tokenizer.eot, *found, tokenizer.eot]], np.int32)
    hidden = np.zeros(ids.shape, bool)
    hidden[0, at] = True
    tokens = _shown(tokenizer, ids[0])
    wanted = int(ids[0, at]) if target is None else _token(tokenizer, target)
    tokens[at] = f"[{tokens[at]}]"
    batch = Batch(0, 0, {"ids": ids, "hidden": hidden}, {}, 0)
    says = f"which token is number {at}, hidden from it"
    return Question(batch, tokens, at, wanted, ids[0].copy(), lambda number: shown(tokenizer, number), says)


def label_of(
    tokenizer: Tokenizer, text: str, second: str | None, context: int, labels: Sequence[str], target: str | None
) -> Question:  # fmt: skip
    """Of a classifier: the label of a text, or of a pair. Raises as `next_token`."""
    first = _encoded(tokenizer, text, context, 2)
    other = [] if second is None else _encoded(tokenizer, second, context, 3)
    over = len(first) + len(other) + (3 if other else 2) - min(context, MOST)
    if over > 0:
        raise DataError(f"the two texts have {over} tokens more than there is room for: shorten them")
    if target is not None and target not in labels:
        raise ConfigError(f"--target {target!r} is no label of this model{nearest(target, labels)}")
    example = Example(np.array([*first, *other], np.int32), len(first) if other else 0, 0)
    batch = batch_of([example], context, tokenizer.eot, second is not None)
    tokens = _shown(tokenizer, batch.inputs["ids"][0, : batch.texts[0]])
    wanted = None if target is None else labels.index(target)
    says = "which label the text has" if second is None else "which label the two texts have"
    return Question(batch, tokens, None, wanted, np.array([-1 if wanted is None else wanted]), labels.__getitem__, says)


def source_of(tokenizer: Tokenizer, text: str, context: int, hints: Mapping[str, str] | None = None) -> np.ndarray:
    """What an encoder reads of a text to translate, with an end of text: (S,) int32. Raises as `next_token`.

    `hints`: the dictionary by which it has a hint in front; without it it has none.
    """
    ids = np.array([*_encoded(tokenizer, text, context, 1), tokenizer.eot], np.int32)
    if not hints:
        return ids
    hint = tokenizer.encode(translated(text, hints))
    over = len(hint) + 1 + len(ids) - room(context)
    if over > 0:
        raise DataError(f"the text and its hint have {over} tokens more than there is room for: shorten it")
    return np.concatenate([np.array([*hint, tokenizer.eot], np.int32), ids])


def room(context: int) -> int:
    """At most so many tokens of a text are explained."""
    return min(context, MOST)


def written_token(
    tokenizer: Tokenizer, source: np.ndarray, written: str | Sequence[int], context: int, at: int | None,
    target: str | None,
) -> Question:  # fmt: skip
    """Of a model that translates: why the at-th token of what it has made of a source (by default the first) comes,
    the end of text among them. `written`: that, or another text that is given. Raises as `next_token`."""
    ids = _encoded(tokenizer, written, context, 1) if isinstance(written, str) else written
    example = Example(np.array([*source[:-1], *ids], np.int32), len(source) - 1, 0)
    pair = pair_of(example, room(context), tokenizer.eot)
    at = 1 if at is None else at
    _check_at(at, tokenizer, pair.wanted.tolist(), "translation")
    wanted = int(pair.wanted[at - 1]) if target is None else _token(tokenizer, target)
    batch = Batch(0, 0, {"ids": pair.read[None]}, {}, 0, source=Batch(0, 0, {"ids": pair.source[None]}, {}, 0))
    return Question(
        batch, _shown(tokenizer, pair.read), at - 1, wanted, pair.wanted, lambda number: shown(tokenizer, number),
        f"which token comes as number {at} of the translation", _shown(tokenizer, pair.source),
    )  # fmt: skip


def shown(tokenizer: Tokenizer, number: int) -> str:
    """A token for people: bytes that are no text as \\x.., an end of text as its sign."""
    if tokenizer.is_byte_level:
        raw = tokenizer.token_bytes(number)
        text = raw.decode(errors="backslashreplace")
    else:
        text = tokenizer.token_text(number)
    return text or ("■" if number == tokenizer.eot else f"#{number}")


def _shown(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    return [shown(tokenizer, int(number)) for number in ids]


def _encoded(tokenizer: Tokenizer, text: str, context: int, ends: int) -> list[int]:
    """Ids of a text that fits, with so many ends of text around it."""
    ids, room = tokenizer.encode(text), min(context, MOST) - ends
    if not ids:
        raise DataError("the text is empty: give some words")
    if len(ids) > room:
        why = f"model.context = {context}" if context <= MOST else f"{MOST} tokens on a page"
        raise DataError(f"the text has {len(ids):,} tokens, there is room for {max(0, room)} ({why}): shorten it")
    return ids


def _check_at(at: int | None, tokenizer: Tokenizer, ids: Sequence[int], of: str = "text") -> None:
    if at is not None and not 1 <= at <= len(ids):
        raise ConfigError(f"--at {at} is no token of the {of}, which has {len(ids)}: {_listed(tokenizer, ids)}")


def _listed(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    names = [f"{number} {shown(tokenizer, one)!r}" for number, one in enumerate(ids[:_LISTED], 1)]
    return ", ".join(names) + (", …" if len(ids) > _LISTED else "")


def _token(tokenizer: Tokenizer, text: str) -> int:
    """The one token that a text is."""
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        remedy = f"one of {', '.join(repr(shown(tokenizer, one)) for one in ids)}" if ids else "one"
        raise ConfigError(f"--target {text!r} is {len(ids)} tokens of this model: give {remedy}")
    return ids[0]
