"""A dictionary from pairs of texts: the likeliest word for each word by IBM model 1 (Brown et al., Computational
Linguistics 19, 1993, section 4.1), and translating word by word with it."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

_WORD = re.compile(r"\w+")
_ROUNDS = 5  # of expectation maximisation, as Brown et al. do and as has become usual
_NOTHING = ""  # what target words come from that no source word explains


def learned(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Each word of the sources, in small letters, and the word of the targets that it becomes most often; of equal
    ones that which is seen first."""
    sides = [[_WORD.findall(text.lower()) for text in pair] for pair in pairs]
    sources, targets = ({word: number for number, word in enumerate(words)} for words in _words(sides))
    links = [
        np.stack(np.meshgrid([sources[word] for word in (_NOTHING, *source)], [targets[word] for word in target]), -1)
        for source, target in sides
    ]  # (target words, source words and nothing, 2) of each pair
    rows = np.concatenate([np.zeros((0, 2), np.int64), *(link.reshape(-1, 2) for link in links)])
    widths = np.concatenate([np.zeros(0, np.int64), *(np.full(link.shape[0], link.shape[1]) for link in links)])
    places = np.repeat(np.arange(len(widths)), widths)  # which target word a row is to explain
    kinds, which = np.unique(rows[:, 0] * len(targets) + rows[:, 1], return_inverse=True)
    of_source, likely = kinds // max(1, len(targets)), np.ones(len(kinds))
    for _ in range(_ROUNDS):
        shares = likely[which] / np.bincount(places, likely[which])[places]
        likely = np.bincount(which, shares)
        likely /= np.bincount(of_source, likely)[of_source]
    names, other, best = [*sources], [*targets], dict[str, str]()
    for kind in np.lexsort((kinds, -likely)):  # kinds of one source word are in the order of target words
        best.setdefault(names[of_source[kind]], other[int(kinds[kind]) % len(targets)])
    return {word: became for word, became in best.items() if word != _NOTHING}


def _words(sides: Sequence[Sequence[Sequence[str]]]) -> tuple[dict[str, None], dict[str, None]]:
    """Those of sources, nothing before them, and of targets, each once, in their order."""
    sources = dict.fromkeys([_NOTHING, *(word for source, _ in sides for word in source)])
    return sources, dict.fromkeys(word for _, target in sides for word in target)


def translated(text: str, dictionary: Mapping[str, str]) -> str:
    """Word by word; what stands between words stays, and so do unknown words. A capital at the beginning is kept."""

    def one(found: re.Match[str]) -> str:
        word = found[0]
        became = dictionary.get(word.lower())
        if became is None:
            return word
        return became[:1].upper() + became[1:] if word[0].isupper() else became

    return _WORD.sub(one, text)
