"""Cleaning, and which documents count as near-identical."""

import unicodedata

import numpy as np
from corpora import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_mpi.data import similar
from mlm_mpi.data.text import clean


@given(st.text(max_size=60) | st.text(alphabet="a\u0301\u1100\u1161\r\n\t\x00\x1f\x85\ufeff\ud800 ", max_size=20))
def test_clean_text_is_nfc_without_controls_and_stays(text):
    cleaned = clean(text).text
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not [c for c in cleaned if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert clean(cleaned).text == cleaned
    assert clean(cleaned).controls == clean(cleaned).replaced == 0
    assert clean(cleaned.encode()).text == cleaned


@given(st.binary(max_size=60))
def test_clean_bytes_never_fail(raw):
    cleaned = clean(raw)
    cleaned.text.encode()
    try:
        raw.decode()
        assert cleaned.replaced == 0
    except UnicodeDecodeError:
        assert cleaned.replaced > 0


def test_clean_counts_what_it_repairs():
    cleaned = clean(b"\xef\xbb\xbfa\xffb\xe2\x82 \xef\xbf\xbd\x07\x00c\r\nd\re\tf")
    assert cleaned.text == "a\ufffdb\ufffd \ufffdc\nd\ne\tf"
    assert (cleaned.replaced, cleaned.controls) == (2, 2)
    assert clean("x\ud800y").text == "x\ufffdy" and clean("x\ud800y").replaced == 1
    assert clean("e\u0301").text == "\xe9"


def _similarity(a: str, b: str) -> bool:
    labels = similar.clusters(similar.bands([a, b]))
    return bool(labels[0] == labels[1])


def test_near_identical_documents_cluster_and_others_do_not():
    base = sentences(1, 200).split()
    for changed in range(0, 200, 40):
        other = base.copy()
        other[changed] = "otherwise"
        assert _similarity(" ".join(base), " ".join(other))
        assert _similarity(" ".join(base), " ".join(base[:changed] + base[changed + 1 :]))
    labels = similar.clusters(similar.bands([sentences(seed, 100) for seed in range(200)]))
    assert len(set(labels.tolist())) == 200


def test_bands_do_not_depend_on_the_batch_and_ignore_case_and_spacing():
    texts = [sentences(seed, 1 + 37 * seed) for seed in range(20)] + ["one", "two words", "x" * 300_000 + " end"]
    together = similar.bands(texts)
    alone = np.concatenate([similar.bands([text]) for text in texts])
    assert np.array_equal(together, alone)
    assert np.array_equal(similar.bands(["A b\n\nC  d"]), similar.bands(["a B c D"]))
    assert len(np.unique(together[:, 0])) == len(texts)


def test_shingles_equal_the_plain_definition():
    texts = ["the cat sat on the mat", "cat", "the cat", "sat on the mat the cat sat on the mat"]
    hashes, first = similar._shingles([text.encode() for text in texts])
    seen: dict[tuple[str, ...], int] = {}
    for start, text in zip(first, texts, strict=True):
        split = text.split()
        for i in range(len(split)):
            shingle = tuple(split[i : i + 3])
            assert seen.setdefault(shingle, int(hashes[start + i])) == int(hashes[start + i])
    assert len(set(seen.values())) == len(seen)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_clusters_are_the_connected_components(left, right):
    n = min(len(left), len(right))
    columns = np.array([left[:n], right[:n]], np.uint64).T
    labels = similar.clusters(columns)
    linked = (columns[:, None] == columns[None]).any(axis=2)
    for _ in range(n):
        linked = (linked.astype(int) @ linked.astype(int)) > 0
    assert np.array_equal(labels, linked.argmax(axis=1))
