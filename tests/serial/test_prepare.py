"""`prepare` from end to end, alone: cleaning, splitting, same bytes, and what goes wrong."""

import gzip
import hashlib
import itertools
import json
import os
import platform
import shlex
import subprocess
from contextlib import contextmanager

import numpy as np
import pytest
from corpora import contents, in_a_process, run_prepare, sentences, write_texts

import mlm_mpi
from mlm_mpi import files
from mlm_mpi.data import arranging, prepare, tokenizing
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.shards import ShardReader
from mlm_mpi.data.stream import TokenStream
from mlm_mpi.errors import ConfigError, DataError


def documents(folder, split):
    """The texts of a split, decoded from its shards."""
    catalog = Catalog.open(folder)
    tokenizer = catalog.tokenizer()
    texts = []
    for shard in catalog.split(split):
        reader = ShardReader(folder / shard.entry.file, shard.entry, tokenizer.hash, tokenizer.vocab_size)
        offsets, tokens = reader.offsets().tolist(), reader.read(0, shard.entry.tokens).tolist()
        for a, b in itertools.pairwise(offsets):
            assert tokens[b - 1] == tokenizer.eot and tokenizer.eot not in tokens[a : b - 1]
            texts.append(tokenizer.decode(tokens[a : b - 1]))
        reader.close()
    return texts


@pytest.fixture
def source(tmp_path):
    return write_texts(tmp_path / "in")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_texts_come_back_in_order(source, tmp_path, capsys, kind):
    run_prepare(source, "--out", tmp_path / "out", "--tokenizer", kind, "--vocab", 300, "--shard-mib", 0.01)
    train, held = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "heldout")
    whole = [path.read_text() for path in sorted(source.iterdir())]
    assert sorted(train + held) == sorted(whole) and held
    assert train == [text for text in whole if text in set(train)]
    report = capsys.readouterr().out
    for word in (
        "documents",
        "duplicates",
        "near-duplicate clusters",
        "invalid UTF-8",
        "characters per token",
        "ready",
    ):
        assert word in report
    table = json.loads((tmp_path / "out" / "catalog.json").read_text())
    assert table["tokenizer"]["kind"] == kind
    total = table["totals"]["train"]
    assert total["characters"] == sum(map(len, train)) and total["documents"] == len(train)


def test_twice_gives_the_same_bytes_and_a_tokenizer_file_is_taken_over(source, tmp_path, capsys):
    arguments = ("--vocab", 300, "--shard-mib", 0.01)
    run_prepare(source, "--out", tmp_path / "a", *arguments)
    first = contents(tmp_path / "a")
    run_prepare(source, "--out", tmp_path / "b", *arguments)
    again = contents(tmp_path / "b")
    assert again.pop("prepared.json") != first["prepared.json"] and again.items() <= first.items()
    run_prepare(source, "--out", tmp_path / "a", *arguments)
    assert contents(tmp_path / "a") == first
    run_prepare(
        source, "--out", tmp_path / "c", "--tokenizer", next((tmp_path / "a").glob("tokenizer-*")), "--shard-mib", 0.01
    )
    other = contents(tmp_path / "c")
    assert {name for name in other if first.get(name) != other[name]} == {"catalog.json", "prepared.json"}


def test_stale_shards_go_and_the_output_is_no_input(source, tmp_path, capsys):
    out = source / "corpus"
    run_prepare(source, "--out", out, "--tokenizer", "bytes", "--shard-mib", 0.005)
    many = contents(out)
    (out / ".staging").mkdir()
    (out / ".staging" / "text-9.bin").write_bytes(b"left by a kill")
    (out / ".staging" / "pieces-9.bin").write_bytes(b"left by a kill")
    (out / ".staging" / "train-00000-0123abcd.h5.tmp").write_bytes(b"left by a kill")
    run_prepare(source, "--out", out, "--tokenizer", "bytes")
    few = contents(out)
    assert len(few) < len(many) and set(few) == {"catalog.json", "prepared.json"} | {
        Catalog.open(out).manifest.tokenizer.file
    } | {entry.file for entry in Catalog.open(out).manifest.shards}
    Catalog.open(out).check_files()


def test_json_lines_plain_and_compressed(tmp_path, capsys):
    texts = [sentences(seed, 50) for seed in range(12)]
    lines = "".join(json.dumps({"body": text, "id": n}) + "\n\n" for n, text in enumerate(texts))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.replace(" ", "  ").encode()))
    run_prepare(
        tmp_path / "*.jsonl*", "--out", tmp_path / "out", "--field", "body", "--heldout", 0, "--tokenizer", "bytes"
    )
    found = documents(tmp_path / "out", "train")
    assert found[:12] == texts and found[12:] == [text.replace(" ", "  ") for text in texts]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": \n', ("x.jsonl:2", "is not JSON")),
        (b'{"body": "a", "id": 1}\n{}\n', ("no line has a field 'text'", "x.jsonl:1", "'body, id'", "--field")),
        (b'{"text": "a"}\n{"text": 5}\n', ("x.jsonl:2", "a number in field 'text'", "--field")),
        (b'{"text": ["a"], "id": 1}\n', ("x.jsonl:1", "a list in field 'text'", "'id, text'", "--field")),
        (b'{"text": "a"}\nnull\n', ("x.jsonl:2", "null, not an object with a field 'text'")),
        (b"[1]\n", ("x.jsonl", "one JSON document")),
        (b'{"text": "a"}\n[1]\n', ("x.jsonl:2", "a list")),
    ],
)
def test_bad_json_lines(tmp_path, content, words):
    (tmp_path / "x.jsonl").write_bytes(content)
    refused(lambda: run_prepare(tmp_path / "x.jsonl", "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_lines_without_text_are_skipped_and_counted(tmp_path, capsys):
    missing = ['{"text": null}', "{}", '{"id": 1}', '{"text": ""}', ""]
    lines = [json.dumps({"text": sentences(seed, 30)}) for seed in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:2]))
    (tmp_path / "b.jsonl").write_text("\n".join([lines[2], *missing, lines[3], *missing]))
    (tmp_path / "c.jsonl").write_text("\n".join(missing))
    run_prepare(tmp_path, "--out", tmp_path / "out", "--heldout", 0, "--tokenizer", "bytes")
    report = capsys.readouterr().out
    assert f"\nskipped     9 lines without text in field 'text', first: {tmp_path}/b.jsonl:2\n" in report
    assert "documents   7 read, 4 kept" in report and "3 empty documents" in report
    assert documents(tmp_path / "out", "train") == [sentences(seed, 30) for seed in range(4)]
    run_prepare(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--heldout", 0, "--tokenizer", "bytes")
    assert "skipped" not in capsys.readouterr().out


def refused(action, *words, error=DataError):
    with pytest.raises(error) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_damaged_gzip(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 1000)[:-9])
    refused(lambda: run_prepare(tmp_path / "x.jsonl.gz", "--out", tmp_path / "out"), "cannot read", "x.jsonl.gz")


def test_invalid_utf8_duplicates_and_controls_are_counted(source, tmp_path, capsys):
    (source / "bad.txt").write_bytes(b"good \xff\xfe text \x07" + sentences(99, 50).encode())
    (source / "copy.txt").write_bytes((source / "doc003.txt").read_bytes().replace(b"\n", b"\r\n"))
    (source / "empty.txt").write_bytes(b" \n\x07\n")
    (source / "line.jsonl").write_bytes(b'{"text": "caf\xe9 \\ud800 ' + sentences(98, 50).strip().encode() + b'"}\n')
    run_prepare(source, "--out", tmp_path / "out", "--tokenizer", "bytes")
    cleaning = Catalog.open(tmp_path / "out").manifest.cleaning
    assert (cleaning.documents, cleaning.duplicates, cleaning.empty) == (44, 1, 1)
    assert (cleaning.invalid_utf8, cleaning.control_characters) == (4, 2)
    report = capsys.readouterr().out
    assert "4 invalid UTF-8" in report and "1 exact duplicates, 1 empty" in report
    texts = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "heldout")
    assert any("good \ufffd\ufffd text" in text for text in texts) and any("caf\ufffd \ufffd" in text for text in texts)


def test_near_identical_documents_stay_on_one_side(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(60):
        words = sentences(number, 80).split()
        for version in range(3):
            changed = [*words]
            changed[20 * (version + 1)] = f"version{version}"
            (folder / f"{version}-{number}.txt").write_text(f"doc{number} " + " ".join(changed))
    for seed in range(3):
        run_prepare(folder, "--out", tmp_path / "out", "--heldout", 0.3, "--seed", seed, "--tokenizer", "bytes")
        sides = [{text.split()[0] for text in documents(tmp_path / "out", split)} for split in ("train", "heldout")]
        assert not sides[0] & sides[1] and len(sides[1]) > 10
        cleaning = Catalog.open(tmp_path / "out").manifest.cleaning
        assert (cleaning.near_clusters, cleaning.near_documents) == (60, 180)


def test_heldout_fraction_is_met_and_depends_on_seed_not_on_names(source, tmp_path, capsys):
    chosen = []
    for seed in (0, 1):
        run_prepare(source, "--out", tmp_path / "out", "--heldout", 0.25, "--seed", seed, "--tokenizer", "bytes")
        catalog = Catalog.open(tmp_path / "out")
        held, train = catalog.characters("heldout"), catalog.characters("train")
        assert 0.22 < held / (held + train) <= 0.25
        chosen.append(set(documents(tmp_path / "out", "heldout")))
    assert chosen[0] != chosen[1]
    for number, path in enumerate(sorted(source.iterdir(), reverse=True)):
        path.rename(source / f"renamed{number:03d}.md")
    run_prepare(source, "--out", tmp_path / "out", "--heldout", 0.25, "--seed", 1, "--tokenizer", "bytes")
    assert set(documents(tmp_path / "out", "heldout")) == chosen[1]


def test_tokenizer_is_trained_on_the_training_side_only(source, tmp_path, capsys):
    run_prepare(source, "--out", tmp_path / "out", "--heldout", 0.25, "--vocab", 300)
    texts = documents(tmp_path / "out", "train")
    expected = prepare.Tokenizer.train(texts, 300)
    assert Catalog.open(tmp_path / "out").tokenizer().hash == expected.hash


def test_empty_and_unsplittable_corpora(tmp_path):
    (tmp_path / "none").mkdir()
    out = tmp_path / "out"
    refused(lambda: run_prepare(tmp_path / "none", "--out", out), "corpus is empty", "--builtin")
    (tmp_path / "blank.txt").write_text(" \n\t")
    refused(lambda: run_prepare(tmp_path / "blank.txt", "--out", out), "corpus is empty")
    refused(lambda: run_prepare(tmp_path / "nowhere.txt", "--out", out), "no input at", "nowhere.txt")
    (tmp_path / "one.txt").write_text(sentences(1, 100))
    for name in ("near", "by"):
        (tmp_path / f"{name}.txt").write_text(f"{sentences(1, 100)} {name}")
    given = (tmp_path / "near.txt", tmp_path / "by.txt", "--out", out)
    refused(lambda: run_prepare(*given), "--heldout 0.05", "2 in 1 group", "--heldout 0")
    refused(lambda: run_prepare("--out", out), "no input", error=ConfigError)
    refused(lambda: run_prepare("--builtin", "--out", out, "--heldout", 1), "--heldout 1.0", error=ConfigError)
    refused(lambda: run_prepare("--builtin", "--out", out, "--vocab", 9), "--vocab 9", error=ConfigError)
    refused(lambda: run_prepare(tmp_path / "one.txt"), "needs --out DIR", error=ConfigError)
    refused(lambda: run_prepare(tmp_path / "one.txt", "--out", out, "--tokenizer", "bep"), "'bep'", error=ConfigError)
    (tmp_path / "file").write_text("x")
    refused(lambda: run_prepare(tmp_path / "one.txt", "--out", tmp_path / "file"), "another --out")
    given = (tmp_path / "blank.txt", "--out", out, "--tokenizer", tmp_path / "file")
    refused(lambda: run_prepare(*given), "is not a tokenizer.json")  # before anything is read
    assert not out.exists()


def test_huge_documents_are_cut_for_the_tokenizer_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 1000)
    (tmp_path / "a.txt").write_text("\n".join(sentences(n, 30).strip() for n in range(40)))
    (tmp_path / "b.txt").write_text(sentences(77, 2000).replace(" ", "").strip())
    run_prepare(tmp_path / "*.txt", "--out", tmp_path / "out", "--heldout", 0, "--vocab", 300)
    assert documents(tmp_path / "out", "train") == [(tmp_path / f"{n}.txt").read_text() for n in "ab"]


def test_a_failing_shard_leaves_the_earlier_corpus(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run_prepare(source, "--out", out, "--tokenizer", "bytes", "--shard-mib", 0.005)
    before = contents(out)
    write = files._write_synced
    for name in ("train-00003", "catalog.json", "tokenizer-", "prepared.json", "replaced.json"):

        def full(path, content, name=name):
            if path.name.startswith(name):
                path.write_bytes(content[:10])
                raise OSError(28, "No space left on device")
            write(path, content)

        monkeypatch.setattr(files, "_write_synced", full)
        refused(lambda: run_prepare(source, "--out", out, "--vocab", 300, "--shard-mib", 0.003), "cannot write", name)
        assert contents(out) == before


def test_file_size_limit_ends_with_one_line(source, tmp_path):
    done = in_a_process(source, "--out", tmp_path / "out", "--tokenizer", "bytes", limit_bytes=10_000)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("mlm-mpi: cannot write") and str(tmp_path / "out") in done.stderr
    assert not (tmp_path / "out").exists()


@contextmanager
def small_disk(folder, size_kib):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size_kib", [16, 40, 76, 100, 140])
def test_full_disk_ends_with_one_line(source, tmp_path, size_kib):
    """30 KiB of text: the disk is full at the spool, at a shard or at the tokenizer, or is just large enough."""
    with small_disk(tmp_path / "disk", size_kib) as disk:
        done = in_a_process(source, "--out", disk / "out", "--vocab", 400, "--shard-mib", 0.003)
        if done.returncode == 0:
            Catalog.open(disk / "out").check_files()
            assert size_kib == 140
        else:
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert "No space left on device" in done.stderr and "cannot" in done.stderr
            assert not (disk / "out").exists()


def test_stream_of_the_corpus_is_the_documents(source, tmp_path, capsys):
    run_prepare(source, "--out", tmp_path / "out", "--tokenizer", "bytes", "--shard-mib", 0.004)
    stream = TokenStream(Catalog.open(tmp_path / "out"), "train")
    expected = [[*text.encode(), 256] for text in documents(tmp_path / "out", "train")]
    assert np.array_equal(stream.read(0, stream.tokens), np.concatenate(expected))


def test_content_is_of_tokens_and_borders_however_they_are_stored(source, tmp_path, capsys):
    out = tmp_path / "out"
    digests = []
    for words in (("--shard-mib", 0.004), ("--shard-mib", 1), ("--seed", 1), ("--vocab", 300)):
        kind = () if "--vocab" in words else ("--tokenizer", "bytes")
        run_prepare(source, "--out", out, "--heldout", 0.25, *words, *kind)
        catalog = Catalog.open(out)
        tokenizer, whole = catalog.tokenizer(), hashlib.sha256()
        whole.update(tokenizer.hash.encode())
        for split in ("train", "heldout"):
            part = hashlib.sha256()
            for text in documents(out, split):
                ids = np.array([*tokenizer.encode(text), tokenizer.eot], "<u4")
                part.update(hashlib.sha256(ids.tobytes()).digest())
            whole.update(part.digest())
        assert catalog.manifest.content == whole.hexdigest()
        assert capsys.readouterr().out.endswith(f" s, content {whole.hexdigest()[:12]}\n")
        digests.append(whole.hexdigest())
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_the_command_is_written_down_and_makes_the_same_again(source, tmp_path, capsys):
    out = tmp_path / "the corpus"
    run_prepare("--shard-mib", 0.01, source, "--out", out, "--seed", 3, "--vocab", 300, "--field=-x", "--heldout", 0.25)
    prepared = json.loads((out / "prepared.json").read_text())
    assert prepared == {
        "command": f"mlm-mpi prepare {source} --out '{out}' "
        "--vocab 300 --heldout 0.25 --field=-x --shard-mib 0.01 --seed 3",
        "python": platform.python_version(),
        "mlm_mpi": mlm_mpi.__version__,
        "content": Catalog.open(out).manifest.content,
    }  # fmt: skip
    assert prepared["command"] in (out / "prepared.json").read_text().splitlines()[1]
    first = contents(out)
    run_prepare(*shlex.split(prepared["command"])[2:])
    assert contents(out) == first


@pytest.mark.parametrize(
    ("words", "say"),
    [
        (("--vocab", 2**64), "--vocab 18446744073709551616 must be in [257, 1048576]"),
        (("--vocab", 2**31), "--vocab 2147483648 must be in"),
        (("--vocab", -1), "--vocab -1 must be in"),
        (("--shard-mib", "nan"), "--shard-mib nan must be in [0, 4096]"),
        (("--shard-mib", "inf"), "--shard-mib inf"),
        (("--shard-mib", 1e6), "--shard-mib 1000000.0"),
        (("--heldout", "nan"), "--heldout nan must be in [0, 1)"),
        (("--heldout", "-0.1"), "--heldout -0.1"),
        (("--heldout", 5), "--heldout 5.0 must be in [0, 1): 5 % is 0.05"),
        (("--seed", -1), "--seed -1 must be in [0, 9223372036854775807]"),
        (("--seed", 2**64), "--seed 18446744073709551616"),
        (("--field", ""), "--field ''"),
    ],
)
def test_values_out_of_bounds_are_one_line(tmp_path, words, say):
    refused(lambda: run_prepare("--builtin", "--out", tmp_path / "out", *words), say, error=ConfigError)
    assert not (tmp_path / "out").exists()


def test_a_corpus_inside_an_input_folder_is_no_input(source, tmp_path, capsys):
    """Its catalog was taken for a text, and refused as JSON."""
    run_prepare(source, "--out", source / "corpus")
    run_prepare(source, "--out", tmp_path / "again")
    first, second = (Catalog.open(folder).manifest.content for folder in (source / "corpus", tmp_path / "again"))
    assert first == second


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [("inptu.txt", "input.txt"), ("INPUT.TXT", "input.txt"), ("Texte/deep/a.txt", "texts/deep/a.txt"), ("x", None)],
)
def test_a_mistyped_path_is_answered_with_the_near_one(tmp_path, mistyped, meant):
    (tmp_path / "input.txt").write_text("a")
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        run_prepare(tmp_path / mistyped, "--out", tmp_path / "out")
    said = str(caught.value)
    assert f"(did you mean {str(tmp_path / meant)!r}?)" in said if meant else "mean" not in said
    with pytest.raises(DataError, match="download it first"):
        run_prepare("https://example.org/input.txt", "--out", tmp_path / "out")


def test_progress_goes_from_nothing_to_all_of_each_phase(tmp_path, capsys, monkeypatch):
    seen = []

    class Bar:
        drawn = True

        def __init__(self, what):
            seen.append((what, 0, 0, ""))

        def update(self, done, total, text):
            seen.append((seen[-1][0], done, total, text))

        def close(self):
            seen.append((seen[-1][0], None, None, "closed"))

    monkeypatch.setattr("mlm_mpi.commands.prepare.live", Bar)
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 5000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "long.txt").write_text("".join(sentences(n, 100) for n in range(40)))
    (tmp_path / "in" / "more.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": sentences(99, 9000)}).encode()))
    run_prepare(tmp_path / "in", "--out", tmp_path / "out", "--vocab", 300, "--shard-mib", 0.01)
    phases = ["cleaning", "cutting", "tokenizer", "shards"]
    assert list(dict.fromkeys(name for name, *_ in seen)) == phases
    for phase in phases:
        told = [(done, total) for name, done, total, text in seen if name == phase and text not in ("", "closed")]
        assert len(told) > 2 and told == sorted(told) and len({total for _, total in told}) == 1
        assert told[-1][0] >= 0.8 * told[-1][1] and 0 <= told[0][0] <= 0.5 * told[0][1]
        assert [text for name, *_, text in seen if name == phase][-1] == "closed"
    size = sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    assert [total for name, _, total, _ in seen if name == "cleaning"][1] == size
    before = len(seen)
    (tmp_path / "in" / "a.pdf").write_bytes(b"%PDF-1.7")
    refused(lambda: run_prepare(tmp_path / "in", "--out", tmp_path / "out"), "leave it out by a glob")
    assert seen[before:][-1][3] == "closed"


def test_more_shards_than_can_be_read_are_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(arranging, "_MOST_SHARDS", 9)
    refused(lambda: run_prepare(source, "--out", tmp_path / "out", "--shard-mib", 1e-6), "40 shards", "at most 9")
    assert not (tmp_path / "out").exists()
