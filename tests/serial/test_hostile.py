"""Files that somebody made to do harm: each is refused in one line, before it has cost memory or read another file."""

import hashlib
import io
import json
import os
import resource
import tempfile
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hostile import DOCUMENTS, TOKENS, Corpus, Saved, altered

from mlm_mpi import config
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import ConfigError, DataError, MlmError
from mlm_mpi.monitor import metrics, report
from mlm_mpi.train import checkpoint
from mlm_mpi.train.checkpoint import DamagedCheckpoint

MIB = 1 << 20


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return Corpus.make(tmp_path_factory.mktemp("hostile") / "corpus")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return Saved.make(tmp_path_factory.mktemp("hostile") / "checkpoints" / "step-00000003")


@pytest.fixture
def corpus(corpora, tmp_path):
    return corpora.copy(tmp_path / "corpus")


@pytest.fixture
def saved(checkpoints, tmp_path):
    return checkpoints.copy(tmp_path / "checkpoints" / "step-00000003")


def refused(action, *words, kind=MlmError):
    """One line, and no more memory than a file of this size may take."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert text.isprintable() and len(text) <= 2001 and all(word in text for word in words), text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024, "MiB of memory taken"


def test_what_nobody_has_altered_is_read(corpus, saved):
    """Guards every other test here: what they refuse is the alteration."""
    corpus.alter(lambda file: None)
    corpus.read()
    before = saved.read().weights_sha256()
    saved.alter(lambda file: None)
    assert saved.read().weights_sha256() == before


# Each replaces the dataset `name`, or something else of the file. `other`: an HDF5 file outside, with good data.


def replaced(file, name, **how):
    shape = file[name].shape
    del file[name]
    file.create_dataset(name, **({"shape": shape} | how))


def of_type(dtype):
    return lambda file, name, other: replaced(file, name, dtype=dtype)


def of_shape(*shape):
    return lambda file, name, other: replaced(file, name, shape=shape, dtype=file[name].dtype)


def virtual(file, name, other):
    old = file[name]
    layout = h5py.VirtualLayout(old.shape, old.dtype)
    layout[...] = h5py.VirtualSource(str(other), "data", old.shape)
    del file[name]
    file.create_virtual_dataset(name, layout)


def link(file, name, made):
    del file[name]
    file[name] = made


def soft(file, name, other):
    file.create_dataset("elsewhere", data=file[name][...])
    link(file, name, h5py.SoftLink("/elsewhere"))


def committed(file, name, other):
    file["kind"] = file[name].dtype
    replaced(file, name, dtype=file["kind"])


def as_it_was(file, name, **how):
    """The same data, stored in another way."""
    old = file[name]
    kept = {
        "chunks": old.chunks, "compression": old.compression, "shuffle": old.shuffle, "fletcher32": old.fletcher32,
    }  # fmt: skip
    data, attributes = old[...], dict(old.attrs)
    del file[name]
    made = file.create_dataset(name, **({"data": data} | kept | how))
    made.attrs.update(attributes)


def unknown_filter(file, name, other):
    replaced(file, name, dtype=file[name].dtype, chunks=True, compression=32_111, allow_unknown_filter=True)


def compact(file, name, other):
    kind, shape, attributes = file[name].dtype, file[name].shape, dict(file[name].attrs)
    del file[name]
    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_layout(h5py.h5d.CONTIGUOUS if np.prod(shape) > 10_000 else h5py.h5d.COMPACT)
    names = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    names.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(shape)
    made = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(kind), space, how, names)
    h5py.Dataset(made).attrs.update(attributes)


def one_chunk(size_bytes):
    """The first chunk is one that inflates to another size than it has."""

    def change(file, name, other):
        squeezer = zlib.compressobj(9)
        content = b"".join(squeezer.compress(bytes(MIB)) for _ in range(size_bytes // MIB))
        content += squeezer.compress(bytes(size_bytes % MIB)) + squeezer.flush()
        file[name].id.write_direct_chunk((0,) * file[name].ndim, content + b"\0\0\0\0")

    return change


def masked(file, name, other):
    old = file[name]
    zeros = bytes(int(np.prod(old.chunks)) * old.dtype.itemsize)
    old.id.write_direct_chunk((0,) * old.ndim, zeros, filter_mask=7)


def with_attribute(**values):
    def change(file, name, other):
        file[name].attrs.update(values)
        file.attrs.update(values)

    return change


def many_attributes(file, name, other):
    with_attribute(**{f"a{n}": 1 for n in range(40)})(file, name, other)


def huge_attribute(file, name, other):
    with_attribute(big=np.zeros(1 << 12))(file, name, other)


STORAGE = {
    "external storage": lambda file, name, other: replaced(
        file, name, dtype=file[name].dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
    ),
    "external link": lambda file, name, other: link(file, name, h5py.ExternalLink(str(other), "/data")),
    "soft link": soft,
    "dangling link": lambda file, name, other: link(file, name, h5py.SoftLink("/nowhere")),
    "virtual": virtual,
    "object": of_type(h5py.string_dtype()),
    "vlen": of_type(h5py.vlen_dtype(np.uint16)),
    "compound": of_type(np.dtype([("a", "u2"), ("b", "f4")])),
    "complex": of_type(np.complex64),
    "reference": of_type(h5py.ref_dtype),
    "text": of_type("S2"),
    "enumeration": of_type(h5py.enum_dtype({"a": 0}, "u2")),
    "opaque": of_type(h5py.opaque_dtype("V2")),
    "array": of_type(np.dtype(("u2", (2,)))),
    "big-endian": lambda file, name, other: as_it_was(file, name, dtype=file[name].dtype.newbyteorder(">")),
    "wider": lambda file, name, other: as_it_was(file, name, dtype="f8"),
    "committed type": committed,
    "one row": of_shape(1),
    "scalar": of_shape(),
    "2^50 rows": of_shape(1 << 50),
    "2^50 rows in chunks": lambda file, name, other: replaced(
        file, name, shape=(1 << 50,), dtype="u2", chunks=(1 << 14,), compression="gzip"
    ),
    "resizable": lambda file, name, other: as_it_was(file, name, maxshape=(None,) * file[name].ndim),
    "chunk of 2 GiB": lambda file, name, other: as_it_was(
        file, name, maxshape=(None,) * file[name].ndim, chunks=(1 << 29, *file[name].shape[1:]),
        data=None, shape=file[name].shape, dtype=file[name].dtype, compression="gzip",
    ) if file[name].ndim == 1 else replaced(file, name, dtype="f4", maxshape=(None, None), chunks=(1 << 14, 1 << 14)),
    "contiguous": compact,
    "unknown filter": unknown_filter,
    "no filter": lambda file, name, other: as_it_was(file, name, compression=None, shuffle=None, fletcher32=None),
    "another filter": lambda file, name, other: as_it_was(file, name, compression="lzf"),
    "no chunks": lambda file, name, other: replaced(
        file, name, dtype=file[name].dtype, chunks=file[name].chunks, fletcher32=True
    ),
    "chunk without filters": masked,
    "a group": lambda file, name, other: link(file, name, file.create_group("group")),
    "nothing": lambda file, name, other: file.__delitem__(name),
    "something more": lambda file, name, other: file.create_dataset("more", data=1),
    "many attributes": many_attributes,
    "huge attribute": huge_attribute,
    "vlen attribute": lambda file, name, other: with_attribute(format="text")(file, name, other),
    "float attribute": lambda file, name, other: with_attribute(box=0.0, tokens=float(TOKENS))(file, name, other),
}  # fmt: skip


@pytest.fixture
def other(tmp_path, request):
    """Somebody else's file, whose data would pass."""
    return tmp_path / "other.h5"


def write_other(path, dataset):
    with h5py.File(path, "w") as file:
        file["data"] = dataset[...]


@pytest.mark.parametrize("what", STORAGE)
def test_a_shard_that_is_not_what_it_says(corpus, other, what):
    with h5py.File(corpus.shard) as file:
        write_other(other, file["tokens"])
    corpus.alter(lambda file: STORAGE[what](file, "tokens", other))
    refused(corpus.read, str(corpus.shard), "run mlm-mpi prepare again", kind=DataError)


@pytest.mark.parametrize("what", STORAGE)
def test_a_part_that_is_not_what_it_says(saved, other, what):
    name = "weights/embed.tokens"
    with h5py.File(saved.folder / "part-0001.h5") as file:
        assert file[name].ndim == 2
        write_other(other, file[name])
    saved.alter(lambda file: STORAGE[what](file, name, other))
    refused(saved.read, str(saved.folder), kind=DamagedCheckpoint)


@pytest.mark.parametrize(
    ("size", "word"),
    [(0, "inflate to its 32768 bytes"), (100, "inflate to its 32768 bytes"), (16 * MIB, "inflate to its 32768 bytes")]
    + [(64 * MIB, "has a chunk of 65242 bytes")],
)
def test_a_chunk_that_inflates_to_another_size(corpus, size, word):
    """HDF5 fills the rest from its memory, or allocates what the chunk inflates to."""
    corpus.alter(lambda file: one_chunk(size)(file, "tokens", None))
    refused(corpus.read, word, kind=DataError)


def tokens_of(change):
    def alter(file):
        data = file["tokens"][...]
        change(data)
        as_it_was(file, "tokens", data=data)

    return alter


def offsets_of(*values):
    return lambda file: as_it_was(file, "offsets", data=np.array(values, "u8"))


def said(**values):
    return lambda file: file.attrs.update(values)


ENDS = np.cumsum([0, *map(len, DOCUMENTS)]).tolist()
CONTENT = {
    "token": (tokens_of(lambda data: data.__setitem__(17_000, 257)), "token 257, the vocabulary has 257"),
    "documents that go back": (offsets_of(0, ENDS[2], ENDS[1], ENDS[3]), "do not follow each other"),
    "an empty document": (offsets_of(0, ENDS[1], ENDS[1], ENDS[3]), "do not follow each other"),
    "another begin": (offsets_of(1, *ENDS[1:]), "do not follow each other"),
    "another end": (offsets_of(*ENDS[:3], ENDS[3] + 1), "do not follow each other"),
    "characters": (said(characters=7), "has characters 7, the catalog says"),
    "documents": (said(documents=2), "has documents 2, the catalog says 3"),
    "negative": (said(tokens=-1), "has tokens -1"),
    "format": (said(format=99), "has format 99"),
}


@pytest.mark.parametrize("what", CONTENT)
def test_a_shard_whose_content_makes_no_sense(corpus, what):
    change, word = CONTENT[what]
    corpus.alter(change)
    refused(corpus.read, str(corpus.shard), word, kind=DataError)


def old_style(image):
    memory = io.BytesIO()
    with h5py.File(io.BytesIO(image)) as source, h5py.File(memory, "w", libver="earliest") as file:
        for name in source:
            source.copy(name, file)
        file.attrs.update(source.attrs)
    return memory.getvalue()


IMAGES = {
    "old": old_style,
    "user block": lambda image: bytes(512) + image,
    "tail": lambda image: image + bytes(100),
    "another end": lambda image: image[:-1],
    "no HDF5": lambda image: bytes(len(image)),
    "empty": lambda image: b"",
    "signature only": lambda image: image[:8],
}


@pytest.mark.parametrize("what", IMAGES)
def test_a_file_that_is_another_kind_of_hdf5(corpus, saved, what):
    corpus.seal(IMAGES[what](corpus.shard.read_bytes()))
    refused(corpus.read, "run mlm-mpi prepare again", kind=DataError)
    saved.seal_part(IMAGES[what]((saved.folder / "part-0001.h5").read_bytes()))
    refused(saved.read, str(saved.folder), kind=DamagedCheckpoint)


def fifo(path, outside):
    os.mkfifo(path)


def sparse(path, outside):
    with open(path, "wb") as file:
        file.truncate(10 << 30)


PLACES = {
    "fifo": (fifo, "FIFO"),
    "device": (lambda path, outside: path.symlink_to("/dev/zero"), "leads out of"),
    "link out": (lambda path, outside: path.symlink_to(outside), "leads out of"),
    "loop": (lambda path, outside: path.symlink_to(path.name), "symbolic links"),
    "folder": (lambda path, outside: path.mkdir(), "a folder"),
    "10 GiB": (sparse, "bytes"),
    "missing": (lambda path, outside: None, "No such file"),
}


@pytest.mark.parametrize("what", PLACES)
@pytest.mark.parametrize("which", ["catalog.json", "tokenizer.json", "shard", "manifest.json", "part-0001.h5"])
def test_a_name_under_which_lies_no_file_of_this_folder(corpus, saved, tmp_path, which, what):
    make, word = PLACES[what]
    owner = saved if (saved.folder / which).exists() else corpus
    path = corpus.shard if which == "shard" else owner.folder / which
    outside = tmp_path / "outside"
    outside.write_bytes(path.read_bytes())
    os.utime(outside)
    path.unlink()
    make(path, outside)
    said_of_size = which == "shard" and what in ("fifo", "device", "folder")  # the catalog knows its size
    refused(owner.read, "bytes" if said_of_size else word)


def test_a_part_of_a_size_that_its_rows_cannot_need(saved):
    sparse(saved.folder / "part-0001.h5", None)
    table = saved.table
    table["parts"][1]["bytes"] = 10 << 30
    saved.seal(table)
    refused(saved.read, "10737418240 bytes, its boxes need at most", kind=DamagedCheckpoint)


def test_a_folder_that_leads_elsewhere_is_no_checkpoint(saved, tmp_path):
    saved.folder.rename(tmp_path / "moved")
    saved.folder.symlink_to(tmp_path / "moved")
    refused(saved.read, "it leads out of", kind=DamagedCheckpoint)


def test_only_folders_named_as_checkpoints_count(saved):
    for name in ("step-3", "step-00000004.old", "step-0000000x", "step-00000005 ", "step--0000005", "step-\u0663" * 8):
        (saved.folder.parent / name).mkdir()
    (saved.folder.parent / "step-00000009").touch()
    (saved.folder.parent / "step-100000000").mkdir()
    names = [path.name for path in checkpoint.published(saved.folder.parent)]
    assert names == ["step-100000000", "step-00000003"]


def test_the_file_that_was_compared_is_the_file_that_is_read(corpus, monkeypatch):
    """Between the comparison and the first token another file takes the name."""
    good = corpus.shard.read_bytes()
    evil = altered(good, tokens_of(lambda data: data.fill(65)))
    digest = hashlib.file_digest

    def swap(file, kind):
        found = digest(file, kind)
        (corpus.folder / "evil").write_bytes(evil)
        (corpus.folder / "evil").replace(corpus.shard)
        return found

    from mlm_mpi.data.catalog import Catalog
    from mlm_mpi.data.stream import TokenStream

    monkeypatch.setattr(hashlib, "file_digest", swap)
    stream = TokenStream(Catalog.open(corpus.folder), "train")
    assert stream.read(0, 4).tolist() == [0, 7, 14, 256]
    monkeypatch.undo()
    stream.close()  # from here on the name leads to another file: it is compared again
    refused(lambda: stream.read(0, 4), "the catalog says", kind=DataError)


def entry(**values):
    return lambda table: table["shards"][0].update(values)


def part(**values):
    return lambda table: table["parts"][0].update(values)


CATALOGS = {
    "up": (entry(file="../tokenizer.json"), "no plain file name"),
    "absolute": (entry(file="/etc/passwd"), "no plain file name"),
    "control": (entry(file="a\nb"), "no plain file name"),
    "twice": (lambda table: table["shards"][1].update(file=table["shards"][0]["file"]), "names a file twice"),
    "tokenizer up": (lambda table: table["tokenizer"].update(file="../x"), "no plain file name"),
    "negative tokens": (entry(tokens=-5), "-5 tokens"),
    "negative documents": (entry(documents=-1), "-1 documents"),
    "fewer tokens than documents": (entry(tokens=1, documents=3), "3 documents, 1 tokens"),
    "no characters": (entry(characters=0, utf8_bytes=0), "0 characters"),
    "characters without bytes": (entry(utf8_bytes=1), "in 1 bytes"),
    "2^60 tokens": (entry(tokens=1 << 60), "is damaged"),
    "no bytes": (entry(bytes=0), "has 0 bytes"),
    "10 TB": (entry(bytes=10**13), "need at most"),
    "split": (entry(split="test"), "split 'test'"),
    "hash": (entry(sha256="x"), "SHA-256 'x'"),
    "a shard less": (lambda table: table["shards"].pop(), "totals are not the sums"),
    "totals": (lambda table: table["totals"]["train"].update(characters=7), "totals are not the sums"),
    "no totals": (lambda table: table["totals"].clear(), "totals are not the sums"),
    "eot": (lambda table: table["tokenizer"].update(eot=300), "end of text 300"),
    "negative eot": (lambda table: table["tokenizer"].update(eot=-1), "end of text -1"),
    "vocabulary": (lambda table: table["tokenizer"].update(vocab_size=1 << 32), "vocabulary 4294967296"),
    "other vocabulary": (lambda table: table["tokenizer"].update(vocab_size=300), "the catalog says 300"),
    "other eot": (lambda table: table["tokenizer"].update(eot=0), "the catalog says 257 and 0"),
    "heldout": (lambda table: table.update(heldout=1e300), "heldout 1e+300"),
    "huge format": (lambda table: table.update(format=10**1000), "has format 1000"),
}


@pytest.mark.parametrize("what", CATALOGS)
def test_a_catalog_that_makes_no_sense(corpus, what):
    change, word = CATALOGS[what]
    table = corpus.table
    change(table)
    corpus.write(table)
    refused(corpus.read, word, "run mlm-mpi prepare again", kind=DataError)


def test_consistent_lies_about_characters_are_found_in_the_shards(corpus):
    """A catalog is not sealed: entry and totals may agree on a number that flatters."""
    table = corpus.table
    for entry in table["shards"]:
        entry.update(characters=2 * TOKENS, utf8_bytes=2 * TOKENS)
    for total in table["totals"].values():
        total.update(characters=2 * TOKENS, utf8_bytes=2 * TOKENS)
    corpus.write(table)
    refused(corpus.read, f"characters {TOKENS - 3}, the catalog says {2 * TOKENS}", kind=DataError)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b'{"format": 1e999}', b"\0"])
def test_json_that_is_nested_or_huge(corpus, saved, content):
    (corpus.folder / "catalog.json").write_bytes(content)
    refused(corpus.read, "run mlm-mpi prepare again", kind=DataError)
    (saved.folder / "manifest.json").write_bytes(content)
    refused(saved.read, "manifest.json", kind=DamagedCheckpoint)
    saved.seal_text(content.decode())
    refused(saved.read, "manifest.json", kind=DamagedCheckpoint)


def boxes(number, **values):
    return lambda table: table["parts"][number]["boxes"].update({n.replace("_", "."): v for n, v in values.items()})


MANIFESTS = {
    "another step": (lambda table: table.update(step=4), "is of step 4, its folder of step 3"),
    "negative step": (lambda table: table.update(step=-3), "is of step -3"),
    "up": (part(file="../part-0000.h5"), "names a file '../part-0000.h5'"),
    "absolute": (part(file="/etc/passwd"), "names a file '/etc/passwd'"),
    "the same file": (part(file="part-0001.h5"), "names no file, or one twice"),
    "no parts": (lambda table: table["parts"].clear(), "names no file"),
    "a part less": (lambda table: table["parts"].pop(), "has no boxes with element [19, 0] of embed.tokens"),
    "overlap": (boxes(0, embed_tokens=[[[0, 20], [0, 24]]]), "has 2 boxes with element [19, 0] of embed.tokens"),
    "overlap in a corner": (
        boxes(0, embed_tokens=[[[0, 19], [0, 24]], [[30, 33], [20, 24]]]),
        "has 2 boxes with element [30, 20]",
    ),
    "a box twice": (boxes(0, embed_tokens=[[[0, 19], [0, 24]]] * 2), "has 2 boxes with element [0, 0] of embed.tokens"),
    "hole": (boxes(0, embed_tokens=[[[0, 18], [0, 24]]]), "has no boxes with element [18, 0] of embed.tokens"),
    "hole in a corner": (boxes(0, embed_tokens=[[[0, 19], [0, 23]]]), "has no boxes with element [0, 23]"),
    "hole and overlap": (
        boxes(0, embed_tokens=[[[0, 18], [0, 24]], [[19, 20], [0, 24]]]),
        "has no boxes with element [18, 0]",
    ),
    "no boxes": (boxes(0, embed_tokens=[]), "has no boxes with element [0, 0] of embed.tokens"),
    "negative": (boxes(0, embed_tokens=[[[-1, 19], [0, 24]]]), "has the box [[-1, 19], [0, 24]] of embed.tokens"),
    "backwards": (boxes(0, embed_tokens=[[[19, 0], [0, 24]]]), "has the box [[19, 0], [0, 24]]"),
    "empty": (boxes(0, embed_tokens=[[[0, 19], [7, 7]]]), "has the box [[0, 19], [7, 7]]"),
    "too many": (boxes(1, embed_tokens=[[[19, 40], [0, 24]]]), "its shape is [37, 24]"),
    "too wide": (boxes(1, embed_tokens=[[[19, 37], [0, 25]]]), "its shape is [37, 24]"),
    "fewer dims": (boxes(1, embed_tokens=[[[19, 37]]]), "has the box [[19, 37]] of embed.tokens"),
    "more dims": (boxes(1, embed_tokens=[[[19, 37], [0, 24], [0, 1]]]), "has the box [[19, 37], [0, 24], [0, 1]]"),
    "an edge more": (boxes(1, embed_tokens=[[[19, 37, 40], [0, 24]]]), "cannot be read"),
    "an edge of 400 digits": (boxes(1, embed_tokens=[[[19, 10**400], [0, 24]]]), "has the box"),
    "a fraction": (boxes(1, embed_tokens=[[[19, 37.5], [0, 24]]]), "cannot be read"),
    "swapped": (lambda table: table["parts"].reverse(), None),
    "unknown name": (boxes(0, nobody=[[[0, 1]]]), "'nobody'"),
    "negative bytes": (part(bytes=-1), "-1 bytes"),
    "dtype": (lambda table: table.update(dtype="object"), "has the type 'object'"),
    "other dtype": (lambda table: table.update(dtype="float64"), "float64"),
    "no shapes": (lambda table: table["shapes"].clear(), "names no parameter"),
    "path as name": (lambda table: table["shapes"].update({"a/../b": [1]}), "names a parameter 'a/../b'"),
    "dimension": (lambda table: table["shapes"].update({"more": [0]}), "gives more the shape [0]"),
    "no dimension": (lambda table: table["shapes"].update({"more": []}), "gives more the shape []"),
    "2^50": (lambda table: table["shapes"].update({"more": [1 << 50]}), "gives more the shape"),
    "buffers": (lambda table: table.update(buffers=["weights", "weights"]), "names no buffer, or one twice"),
    "vocabulary": (lambda table: table.update(vocabulary=0), "vocabulary of 0"),
    "config": (lambda table: table.update(config={"model": 3}), "cannot be read"),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_that_makes_no_sense(saved, what):
    change, word = MANIFESTS[what]
    table = saved.table
    change(table)
    saved.seal(table)
    if word is None:
        saved.read()  # the order of parts says nothing
    else:
        refused(saved.read, word, kind=MlmError if what == "other dtype" else DamagedCheckpoint)


@pytest.mark.parametrize("box", [np.bytes_("5:23,0:24"), np.bytes_("0:18,0:24"), np.bytes_("19:37"), 19])
def test_a_part_that_holds_another_box_than_the_manifest_says(saved, box):
    saved.alter(lambda file: file["weights/embed.tokens"].attrs.__setitem__("box", box))
    refused(saved.read, "does not hold 19:37,0:24 of weights/embed.tokens", kind=DamagedCheckpoint)


def test_a_manifest_of_too_many_boxes_costs_no_time(saved):
    """10,000 in eight dims, all of which are cut, have 2.6 million corners."""
    table = saved.table
    table["shapes"]["more"] = [1000, 2, 2, 2, 2, 2, 2, 2]
    cube = [[0, 1]] * 8
    table["parts"][0]["boxes"]["more"] = [cube] * 10_000
    saved.seal(table)
    begin = time.process_time()
    with pytest.raises(DamagedCheckpoint, match="lists boxes with 256.... corners, at most 2097152 are read"):
        saved.read()
    assert time.process_time() - begin < 10


def test_a_checkpoint_of_format_1_is_refused_in_one_line(saved):
    table = saved.table | {"format": 1}
    for part in table["parts"]:
        part["rows"] = part.pop("boxes")
    saved.seal(table)
    refused(saved.read, "has format 1, this version reads 2: use the version that wrote it")


def test_a_checkpoint_of_a_later_format_is_not_called_damaged(saved):
    saved.seal(saved.table | {"format": 7, "what_comes_later": 1})
    refused(saved.read, "has format 7, this version reads", "use the version that wrote it")


def tokenizer_with(**changes):
    table = json.loads(Tokenizer.bytes().content)
    model = table["model"] | changes.pop("model", {})
    return json.dumps(table | {"model": model} | changes).encode()


SYMBOLS = json.loads(Tokenizer.bytes().content)["model"]["vocab"]
TOKENIZERS = {
    "a panic": tokenizer_with(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "another panic": tokenizer_with(
        model={"continuing_subword_prefix": "Ġ" * 9, "merges": [["a", "b"]], "vocab": SYMBOLS | {"ab": 300}}
    ),
    "2^32": tokenizer_with(model={"vocab": SYMBOLS | {"x y": (1 << 32) - 1}}),
    "nested": b'{"version":' + b"[" * 100_000,
    "no text": b"\xff\xfe",
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_tokenizer_that_breaks_its_library(tmp_path, what, capfd):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(TOKENIZERS[what])
    refused(lambda: Tokenizer.load(path), str(path), "give another --tokenizer", kind=DataError)
    assert capfd.readouterr() == ("", "")


def test_ids_with_gaps_stay_allowed():
    tokenizer = Tokenizer(tokenizer_with(model={"vocab": SYMBOLS | {"x y": 100_000}}))
    assert tokenizer.vocab_size == 100_001


def test_a_text_that_a_tokenizer_cannot_encode():
    broken = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0], ["</s>", -1.0]], "byte_fallback": False}
    table = json.loads(Tokenizer.bytes().content) | {"model": broken, "added_tokens": []}
    tokenizer = Tokenizer(json.dumps(table).encode())
    refused(lambda: tokenizer.encode("b"), "cannot encode this text", kind=DataError)


CONFIGS = {
    "nested": b"a = " + b"[" * 2000,
    "long key": b"a." * 8000 + b"a = 1",
    "long line": b"[" + b"a." * 8000 + b"a]",
    "large": b"#\n" * (1 << 20),
    "digits": b"[train]\nsteps = " + b"9" * 4400,
    "two lines in a name": b'"a\\nb" = 1',
    "unknown section of 4000 letters": b"[" + b"a" * 4000 + b"]",
    "no text": b"\0\xff",
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_that_is_no_configuration(tmp_path, what):
    path = tmp_path / "run.toml"
    path.write_bytes(CONFIGS[what])
    refused(lambda: config.load(path), "run.toml", kind=ConfigError)


def test_a_configuration_must_be_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    refused(lambda: config.load(tmp_path / "fifo"), "it is a FIFO", kind=ConfigError)
    refused(lambda: config.load("/dev/zero"), "it is a device", kind=ConfigError)


@pytest.mark.parametrize(
    "text",
    ["train.steps=2\nrows=1", "train.steps=2\n[model]", "data.dir=a\nb", "train.steps=2\nvalue=3", "data.dir=\x1b[2J"]
    + ["log.every=" + "[" * 5000, "log.every={" + "a." * 3000 + "a=1}"],
)
def test_an_override_is_one_value(text):
    refused(lambda: config.load(None, [text]), "--set", "one --set for each key", kind=ConfigError)


JUNK = [
    '{"step":"a"}', '{"step":null}', '{"step":NaN}', '{"step":1e5}', '{"step":true}', '{"step":[]}', '{"step":{}}',
    '{"step":-1}', '{"step":1' + "0" * 5000 + "}", '{"step":1' + "0" * 400 + "}", '{"loss":1}', "[1]", "7", "null",
    "[" * 10_000, '{"step":' * 5000, '{"step":1,"x":"' + "y" * (1 << 17) + '"}', "\0" * 1000, '{"step":1,"loss":NaN}',
]  # fmt: skip
ODD = ['{"step":1,"loss":"x"}', '{"step":1,"loss":[]}', '{"step":1,"loss":true}', '{"step":1,"loss":1e999}',
       '{"step":1,"loss":1' + "0" * 400 + "}", '{"step":1,"heldout_loss":{}}', '{"step":1,"tokens":1e-320}',
       '{"step":1,"tokens":-5}', '{"step":1,"learning_rate":-1e29}']  # fmt: skip


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_junk_in_the_metrics_is_left_out_on_resume(tmp_path, junk, capsys):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 2.0}\n'
    path.write_bytes(good + junk.encode() + b"\n" + b'{"step": 2, "loss": 1.5}\n' + b'{"step": 5}\n')
    metrics.MetricsLog.open(path, 3).close()
    assert path.read_bytes() == good + b'{"step": 2, "loss": 1.5}\n'
    assert capsys.readouterr().err == ""


def test_junk_in_the_metrics_is_not_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(['{"step": 0, "loss": 2.0}', *JUNK, *ODD, '{"step": 1, "loss": 1.5}']))
    report.loss_curve(path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
    drawn = [record["loss"] for record in metrics.read_metrics(path) if report.is_loss(record.get("loss"))]
    assert drawn == [2.0, 1.5]


def test_metrics_of_a_gigabyte_without_a_line_cost_no_memory(tmp_path):
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        file.write(b'{"step": 0}\n{"step": 1, "x": "')
        file.truncate(1 << 28)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert list(metrics.read_metrics(tmp_path / "metrics.jsonl")) == [{"step": 0}]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


def test_metrics_that_are_no_file_are_one_alarm(tmp_path, capsys):
    os.mkfifo(tmp_path / "metrics.jsonl")
    metrics.MetricsLog.open(tmp_path / "metrics.jsonl", 1).write(step=1)
    assert capsys.readouterr().err.count("ALARM") == 1


def test_metrics_are_not_rewritten_through_a_link(tmp_path):
    precious = Path(tempfile.mkdtemp(dir=tmp_path)) / "precious"
    precious.write_text("kept")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "metrics.jsonl.part").symlink_to(precious)
    metrics.MetricsLog.open(tmp_path / "metrics.jsonl", 1).close()
    assert precious.read_text() == "kept"
