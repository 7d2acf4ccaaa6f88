"""Figures of a classifier, from its outcomes in the order of the texts.

Counts are whole numbers and other sums go one by one in that order, so the figures are the same on any number of ranks.
Sources: Sokolova, Lapalme, Information Processing & Management 45 (2009), for precision, recall and F1, macro (mean
over labels) and weighted (by the texts of a label); Guo et al., arXiv:1706.04599, for the calibration error.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 15  # of probabilities, as many as Guo et al. take
_SHOWN, _WORST = 4, 5  # labels in a line, and lines of labels


def confusion(outcomes: np.ndarray, labels: int) -> np.ndarray:
    """How many texts of a label (row) were given which (column). Shapes: (n, 4) -> (L, L) int64."""
    target, found = outcomes[:, 0].astype(np.int64), outcomes[:, 1].astype(np.int64)
    return np.bincount(target * labels + found, minlength=labels * labels).reshape(labels, labels)


def per_label(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(precision, recall, F1) of each label, 0 where nothing is to be divided. Shapes: (L, L) -> (L,) each."""
    right, given, there = np.diag(table), table.sum(axis=0), table.sum(axis=1)
    precision, recall = right / np.maximum(given, 1), right / np.maximum(there, 1)
    return precision, recall, 2 * right / np.maximum(given + there, 1)


def calibration(outcomes: np.ndarray) -> tuple[float, list[tuple[int, float, float]]]:
    """(expected calibration error, each bin of the found label's probability: texts, accuracy, mean probability)."""
    right, probability = outcomes[:, 0] == outcomes[:, 1], outcomes[:, 2]
    number = np.minimum((probability * BINS).astype(int), BINS - 1)
    bins = []
    for k in range(BINS):
        inside = number == k
        count = int(inside.sum())
        if count:
            bins.append((count, int(right[inside].sum()) / count, math.fsum(probability[inside]) / count))
        else:
            bins.append((0, 0.0, 0.0))
    error = math.fsum(count * abs(accuracy - mean) for count, accuracy, mean in bins) / max(1, len(outcomes))
    return error, bins


def figures(outcomes: np.ndarray, labels: Sequence[str], unit: str = "texts") -> dict[str, Any]:
    """Everything that is told of a classifier of texts or, says `unit`, words. Shapes: (n, 4): label, found label, its
    probability, the label's."""
    table = confusion(outcomes, len(labels))
    precision, recall, f1 = per_label(table)
    there = table.sum(axis=1)
    told: dict[str, Any] = {"accuracy": int(np.trace(table)) / max(1, len(outcomes))}
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        told[f"macro_{name}"] = math.fsum(values) / len(labels)
        told[f"weighted_{name}"] = math.fsum(values * there) / max(1, int(there.sum()))
    told["calibration_error"] = calibration(outcomes)[0]
    rows = zip(labels, there.tolist(), precision.tolist(), recall.tolist(), f1.tolist(), strict=True)
    told["labels"] = [
        {"label": label, unit: texts, "precision": p, "recall": r, "f1": f} for label, texts, p, r, f in rows
    ]
    told["confusion"] = table.tolist()
    return told


def lines(numbers: dict[str, Any], of: str, unit: str = "texts") -> list[str]:
    """Figures in words, `of` a checkpoint: the whole, then the labels that are told worst."""
    n = numbers
    told = [
        f"{n.get('split', 'held-out'):<20}{n['tokens']:,} {unit}; {of}",
        f"accuracy            {n['accuracy']:.4f}",
        f"F1                  {n['macro_f1']:.4f} mean of labels, {n['weighted_f1']:.4f} by their {unit}",
        f"precision           {n['macro_precision']:.4f}, {n['weighted_precision']:.4f}",
        f"recall              {n['macro_recall']:.4f}, {n['weighted_recall']:.4f}",
        f"loss                {n['loss']:.4f} nats per {unit[:-1]}",
        f"calibration error   {n['calibration_error']:.4f}, of {BINS} bins",
    ]
    rows = sorted(n["labels"], key=lambda row: (row["f1"], row["label"]))[:_WORST]
    for row in rows:
        told.append(
            f"  {row['label'][:40]:<18}F1 {row['f1']:.3f}, precision {row['precision']:.3f}, "
            f"recall {row['recall']:.3f}, {row[unit]:,} {unit}"
        )
    if len(n["labels"]) > len(rows):
        told.append(
            f"  the {len(n['labels']) - len(rows):,} other labels are told better: --json, --confusion FILE.png"
        )
    if "majority_accuracy" in n:
        told.append(f"majority            {n['majority_accuracy']:.4f} accuracy, always the most frequent label")
        if n.get("linear_accuracy") is None:
            told.append("TF-IDF + logistic   needs scikit-learn: pip install 'mlm-mpi[examples]'")
        else:
            told += [
                f"TF-IDF + logistic   {n[f'{name}_accuracy']:.4f} accuracy, {n[f'{name}_macro_f1']:.4f} F1, of {what}"
                for name, what in (("linear", "words"), ("characters", "1 to 4 characters"))
            ]
    return told


def counted(targets: np.ndarray, labels: Sequence[str]) -> str:
    """The labels with the most texts and the one with the fewest, in words."""
    counts = np.bincount(targets, minlength=len(labels))
    ordered = sorted(range(len(labels)), key=lambda number: (-counts[number], number))
    shown = ordered if len(ordered) <= _SHOWN + 1 else [*ordered[:_SHOWN], ordered[-1]]
    words = [f"{labels[number]} {counts[number]:,}" for number in shown]
    if len(ordered) > len(shown):
        words.insert(_SHOWN, "…")
    return ", ".join(words)
