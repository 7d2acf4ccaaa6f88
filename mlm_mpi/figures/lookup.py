"""What a table of words reaches: each word has the label that it has most often on the training side."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np


def looked_up(words: Sequence[str], targets: np.ndarray, others: Sequence[str]) -> np.ndarray:
    """The labels of `others`, learned from `words`. A word that is none of these has the most frequent label of all; of
    labels that are as frequent the first is taken. Shapes: targets (n,) -> (m,)."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for word, target in zip(words, targets.tolist(), strict=True):
        counts[word][target] += 1
    known = {word: _most(found) for word, found in counts.items()}
    default = _most(Counter(targets.tolist()))
    return np.array([known.get(word, default) for word in others], np.int64)


def _most(counts: Counter[int]) -> int:
    return min(counts, key=lambda label: (-counts[label], label))
