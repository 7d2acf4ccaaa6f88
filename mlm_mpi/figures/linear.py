"""What simple methods reach on the same split: the most frequent label; linear classifiers of words, of characters."""

import importlib
import math
from typing import Any

import numpy as np

from mlm_mpi.figures import classes

# name -> how a text is cut into what is counted
_CUTS: dict[str, dict[str, Any]] = {"linear": {}, "characters": {"analyzer": "char", "ngram_range": (1, 4)}}


def baselines(train: list[str], targets: np.ndarray, other: list[str], wanted: np.ndarray) -> dict[str, Any]:
    """Accuracy and macro F1, learned from `train` and measured on `other`; those of linear classifiers, of words and of
    1 to 4 characters, are None without scikit-learn.

    TF-IDF and logistic regression with scikit-learn's defaults, but that it may take 1,000 steps. Shapes: targets (n,),
    wanted (m,).
    """
    counts = np.bincount(targets)
    told: dict[str, Any] = {"majority_accuracy": float((wanted == counts.argmax()).mean())}
    try:
        text = importlib.import_module("sklearn.feature_extraction.text")
        linear_model = importlib.import_module("sklearn.linear_model")
    except ImportError:
        return told | {f"{name}_{figure}": None for name in _CUTS for figure in ("accuracy", "macro_f1")}
    labels = int(max(targets.max(), wanted.max())) + 1
    for name, cut in _CUTS.items():
        vectors = text.TfidfVectorizer(**cut)
        model = linear_model.LogisticRegression(max_iter=1000).fit(vectors.fit_transform(train), targets)
        found = model.predict(vectors.transform(other))
        f1 = classes.per_label(classes.confusion(np.stack([wanted, found], axis=1), labels))[2]
        told |= {f"{name}_accuracy": float((found == wanted).mean()), f"{name}_macro_f1": math.fsum(f1) / labels}
    return told
