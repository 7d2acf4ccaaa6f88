"""What is inside a model while it reads a text: attention, the logit lens, integrated gradients. On one rank."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from mlm_mpi.backend.arrays import Place, module_of, to_host, wide
from mlm_mpi.data.batch import Batch
from mlm_mpi.inside.explanation import Attribution, Explanation, Row
from mlm_mpi.inside.question import Question
from mlm_mpi.layers.base import Array, Context, Flow, Map, Part
from mlm_mpi.params.store import Parameter

Score = Literal["logit", "log-probability"]
Baseline = Literal["end", "zero"]

_POINTS = 8  # gradients in a piece of the way
LEAST = 4 * _POINTS
_ENOUGH, _SMALL = 1e-4, 1e-3  # of the larger score, which counts as no smaller than that


class Integration(NamedTuple):
    """How gradients are integrated: what of an output, from which baseline, at how many points at most."""

    score: Score = "logit"
    baseline: Baseline = "end"
    steps: int = 512


class _Unread(dict[Parameter, Array]):
    """Where gradients of weights go, which nobody reads; products are owed and never done."""

    def __missing__(self, parameter: Parameter) -> Array:
        data = parameter.data
        self[parameter] = module_of(data).zeros(data.shape, wide(data[:0]).dtype)
        return self[parameter]


def explain(
    parts: Sequence[Part], question: Question, place: Place, eot: int, integration: Integration, top: int, model: str
) -> Explanation:  # fmt: skip
    """All of it. `parts`: the model and its head, which has `logits` and `logits_backward`. `eot`: ends a text.
    `top`: so many of the likeliest outputs are told.
    """
    ctx = Context(batch=question.batch.map(place.put), gradients=_Unread())
    flows = walk(parts, ctx)
    lens = logit_lens(parts, flows, question, ctx, top)
    attribution = integrated_gradients(parts, question, ctx, eot, integration)
    tokens, at = question.tokens, question.at
    maps = attention_maps(parts, flows, ctx, len(tokens))
    places = ["the text"] if at is None else tokens
    return Explanation(model, question.says, tokens, at, maps, places, lens, attribution, question.source)


def walk(parts: Sequence[Part], ctx: Context) -> list[Flow]:
    """What leaves each part but the head."""
    flows: list[Flow] = []
    for part in parts[:-1]:
        flows.append(part.forward(flows[-1] if flows else (), ctx)[0])
    return flows


def attention_maps(parts: Sequence[Part], flows: Sequence[Flow], ctx: Context, length: int) -> dict[str, Map]:
    """The probabilities of every head, by the name of what attends; (H, T, T) float64, rows look at columns. `length`:
    T, behind which a row of the batch may be filled up; a source's is not.

    Computed again from the queries and keys of the model, since no kernel keeps them.
    """
    found: dict[str, Map] = {}
    for part, flow in zip(parts[1:-1], flows, strict=False):
        for name, one in part.maps(flow, ctx).items() if hasattr(part, "maps") else ():
            rows, columns = (slice(length if side == "batch" else None) for side in (one.rows, one.columns))
            found[name] = one._replace(probabilities=to_host(one.probabilities)[0, :, rows, columns])
    return found


def logit_lens(
    parts: Sequence[Part], flows: Sequence[Flow], question: Question, ctx: Context, top: int
) -> list[Row]:  # fmt: skip
    """What each part's output is through the model's head, as if it were the last; of an encoder, none.

    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020; what it misses: Belrose et al., arXiv:2303.08112.
    """
    head: Any = parts[-1]
    outputs = [flow[0] for flow in flows]
    own = [x for x, before in zip(outputs[1:], outputs, strict=False) if x is not before]  # an encoder lets them pass
    names = ["embedding", *(f"layer {number}" for number in range(1, len(own) + 1))]
    rows = []
    for name, x in zip(names, [outputs[0], *own], strict=True):
        p = _softmax(to_host(wide(head.logits(x, ctx)))[0, : len(question.came)].astype("f8"))
        best = _likeliest(p, top)
        told = [[(question.name(int(i)), float(p[at, i])) for i in some] for at, some in enumerate(best)]
        came = np.where(question.came < 0, np.nan, p[np.arange(len(p)), np.maximum(question.came, 0)])
        rows.append(Row(name, told, came))
    return rows


def _likeliest(p: np.ndarray, top: int) -> np.ndarray:
    """The numbers of the largest of each row, the largest first. Shapes: (P, V) -> (P, top)."""
    best = np.argpartition(-p, min(top, p.shape[1]) - 1, axis=1)[:, :top]
    return np.take_along_axis(best, np.argsort(-np.take_along_axis(p, best, 1), axis=1, kind="stable"), 1)


def integrated_gradients(
    parts: Sequence[Part], question: Question, ctx: Context, eot: int, integration: Integration
) -> Attribution:  # fmt: skip
    """How much each position adds to the score of an output: (x − x') · ∫ ∂F/∂x along the straight path from x' to x.

    x is what the first part gives of the text, or of the source of a translation, all arrays of it; x' what it gives of
    as many ends of text ("end"), so that positions are the same and tokens differ, or nothing ("zero").
    Source: Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", arXiv:1703.01365.
    """
    flow, start = parts[0].forward((), ctx)[0], _baseline(parts[0], ctx, eot, integration.baseline)
    first = 1 if question.source else 0  # what a translation has so far stands in front, and stays as it is
    ways = [wide(x) - wide(x0) for x, x0 in zip(flow[first:], start[first:], strict=True)]
    logits = _logits(parts, flow, question, ctx)
    target = int(logits.argmax()) if question.target is None else question.target
    score = _scorer(target, integration.score)

    def value(point: float) -> float:
        return score(_logits(parts, at(point), question, ctx))[0]

    def rate(point: float) -> np.ndarray:
        gradients = _gradient(parts, at(point), question, ctx, score)[first:]
        each = [to_host((wide(one) * way).sum(axis=2))[0] for one, way in zip(gradients, ways, strict=True)]
        return np.array(each, "f8").sum(axis=0)[: len(question.explained)]

    def at(point: float) -> Flow:
        moved = zip(flow[first:], start[first:], ways, strict=True)
        return (*flow[:first], *((wide(x0) + way * way.dtype.type(point)).astype(x.dtype) for x, x0, way in moved))

    values, asked = along(rate, value, integration.steps)
    began = _logits(parts, (*flow[:first], *start[first:]), question, ctx)
    baseline = "ends of text" if integration.baseline == "end" else "zeros"
    return Attribution(
        question.name(target), float(_softmax(logits[None])[0, target]), integration.score, score(logits)[0], baseline,
        score(began)[0], asked, values,
    )  # fmt: skip


class _Piece(NamedTuple):
    """Of the way: its ends, the values there, what is integrated over it (T,), and how far that is from their gain."""

    ends: tuple[float, float]
    values: tuple[float, float]
    total: np.ndarray
    gap: float


def along(
    rate: Callable[[float], np.ndarray], value: Callable[[float], float], most: int
) -> tuple[np.ndarray, int]:  # fmt: skip
    """(∫ rate over [0, 1], how often it was asked for), where Σ rate is the derivative of value. Shapes: (T,).

    The way goes in pieces, each by eight points of Gauss and Legendre. Each has to account for what the value gains on
    it; the one that is farthest from it is halved, until they all are near enough, or `most` would be exceeded. So a
    normalised activation that turns within a hundredth of the way, as it passes near zero, is not missed.
    """
    points, weights = np.polynomial.legendre.leggauss(_POINTS)

    def piece(ends: tuple[float, float], values: tuple[float, float]) -> _Piece:
        half = (ends[1] - ends[0]) / 2.0
        rates = [rate(ends[0] + half * (1.0 + point)) for point in points]
        total = half * (weights @ np.array(rates))
        return _Piece(ends, values, total, abs(float(total.sum()) - values[1] + values[0]))

    edges = [(edge, value(edge)) for edge in (0.0, 0.25, 0.5, 0.75, 1.0)]
    pieces = [piece((a, b), (before, after)) for (a, before), (b, after) in pairwise(edges)]
    enough = _ENOUGH * max(abs(edges[0][1]), abs(edges[-1][1]), _SMALL)
    while sum(one.gap for one in pieces) > enough and (len(pieces) + 1) * _POINTS <= most:
        worst = pieces.pop(max(range(len(pieces)), key=lambda number: pieces[number].gap))
        (a, b), (before, after) = worst.ends, worst.values
        middle = (a + b) / 2.0
        between = value(middle)
        pieces += [piece((a, middle), (before, between)), piece((middle, b), (between, after))]
    return sum((one.total for one in pieces), np.zeros_like(pieces[0].total)), len(pieces) * _POINTS


def _baseline(first: Part, ctx: Context, eot: int, kind: Baseline) -> Flow:
    """What the path begins at: (1, T, C), of a source (1, S, C) each behind it."""
    assert ctx.batch is not None
    batch, source = ctx.batch, ctx.batch.source
    ends = _ended(batch, eot) if source is None else replace(batch, source=_ended(source, eot))
    start, _ = first.forward((), replace(ctx, batch=ends))
    return start if kind == "end" else tuple(module_of(one).zeros_like(one) for one in start)


def _ended(batch: Batch, eot: int) -> Batch:
    """Of as many ends of text."""
    ids = batch.inputs["ids"]
    return replace(batch, inputs=batch.inputs | {"ids": module_of(ids).zeros_like(ids) + ids.dtype.type(eot)})


def _logits(parts: Sequence[Part], flow: Flow, question: Question, ctx: Context) -> np.ndarray:
    """Those of the output that is asked for, where the first part gives `flow`. Shapes: (1, T, C) each -> (V,)
    float64."""
    for part in parts[1:-1]:
        flow = part.forward(flow, ctx)[0]
    head: Any = parts[-1]
    return to_host(wide(head.logits(_asked(flow[0], question), ctx)))[0, 0].astype("f8")


def _gradient(
    parts: Sequence[Part], flow: Flow, question: Question, ctx: Context, score: "_Scorer"
) -> Flow:  # fmt: skip
    """Those of a score with respect to the arrays that the first part gives, by the model's own backward, without that
    part. Shapes: (1, T, C) each -> the same."""
    kept = []
    for part in parts[1:-1]:
        flow, saved = part.forward(flow, ctx)
        kept.append(saved)
    head: Any = parts[-1]
    asked = _asked(flow[0], question)
    logits = head.logits(asked, ctx)
    _, slope = score(to_host(wide(logits))[0, 0].astype("f8"))
    only = replace(ctx, later=[])  # what an earlier part waits for, and no gradient of a weight
    dlogits = module_of(logits).asarray(slope).astype(logits.dtype).reshape(logits.shape)
    dasked = head.logits_backward(dlogits, asked, only)
    if question.at is None:
        dy = (dasked,)
    else:
        dy = (module_of(flow[0]).zeros_like(flow[0]),)
        dy[0][:, question.at] = dasked[:, 0]
    for part, saved in zip(reversed(parts[1:-1]), reversed(kept), strict=True):
        dy = part.backward(dy, saved, only)
    return dy


def _asked(hidden: Array, question: Question) -> Array:
    """What the head needs of the last part's output. Shapes: (1, T, C) -> (1, 1, C), or all of it."""
    return hidden if question.at is None else hidden[:, question.at : question.at + 1]


_Scorer = Callable[[np.ndarray], tuple[float, np.ndarray]]


def _scorer(target: int, score: Score) -> _Scorer:
    """Logits (V,) -> the score of an output and its gradient (V,)."""

    def logit(logits: np.ndarray) -> tuple[float, np.ndarray]:
        return float(logits[target]), np.eye(1, len(logits), target)[0]

    def log_probability(logits: np.ndarray) -> tuple[float, np.ndarray]:
        p = _softmax(logits[None])[0]
        return float(np.log(p[target])), np.eye(1, len(logits), target)[0] - p

    return logit if score == "logit" else log_probability


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Shapes: (N, V) -> the same."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True))
