"""Writing a text that is made of another: beam search with an encoder-decoder, of which greedy search is the narrowest.

The likeliest hypotheses of a length go on together, each extended by every token. One that ends gives its place up
(Sutskever et al., arXiv:1409.3215, section 3.2), so that a beam of one is greedy search. Complete texts are compared by
their log-probability over ((5 + n) / 6)^α, of n tokens with the end of text (Wu et al., arXiv:1609.08144, equation 14).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from mlm_mpi.backend.arrays import Place, cpu, to_host, wide
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.batch import Batch
from mlm_mpi.errors import ConfigError
from mlm_mpi.generation import logits
from mlm_mpi.layers.attention import KeyValueCache
from mlm_mpi.layers.base import Array
from mlm_mpi.layers.chain import Chain
from mlm_mpi.ops import crossentropy

MOST_BEAMS = 256  # the rows of a batch are so many times its sources
_BLOCK = 64  # of the vocabulary: its largest logit is looked at before any other
_MOST_PENALTY = 10.0  # Wu et al. find 0.2 best, and try up to 1


@dataclass(frozen=True)
class Beams:
    """How a text is searched: so many hypotheses at once, and α of their length penalty (0: none). Raises
    ConfigError."""

    width: int = 1
    penalty: float = 0.6

    def __post_init__(self) -> None:
        if not 1 <= self.width <= MOST_BEAMS:
            raise ConfigError(f"--beams {self.width} must be at least 1 and at most {MOST_BEAMS}")
        if not 0 <= self.penalty <= _MOST_PENALTY:
            raise ConfigError(f"--length-penalty {self.penalty} must be in [0, {_MOST_PENALTY:g}] (0: none)")

    def score(self, log_probability: float, tokens: int) -> float:
        """What complete texts are compared by."""
        return log_probability / ((5 + tokens) / 6) ** self.penalty


def written(
    chain: Chain, sources: Sequence[np.ndarray] | np.ndarray, context: int, eot: int, beams: Beams | None = None,
    mesh: Mesh | None = None, place: Place | None = None,
) -> list[list[int]]:  # fmt: skip
    """What an encoder-decoder makes of each source, up to an end of text, which is left out, or to the end of the
    context. By default greedy search.

    Shapes: sources (s,) of any lengths but 0. Collective over the ranks that share the model. No text depends on those
    beside it.
    """
    beams, place, mesh = beams or Beams(), place or cpu(), mesh or Mesh()
    searches = [_Search(beams, context, eot) for _ in sources]
    order = sorted(range(len(sources)), key=lambda number: len(sources[number]))  # of one length: attended together
    growing = [searches[number] for number in order]
    cache, ids = KeyValueCache(context), np.full((len(sources), 1), eot, np.int32)
    source = _read([sources[number] for number in order]).map(place.put) if order else None
    while len(ids):
        found = logits(chain, place.put(ids), cache, mesh, source)
        source = None  # the cache has what was made of it
        tokens, scores = _likeliest(found, len(ids), beams.width, mesh)
        kept, first = list[int](), 0
        for search in growing:
            stop = first + len(search.live)
            kept += [first + row for row in search.extend(tokens[first:stop], scores[first:stop])]
            first = stop
        if kept and kept != list(range(len(ids))):
            cache.take(np.array(kept, np.int64))
        ids = np.array([one.tokens[-1:] for search in growing for one in search.live], np.int32)
    return [search.best() for search in searches]


def _read(sources: Sequence[np.ndarray]) -> Batch:
    """What an encoder reads: texts one behind the other, so that none is padded."""
    ids, places = (
        np.concatenate(some)[None].astype(np.int32) for some in (sources, [np.arange(len(ids)) for ids in sources])
    )
    return Batch(0, 0, {"ids": ids, "places": places}, {}, 0, texts=tuple(accumulate(map(len, sources))))


class _Hypothesis(NamedTuple):
    """The beginning of a text, and its log-probability."""

    tokens: tuple[int, ...]
    score: float


class _Search:
    """The beam of one source: what still grows (`live`, the likeliest first), and what is complete."""

    def __init__(self, beams: Beams, context: int, eot: int) -> None:
        self.beams, self.context, self.eot = beams, context, eot
        self.live = [_Hypothesis((), 0.0)]
        self._complete: list[_Hypothesis] = []

    def extend(self, tokens: np.ndarray, scores: np.ndarray) -> list[int]:
        """Each of `live` by the likeliest tokens that may follow it; which of `live` the new ones go on from.

        Equal hypotheses: the lower token first. Shapes: (live, k) each; a token below 0 is none.
        """
        every = sorted(
            (-(one.score + score), token, number)
            for number, one in enumerate(self.live)
            for token, score in zip(tokens[number].tolist(), scores[number].tolist(), strict=True)
            if token >= 0
        )
        live, parents = list[_Hypothesis](), list[int]()
        for cost, token, number in every[: self.beams.width - len(self._complete)]:
            made = _Hypothesis((*self.live[number].tokens, token), -cost)
            if token == self.eot or len(made.tokens) == self.context:
                self._complete.append(made)
            else:
                live.append(made)
                parents.append(number)
        if self._is_decided(live):
            live, parents = [], []
        self.live = live
        return parents

    def _is_decided(self, live: Sequence[_Hypothesis]) -> bool:
        """Whether nothing that grows can become better than the best: what is added costs, and the longest text has the
        least of its cost counted."""
        if not live or not self._complete:
            return False
        return self.beams.score(live[0].score, self.context) <= max(map(self._score, self._complete))

    def _score(self, one: _Hypothesis) -> float:
        return self.beams.score(one.score, len(one.tokens))

    def best(self) -> list[int]:
        """Of the complete ones, without its end; of equal ones that which was complete first."""
        tokens = [*max(self._complete, key=self._score).tokens]
        return tokens[:-1] if tokens[-1] == self.eot else tokens


def _likeliest(found: Array | None, rows: int, count: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may follow the last position of each row and their log-probabilities, the likeliest first and of
    equal ones the lower, on all ranks that share the model; −1 where there are fewer than `count`.

    Shapes: found (B, T, V / tp) -> (B, count) int32, (B, count) float64. Collective.
    """
    table = np.full((2, rows, count), -1.0)
    if found is not None:
        group = mesh.group("tp")
        mine = np.ascontiguousarray(to_host(wide(found[:, -1])))
        parts = group.allgather_array(mine.reshape(-1), "the logits").reshape(-1, *mine.shape)
        whole = parts.swapaxes(0, 1).reshape(rows, -1)
        tokens, most = _first(whole, count), whole.max(axis=1)
        scores = np.take_along_axis(whole, tokens, axis=1) - most[:, None].astype(np.float64)
        total = np.log(crossentropy.exponentials(whole, most).astype(np.float64))
        table[0, :, : tokens.shape[1]] = tokens
        table[1, :, : tokens.shape[1]] = scores - total[:, None]
        table = group.allgather_array(table.reshape(-1), "the next tokens")[0]  # an exp of other CPUs is another
    table = mesh.group("pp").allgather_array(table.reshape(-1), "the next tokens")[-1]
    tokens, scores = table.reshape(2, rows, count)
    return tokens.astype(np.int32), scores


def _first(rows: np.ndarray, count: int) -> np.ndarray:
    """Where the largest of each row are, the largest first, of equal ones the first, NaN as the smallest.

    Shapes: (B, V) -> (B, min(count, V)).
    """
    count = min(count, rows.shape[1])
    size = min(_BLOCK, rows.shape[1] // count)
    most = np.maximum.reduceat(rows, np.arange(0, rows.shape[1], size), axis=1)
    least = np.partition(most, -count, axis=1)[:, -count, None]  # of those of `count` blocks: so many are not less
    row, column = np.divmod(np.flatnonzero(~(rows < least)), rows.shape[1])  # NaN too
    order = np.lexsort((column, -rows[row, column], row))
    starts = np.searchsorted(row, np.arange(len(rows)))
    return column[order][starts[:, None] + np.arange(count)]
