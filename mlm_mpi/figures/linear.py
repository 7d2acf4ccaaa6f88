"""What simple methods reach on the same split: the most frequent label, and a linear classifier of words."""

import importlib
import math
from typing import Any

import numpy as np

from mlm_mpi.figures import classes


def baselines(train: list[str], targets: np.ndarray, other: list[str], wanted: np.ndarray) -> dict[str, Any]:
    """Accuracy and macro F1, learned from `train` and measured on `other`; the linear one is None without scikit-learn.

    TF-IDF of words and logistic regression with scikit-learn's defaults, but that it may take 1,000 steps. Shapes:
    targets (n,), wanted (m,).
    """
    counts = np.bincount(targets)
    told: dict[str, Any] = {"majority_accuracy": float((wanted == counts.argmax()).mean())}
    try:
        text = importlib.import_module("sklearn.feature_extraction.text")
        linear_model = importlib.import_module("sklearn.linear_model")
    except ImportError:
        return told | {"linear_accuracy": None, "linear_macro_f1": None}
    vectors = text.TfidfVectorizer()
    model = linear_model.LogisticRegression(max_iter=1000).fit(vectors.fit_transform(train), targets)
    found = model.predict(vectors.transform(other))
    labels = int(max(targets.max(), wanted.max())) + 1
    table = classes.confusion(np.stack([wanted, found], axis=1), labels)
    f1 = classes.per_label(table)[2]
    return told | {"linear_accuracy": float((found == wanted).mean()), "linear_macro_f1": math.fsum(f1) / labels}
