"""The manifest: totals that add up, and every way in which it can be wrong."""

import hashlib
import itertools
import json

import pytest
from corpora import run_prepare, write_texts

from mlm_mpi.data.catalog import Catalog
from mlm_mpi.errors import DataError


@pytest.fixture
def corpus(tmp_path, capsys):
    write_texts(tmp_path / "in")
    run_prepare(
        tmp_path / "in", "--out", tmp_path / "out", "--shard-mib", "0.004", "--vocab", "300", "--heldout", "0.2"
    )
    return tmp_path / "out"


def test_totals_add_up(corpus):
    catalog = Catalog.open(corpus)
    table = json.loads((corpus / "catalog.json").read_text())
    assert catalog.digest == hashlib.sha256((corpus / "catalog.json").read_bytes()).hexdigest()
    for split in ("train", "heldout"):
        shards = catalog.split(split)
        assert len(shards) > 1 and shards[0].start == 0
        assert all(a.stop == b.start for a, b in itertools.pairwise(shards))
        assert shards[-1].stop == catalog.tokens(split) == table["totals"][split]["tokens"]
        assert catalog.characters(split) == table["totals"][split]["characters"]
    assert sum(total["documents"] for total in table["totals"].values()) == table["cleaning"]["documents"] == 40
    tokenizer = catalog.tokenizer()
    assert (tokenizer.hash, tokenizer.eot) == (table["tokenizer"]["hash"], table["tokenizer"]["eot"])
    catalog.check_files()


def _refused(action, *words):
    with pytest.raises(DataError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_missing_damaged_old(corpus):
    path = corpus / "catalog.json"
    content = path.read_bytes()
    table = json.loads(content)
    _refused(lambda: Catalog.open(corpus / "nowhere"), "no corpus at", "run mlm-mpi prepare", "set data.dir")
    _refused(lambda: Catalog.open(corpus / "nowhere", "--data"), "no corpus at", "set --data")
    _refused(lambda: Catalog.open("", "--data"), "--data is empty: set it to the folder")
    for damaged in (b"", content[:-20], b"[]", b"\xff", json.dumps({"format": 2}).encode()):
        path.write_bytes(damaged)
        _refused(lambda: Catalog.open(corpus), "catalog.json", "run mlm-mpi prepare again")
    path.write_text(json.dumps(table | {"format": 0}))
    _refused(lambda: Catalog.open(corpus), "format 0", "reads format 2", "run mlm-mpi prepare again")
    table["shards"][0]["tokens"] = "many"
    path.write_text(json.dumps(table))
    _refused(lambda: Catalog.open(corpus), "is damaged", "shards", "tokens")


def test_catalog_of_another_tokenizer(corpus):
    path = corpus / Catalog.open(corpus).manifest.tokenizer.file
    path.write_bytes(path.read_bytes() + b"\n")
    _refused(Catalog.open(corpus).tokenizer, "catalog of another tokenizer", str(path), "run mlm-mpi prepare again")
    path.unlink()
    _refused(Catalog.open(corpus).tokenizer, "cannot read the tokenizer")


def test_cheap_check_and_unknown_split(corpus):
    catalog = Catalog.open(corpus)
    _refused(lambda: catalog.split("test"), "no split 'test'", "train and heldout", "--split")
    path = corpus / catalog.split("heldout")[0].entry.file
    path.write_bytes(path.read_bytes()[:-1])
    _refused(catalog.check_files, str(path), "the catalog says")
    path.unlink()
    _refused(catalog.check_files, str(path), "is missing")
