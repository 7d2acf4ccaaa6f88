"""Token streams in memory."""

import numpy as np


class Tokens:
    """As `TokenStream`, of tokens drawn from a seed or all `value`."""

    def __init__(self, tokens, seed=0, value=None, vocabulary=37, split="train"):
        self.tokens, self.split = tokens, split
        drawn = np.random.default_rng(seed).integers(0, vocabulary, tokens)
        self._all = (drawn if value is None else np.full(tokens, value)).astype(np.uint8)

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.tokens
        return self._all[start:stop]
