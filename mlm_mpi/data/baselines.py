"""What a held-out text costs without a model: frequencies of tokens and of runs of them, and a compressor."""

import lzma

import numpy as np

from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.data.tokenizer import Tokenizer


def unigram_bits_per_character(catalog: Catalog, vocabulary: int) -> float:
    """Bits per character of the held-out tokens under training frequencies, add-one smoothed."""
    training, heldout = TokenStream(catalog, "train"), TokenStream(catalog, "heldout")
    counts = np.ones(vocabulary)
    for start in range(0, training.tokens, 1 << 20):
        counts += np.bincount(training.read(start, min(start + (1 << 20), training.tokens)), minlength=vocabulary)
    bits = -np.log2(counts / counts.sum())
    targets = heldout.read(1, heldout.tokens)
    return float(bits[targets].sum() / catalog.characters("heldout"))


def ngram_bits(training: np.ndarray, heldout: np.ndarray, vocabulary: int) -> float:
    """Bits of the last tokens of held-out n-grams by those before them, as often as these follow in training.

    Shapes: (n-grams, n) each. What never followed has its share of the frequencies for n − 1 (Witten and Bell, IEEE
    Transactions on Information Theory 37 (1991), method C, interpolated), and in the end of 1 / `vocabulary`.
    """
    count = len(training)
    grams = np.concatenate([training, heldout]).astype(np.int64)
    histories, chances = np.zeros(len(grams), np.int64), np.full(len(heldout), 1.0 / vocabulary)
    for n in range(1, grams.shape[1] + 1):
        if n > 1:
            histories = _numbered(histories * vocabulary + grams[:, -n])
        runs = _numbered(histories * vocabulary + grams[:, -1])
        _, firsts = np.unique(runs[:count], return_index=True)
        often = np.bincount(runs[:count], minlength=len(grams))[runs[count:]]
        seen, kinds = (
            np.bincount(some, minlength=len(grams))[histories[count:]]
            for some in (histories[:count], histories[firsts])
        )
        chances = np.where(seen > 0, (often + kinds * chances) / np.maximum(seen + kinds, 1), chances)
    return float(-np.log2(chances).sum())


def _numbered(keys: np.ndarray) -> np.ndarray:
    """Equal numbers for equal keys, from 0 on."""
    return np.unique(keys, return_inverse=True)[1]


def xz_bits_per_character(catalog: Catalog, tokenizer: Tokenizer) -> tuple[float, float]:
    """Bits per character of `xz -9e` on the held-out text: alone, and what it adds after the training text.

    The training text is cut to its last 64 MiB, xz's window. Training and held-out share whole sentences,
    which a window of all training text copies and a small model does not remember.
    """
    training = _text(TokenStream(catalog, "train"), tokenizer)[-(64 << 20) :]
    heldout = _text(TokenStream(catalog, "heldout"), tokenizer)
    bits = 8.0 / catalog.characters("heldout")
    return bits * len(_xz(heldout)), bits * (len(_xz(training + heldout)) - len(_xz(training)))


def _text(stream: TokenStream, tokenizer: Tokenizer) -> bytes:
    return tokenizer.decode(stream.read(0, stream.tokens).tolist()).encode()


def _xz(content: bytes) -> bytes:
    return lzma.compress(
        content, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    )
