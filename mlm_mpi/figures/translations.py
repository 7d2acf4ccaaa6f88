"""How good translations are, by sacrebleu: BLEU (Papineni et al., 2002) and chrF (Popović, 2015), with the signatures
that say how they were counted (Post, arXiv:1804.08771); and what simple methods reach on the same pairs."""

import importlib
from collections.abc import Sequence
from typing import Any

from mlm_mpi.data import dictionary
from mlm_mpi.errors import ConfigError

_METRICS = {"bleu": "BLEU", "chrf": "CHRF"}
_INSTALL = "pip install 'mlm-mpi[examples]'"


def check(option: str) -> None:
    """Raises ConfigError where sacrebleu is not installed."""
    if _metrics() is None:
        raise ConfigError(f"{option} counts by sacrebleu, which is not installed: {_INSTALL}, or leave it out")


def figures(texts: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
    """Of texts that should be these: `bleu` and `chrf`, 0 to 100, and the signature of each."""
    metrics, told = _metrics(), dict[str, Any]()
    assert metrics is not None, "check() comes first"
    for name, kind in _METRICS.items():
        metric = getattr(metrics, kind)()
        told[name] = metric.corpus_score(list(texts), [list(targets)]).score
        told[f"{name}_signature"] = str(metric.get_signature())
    return told


def baselines(train: Sequence[tuple[str, str]], other: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """BLEU and chrF of (source, target) pairs where the source is taken for its translation, and where a dictionary
    learned from `train` translates word by word; None without sacrebleu."""
    if _metrics() is None:
        return {f"{method}_{name}": None for method in ("copy", "dictionary") for name in _METRICS}
    known, (sources, targets) = dictionary.learned(train), zip(*other, strict=True)
    methods = {"copy": sources, "dictionary": [dictionary.translated(source, known) for source in sources]}
    found = {method: figures(texts, targets) for method, texts in methods.items()}
    return {f"{method}_{name}": told[name] for method, told in found.items() for name in _METRICS}


def lines(numbers: dict[str, Any]) -> list[str]:
    """Figures in words, of a model and of simple methods, those that there are."""
    n, told = numbers, list[str]()
    if "bleu" in n:
        told += [
            f"{name:<20}{n[key]:.2f}, {n[f'{key}_signature']}" for name, key in (("BLEU", "bleu"), ("chrF", "chrf"))
        ]
    for name, what in (("copy", "source as it is"), ("dictionary", "word by word")):
        if n.get(f"{name}_bleu") is not None:
            told.append(f"{what:<20}{n[f'{name}_bleu']:.2f} BLEU, {n[f'{name}_chrf']:.2f} chrF")
        elif f"{name}_bleu" in n:
            told.append(f"{what:<20}needs sacrebleu: {_INSTALL}")
    return told


def _metrics() -> Any:
    """sacrebleu's, None where it is not installed."""
    try:
        return importlib.import_module("sacrebleu.metrics")
    except ImportError:
        return None
