"""Readers under mutated files: `fuzz.py FOLDER SEED CASES TARGET…`. A process of its own, with a limit on memory.

A reader may return or raise MlmError; anything else, a second of CPU time or a crash fails, and FOLDER keeps the file.
Mutations are sealed again by SHA-256, so that the parsers are reached.
"""

import copy
import dataclasses
import hashlib
import json
import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from hostile import TOKENS, Corpus, Saved, altered
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mlm_mpi import config
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.shards import ShardReader
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import MlmError
from mlm_mpi.monitor import metrics, report
from mlm_mpi.train import checkpoint

MEMORY_BYTES = 1 << 30
CPU_S = 1.0

# -- mutations

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 1 << 14, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
    + [1 << 40, 1 << 50, (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1]
)
EDIT = st.tuples(
    st.integers(0, 1 << 16), st.one_of(st.integers(0, 60), st.integers(0, 600)), st.sampled_from([1, 1, 1, 2, 4, 8]),
    st.one_of(NUMBERS, st.integers(0, 255), st.integers(0, (1 << 64) - 1)),
)  # fmt: skip
EDITS = st.lists(EDIT, min_size=1, max_size=4)


BLOCKS = re.compile(b"OHDR|OCHK|FAHD|FADB|FRHP|FHDB|FHIB|BTHD|BTLF|BTIN|\x89HDF")


def edited(image: bytes, edits: list[tuple[int, int, int, int]]) -> bytes:
    """The image with some bytes of its metadata overwritten; a block of ours has some 30 to 600 bytes."""
    content, blocks = bytearray(image), [found.start() for found in BLOCKS.finditer(image)]
    for number, offset, width, value in edits:
        at = min(blocks[number % len(blocks)] + offset, len(image) - width)
        content[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(content)


TEXT = st.one_of(st.text(max_size=8), st.sampled_from(["", "../x", "/etc/passwd", "a\nb", "\ud800", "é" * 300, "NaN"]))
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), NUMBERS, NUMBERS.map(lambda n: -n), st.just(10**400),
    st.floats(allow_nan=False, allow_infinity=False), TEXT,
)  # fmt: skip
VALUE = st.one_of(
    SCALAR, st.lists(SCALAR, max_size=3), st.dictionaries(TEXT, SCALAR, max_size=3), st.just([[[[[]]]]]),
)  # fmt: skip
TREE_EDITS = st.lists(
    st.tuples(st.lists(st.integers(0, 1 << 16), min_size=1, max_size=7), st.sampled_from("sssdcx"), VALUE),
    min_size=1, max_size=3,
)  # fmt: skip


def regrown(tree: Any, edits: list[tuple[list[int], str, Any]]) -> Any:
    """The tree with values replaced (s), deleted (d), copied to elsewhere (c), or a member more (x)."""
    tree = copy.deepcopy(tree)
    for path, kind, shared in edits:
        node, inner, value = tree, None, copy.deepcopy(shared)
        for step in path:
            if not isinstance(node, dict | list) or not node:
                break
            key = list(node)[step % len(node)] if isinstance(node, dict) else step % len(node)
            inner, node = (node, key), node[key]
        if inner is None:
            continue
        holder, key = inner
        if kind == "s":
            holder[key] = value
        elif kind == "d":
            del holder[key]
        elif kind == "c":
            holder[key] = copy.deepcopy(tree)
        elif isinstance(holder, dict):
            holder[str(value)] = node
        else:
            holder.append(value)
    return tree


RAW = st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=4), st.integers(0, 4)), max_size=3)


def as_bytes(tree: Any, raw: list[tuple[int, bytes, int]]) -> bytes:
    """JSON, with some of its bytes replaced."""
    content = json.dumps(tree).encode(errors="surrogatepass")
    for at, new, gone in raw:
        at %= len(content) + 1
        content = content[:at] + new + content[at + gone :]
    return content


# -- targets: each yields a strategy, and what makes the files of a case and returns the reading of them

Read = Callable[[], object]
Target = tuple[st.SearchStrategy[Any], Callable[[Any], Read]]


def shard(folder: Path) -> Target:
    corpus = Corpus.make(folder / "shard")
    found = Catalog.open(corpus.folder)
    entry, tokenizer, path = found.manifest.shards[0], found.manifest.tokenizer, corpus.shard
    image = path.read_bytes()
    return EDITS, lambda edits: shard_written(path, edited(image, edits), entry, tokenizer)


def shard_written(path: Path, content: bytes, entry: Any, tokenizer: Any) -> Read:
    path.write_bytes(content)
    sealed = dataclasses.replace(entry, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def read() -> None:
        reader = ShardReader(path, sealed, tokenizer.hash, tokenizer.vocab_size)
        try:
            tokens = reader.read(0, entry.tokens)
            assert tokens.shape == (TOKENS,) and tokens.max() < tokenizer.vocab_size
        finally:
            reader.close()

    return read


DTYPES = st.sampled_from(["u1", "u2", "<u2", ">u2", "i2", "u8", "f4", "c8", "S2", "V3", "?", h5py.ref_dtype])
SHAPES = st.sampled_from([(), (1,), (TOKENS,), (TOKENS, 1), (TOKENS + 1,), (4,), (0,), (1 << 24,), (2, 3)])
CHUNKS = st.sampled_from([None, True, (1,), (4,), (1 << 14,), (1 << 14, 1), (TOKENS,), (1 << 20,)])
REMADE = st.tuples(
    st.sampled_from(["tokens", "offsets", "more"]), DTYPES, SHAPES, CHUNKS,
    st.sampled_from([None, (None,), (1 << 20,), (None, None)]), st.sampled_from([None, "gzip", "lzf", 1, 9]),
    st.booleans(), st.booleans(),
)  # fmt: skip
ATTRIBUTE = st.tuples(
    st.sampled_from(["format", "tokenizer", "tokens", "documents", "split", "more"]),
    st.one_of(st.integers(-5, 5), st.integers(0, 1 << 62), st.text(max_size=5), st.binary(max_size=300), st.floats()),
)


def structure(folder: Path) -> Target:
    """Datasets, links and attributes that h5py itself writes in place of ours."""
    corpus = Corpus.make(folder / "structure")
    found = Catalog.open(corpus.folder)
    entry, tokenizer, path = found.manifest.shards[0], found.manifest.tokenizer, corpus.shard
    image = path.read_bytes()

    def change(file: h5py.File, remade: Any, attributes: Any, link: str) -> None:
        for name, dtype, shape, chunks, most, squeeze, shuffle, summed in remade:
            try:
                old = file.pop(name, None)
                how = {"chunks": chunks, "maxshape": most, "compression": squeeze} if shape else {}
                same = isinstance(old, h5py.Dataset) and old.shape == shape and old.size <= TOKENS
                data = {"data": old[...]} if same and dtype in ("u2", "u8") else {}
                file.create_dataset(
                    name, shape, dtype, shuffle=shuffle or None, fletcher32=summed or None, **how, **data
                )
            except (ValueError, TypeError, OSError, KeyError):
                continue  # what h5py cannot write nobody has to read
        for name, value in attributes:
            file.attrs[name] = value if isinstance(value, int | float) else np.bytes_(value) if value else value
        if link:
            file.pop("tokens", None)
            file["tokens"] = {"soft": h5py.SoftLink("/offsets"), "out": h5py.ExternalLink("/etc/passwd", "/x"),
                              "hard": file.get("offsets") or file.create_group("g")}[link]  # fmt: skip

    def written(case: Any) -> Read:
        try:
            content = altered(image, lambda file: change(file, *case))
        except (ValueError, TypeError, OSError, RuntimeError, KeyError):
            content = image
        return shard_written(path, content, entry, tokenizer)

    return st.tuples(
        st.lists(REMADE, max_size=2),
        st.lists(ATTRIBUTE, max_size=2),
        st.sampled_from(["", "", "", "soft", "out", "hard"]),
    ), written


def part(folder: Path) -> Target:
    saved = Saved.make(folder / "part" / "step-00000003", writers=1, layers=1)
    path = saved.folder / saved.last
    image, manifest, (store, buffers) = path.read_bytes(), checkpoint.read_manifest(saved.folder), saved.buffers()

    def written(edits: Any) -> Read:
        content = edited(image, edits)
        path.write_bytes(content)
        manifest.parts[0] = checkpoint.Part(
            path.name, len(content), hashlib.sha256(content).hexdigest(), manifest.parts[0].boxes
        )
        return lambda: checkpoint.restore(saved.folder, manifest, store, buffers)

    return EDITS, written


def manifest(folder: Path) -> Target:
    saved = Saved.make(folder / "manifest" / "step-00000003", layers=1)
    table, (store, buffers) = saved.table, saved.buffers()

    def read() -> None:
        checkpoint.restore(saved.folder, checkpoint.read_manifest(saved.folder), store, buffers)

    def written(case: Any) -> Read:
        edits, raw, sealed = case
        body = as_bytes(regrown(table, edits), raw)
        seal = hashlib.sha256(body).hexdigest() if sealed else "0" * 64
        (saved.folder / "manifest.json").write_bytes(b'{"sha256": "%b", "manifest": %b}' % (seal.encode(), body))
        return read

    return st.tuples(TREE_EDITS, st.one_of(st.just([]), RAW), st.sampled_from([True] * 9 + [False])), written


def catalog(folder: Path) -> Target:
    corpus = Corpus.make(folder / "catalog")
    table = corpus.table

    def written(case: Any) -> Read:
        (corpus.folder / "catalog.json").write_bytes(as_bytes(regrown(table, case[0]), case[1]))
        return corpus.read

    return st.tuples(TREE_EDITS, st.one_of(st.just([]), RAW)), written


def tokenizer(folder: Path) -> Target:
    """Small vocabularies of every kind of model, with what may stand before and behind it."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(20)} | {"</s>": 20, "a": 21, "b": 22, "ab": 23, "Ġ": 24}
    special = {"id": 20, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}  # fmt: skip
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
           "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True, "ignore_merges": False,
           "vocab": vocabulary, "merges": [["a", "b"]]}  # fmt: skip
    scored = [[name, -1.0 * number] for name, number in vocabulary.items()]
    found = [
        bpe,
        {"type": "Unigram", "unk_id": 0, "vocab": scored, "byte_fallback": True},
        {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
         "vocab": vocabulary},
        {"type": "WordLevel", "unk_token": "a", "vocab": vocabulary},
    ]  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": "\\s+|\\w"}, "behavior": "Isolated", "invert": False}
    digits = {"type": "Digits", "individual_digits": True}
    before = [None, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
              {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
              {"type": "Sequence", "pretokenizers": [split, digits]}]  # fmt: skip
    normal = [None, {"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]},
              {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
              {"type": "Precompiled", "precompiled_charsmap": "AAAA"}]  # fmt: skip
    behind = [None, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
              {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"},
               {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}]  # fmt: skip

    def written(case: Any) -> Read:
        model, pre, norm, decoder, edits, raw, text = case
        tree = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": norm,
                "pre_tokenizer": pre, "post_processor": None, "decoder": decoder, "model": model}  # fmt: skip
        content = as_bytes(regrown(tree, edits), raw)
        return lambda: read(content, text)

    def read(content: bytes, text: str) -> None:
        made = Tokenizer(content)
        assert 0 <= made.eot < made.vocab_size
        made.decode(made.encode(text))
        made.decode([0, made.eot, made.vocab_size - 1])
        made.token_bytes(made.eot)

    choices = [st.sampled_from(options) for options in (found, before, normal, behind)]
    return st.tuples(*choices, TREE_EDITS, st.one_of(st.just([]), st.just([]), RAW), st.text(max_size=12)), written


def settings_file(folder: Path) -> Target:
    lines = config.to_toml(config.load(None)).splitlines()
    path = folder / "run.toml"
    word = st.one_of(
        TEXT, NUMBERS.map(str), st.sampled_from(["[[a]]", "[model]", "a.b.c=1", "[" * 999, '"""', "={", "1e999", "nan"])
    )
    change = st.tuples(st.integers(0, 200), st.integers(0, 40), word, st.booleans())

    def written(case: Any) -> Read:
        changes, overrides = case
        text = list(lines)
        for number, column, new, whole in changes:
            line = text[number % len(text)]
            text[number % len(text)] = new if whole else line[:column] + new + line[column:]
        path.write_bytes("\n".join(text).encode(errors="surrogatepass"))
        return lambda: config.load(path, overrides)

    key = st.sampled_from([line.split(" =")[0] for line in lines if "=" in line])
    override = st.builds(
        lambda section, name, new: f"{section}.{name}={new}", st.sampled_from(["model", "train", "data"]), key, word
    )
    return st.tuples(st.lists(change, max_size=3), st.lists(override, max_size=2)), written


def metrics_file(folder: Path) -> Target:
    path = folder / "metrics.jsonl"
    record = st.dictionaries(st.sampled_from(["step", "loss", "heldout_loss", "x"]), VALUE, max_size=4)
    line = st.one_of(
        record.map(lambda values: json.dumps(values).encode()), st.binary(max_size=40),
        st.sampled_from([b"[" * 3000, b'{"step":' * 999, b'{"step":1,"loss":NaN}', b'{"step":1,"loss":1e999}']),
    )  # fmt: skip

    def written(case: Any) -> Read:
        path.write_bytes(b"\n".join(case[0]))
        return lambda: read(case[1])

    def read(step: int) -> None:
        sum(record["loss"] for record in metrics.read_metrics(path) if report.is_loss(record.get("loss")))
        log = metrics.MetricsLog.open(path, step)
        log.write(step=step, loss=1.0)
        log.close()
        assert [found["step"] for found in metrics.read_metrics(path)][-1] == step

    return st.tuples(st.lists(line, max_size=6), st.integers(0, 9)), written


TARGETS = {
    "shard": shard, "structure": structure, "part": part, "manifest": manifest, "catalog": catalog,
    "tokenizer": tokenizer, "config": settings_file, "metrics": metrics_file,
}  # fmt: skip


def fuzz(target: str, cases: int, number: int, folder: Path) -> str:
    """Runs the cases of a target; returns how they ended, raises where one should not."""
    strategy, written = TARGETS[target](folder)
    ends: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=cases, database=None, deadline=None, phases=[Phase.generate], derandomize=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def every(case: Any) -> None:
        read = written(case)
        begin = time.process_time()
        try:
            read()
            end = "accepted"
        except MlmError as error:
            assert str(error).isprintable() and len(str(error)) < 2010, str(error)
            end = "refused"
        took = time.process_time() - begin
        assert took < CPU_S, f"{took:.1f} s"
        ends[end] += 1

    every()
    return f"{sum(ends.values())} cases, " + ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")


def main(words: list[str]) -> Iterator[str]:
    folder, number, cases = Path(words[1]), int(words[2]), int(words[3])
    limit = _address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for target in words[4:]:
        yield f"{target} begins"
        begin = time.perf_counter()
        yield f"{target}: {fuzz(target, cases, number, folder)} in {time.perf_counter() - begin:.1f} s"


if __name__ == "__main__":
    for said in main(sys.argv):
        print(said, flush=True)
