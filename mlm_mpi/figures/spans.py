"""Figures of spans, such as names, that labels B-x, I-x and O of words mark: whole spans are right or wrong.

Counts are whole numbers, so the figures are the same on any number of ranks.
Source: Tjong Kim Sang, De Meulder, CoNLL-2003 (arXiv:cs/0306050), and its program conlleval: a span is right if it has
the same words and the same kind, and an I-x behind another kind, or behind no span, begins one.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_LABEL = re.compile(r"O|[BI]-.+")
_WORST = 5  # lines of kinds


class Span(NamedTuple):
    """Words start … stop − 1."""

    start: int
    stop: int
    kind: str


def mark_spans(labels: Sequence[str]) -> bool:
    """Whether these labels mark spans."""
    return all(_LABEL.fullmatch(label) for label in labels) and any(label != "O" for label in labels)


def spans(labels: Sequence[str], begins: Sequence[bool]) -> set[Span]:
    """The spans that the labels of words mark, `begins` being true for the first word of a sentence."""
    found: set[Span] = set()
    start, kind = 0, ""  # of the span at hand, "": there is none
    for place, (label, first) in enumerate(zip(labels, begins, strict=True)):
        mark, _, name = label.partition("-")
        if mark == "I" and name == kind and not first:
            continue
        if kind:
            found.add(Span(start, place, kind))
        start, kind = place, name
    return found | ({Span(start, len(labels), kind)} if kind else set())


def figures(outcomes: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Precision, recall and F1 of all spans and of each kind. Shapes: (n, 5): label, found label, …, begins."""
    begins = outcomes[:, 4].astype(bool).tolist()
    there, given = (spans([labels[int(number)] for number in column], begins) for column in outcomes[:, :2].T.tolist())
    kinds = sorted({label[2:] for label in labels} - {""})
    right, wanted, found = (Counter(span.kind for span in some) for some in (there & given, there, given))
    told: dict[str, Any] = {
        f"span_{name}": value for name, value in _rates(len(there & given), len(there), len(given)).items()
    }
    told["spans"] = [
        {"kind": kind, "spans": wanted[kind]} | _rates(right[kind], wanted[kind], found[kind]) for kind in kinds
    ]
    return told


def _rates(right: int, there: int, given: int) -> dict[str, float]:
    return {
        "precision": right / max(1, given), "recall": right / max(1, there), "f1": 2 * right / max(1, there + given),
    }  # fmt: skip


def lines(numbers: dict[str, Any]) -> list[str]:
    """Figures in words: the whole, then the kinds that are found worst."""
    n, rows = numbers, sorted(numbers["spans"], key=lambda row: (row["f1"], row["kind"]))
    told = [
        f"spans               F1 {n['span_f1']:.4f}, precision {n['span_precision']:.4f}, "
        f"recall {n['span_recall']:.4f}, {sum(row['spans'] for row in rows):,} spans"
    ]
    for row in rows[:_WORST]:
        told.append(
            f"  {row['kind'][:40]:<18}F1 {row['f1']:.3f}, precision {row['precision']:.3f}, "
            f"recall {row['recall']:.3f}, {row['spans']:,} spans"
        )
    if len(rows) > _WORST:
        told.append(f"  the {len(rows) - _WORST:,} other kinds are found better: --json")
    return told
