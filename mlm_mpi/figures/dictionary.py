"""A dictionary from pairs of texts: the likeliest word for each word by IBM model 1 (Brown et al., Computational
Linguistics 19, 1993, section 4.1), and translating word by word with it."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

_WORD = re.compile(r"\w+")
_ROUNDS = 5  # of expectation maximisation
_NOTHING = ""  # what target words come from that no source word explains


def learned(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Each word of the sources, in small letters, and the word of the targets that it becomes most often; of equal
    ones that which is seen first."""
    sides = [[_WORD.findall(text.lower()) for text in pair] for pair in pairs]
    sources = [*dict.fromkeys([_NOTHING, *(word for source, _ in sides for word in source)])]
    targets = [*dict.fromkeys(word for _, target in sides for word in target)]
    numbers = [{word: number for number, word in enumerate(words)} for words in (sources, targets)]
    codes = [
        (np.array([numbers[0][word] for word in (_NOTHING, *source)]), np.array([numbers[1][word] for word in target]))
        for source, target in sides
        if target
    ]
    if not codes:
        return {}
    word, became, likely = _probabilities(codes)
    best: dict[str, str] = {}
    for row in np.lexsort((became, -likely)):
        best.setdefault(sources[word[row]], targets[became[row]])
    del best[_NOTHING]
    return best


def _probabilities(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(numbers of a source's word, of a target's, probability that the former becomes the latter) of all words that
    meet in a pair. Shapes: (s,), (t,) each -> (n,) each."""
    sources = np.concatenate([np.tile(source, len(target)) for source, target in pairs])
    targets = np.concatenate([np.repeat(target, len(source)) for source, target in pairs])
    widths = np.concatenate([np.full(len(target), len(source)) for source, target in pairs])
    places = np.repeat(np.arange(len(widths)), widths)  # the occurrence of a target's word that is to be explained
    kinds, kind = np.unique(np.stack([sources, targets]), axis=1, return_inverse=True)
    kind, likely = kind.reshape(-1), np.ones(kinds.shape[1])  # NumPy 2.0.0 gives it two axes
    for _ in range(_ROUNDS):
        share = likely[kind] / np.bincount(places, likely[kind])[places]
        counts = np.bincount(kind, share)
        likely = counts / np.bincount(kinds[0], counts)[kinds[0]]
    return kinds[0], kinds[1], likely


def translated(text: str, dictionary: Mapping[str, str]) -> str:
    """Word by word; what stands between words stays, and so do unknown words. A capital at the beginning is kept."""

    def one(found: re.Match[str]) -> str:
        word = found[0]
        became = dictionary.get(word.lower())
        if became is None:
            return word
        return became[:1].upper() + became[1:] if word[0].isupper() else became

    return _WORD.sub(one, text)
