"""Pairs of texts: tables and aligned files, what is left out and reported, rows of micro-batches, what is refused."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from corpora import run_prepare

from mlm_mpi.config.reader import load
from mlm_mpi.data import labelling
from mlm_mpi.data.labelled import Example, Labelled
from mlm_mpi.data.sides import side_of
from mlm_mpi.data.translation import TextPairs, pair_of, too_long
from mlm_mpi.errors import ConfigError, DataError
from mlm_mpi.plug import Plugins
from mlm_mpi.tasks.translation import Translation

PAIRS = [(f"the red house {number}", f"la maison rouge {number}") for number in range(60)]


def prepared(folder: Path, *words: object) -> Labelled:
    run_prepare(*words, "--out", folder, "--tokenizer", "bytes")
    return Labelled.open(folder, kind="pairs")


def table(path: Path, pairs: list[tuple[str, str]]) -> Path:
    lines = [f"{source}\t{target}\n" for source, target in [("en", "fr"), *pairs]]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def aligned(folder: Path, pairs: list[tuple[str, str]]) -> tuple[Path, Path]:
    """Two files of lines."""
    paths = folder / "texts.en", folder / "texts.fr.gz"
    sources, targets = ("".join(f"{line}\n" for line in lines) for lines in zip(*pairs, strict=True))
    paths[0].write_text(sources)
    paths[1].write_bytes(gzip.compress(targets.encode()))
    return paths


def test_a_table_json_lines_and_aligned_files_are_one_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"en": a, "fr": b}) for a, b in PAIRS))
    found = [
        prepared(tmp_path / "tsv", table(tmp_path / "a.tsv", PAIRS), "--text", "en", "--target", "fr"),
        prepared(tmp_path / "json", tmp_path / "a.jsonl", "--text", "en", "--target", "fr"),
        prepared(tmp_path / "lines", "--aligned", *aligned(tmp_path, PAIRS)),
    ]
    assert len({(one.content, one.split_digest, one.tokenizer().hash) for one in found}) == 1
    tokenizer, whole = found[0].tokenizer(), {}
    for split in found[0].splits:
        examples = found[0].examples(split)
        for number in range(len(examples)):
            ids, second, label = examples.read(number)
            source, target = (tokenizer.decode(part.tolist()) for part in np.split(ids, [second]))
            assert label == 0 and split == side_of(source, 0, 0.1, 0.1)
            whole[source] = target
    assert whole == dict(PAIRS)


def test_what_is_left_out_is_counted_with_its_first_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = [("", "rien"), ("nothing", " "), PAIRS[0], ("a b", "x" * 28), ("a b c", "y" * 27), (PAIRS[1][0], "autre")]
    path = table(tmp_path / "a.tsv", [*PAIRS, *odd])
    found = prepared(tmp_path / "out", path, "--text", "en", "--target", "fr", "--heldout", 0, "--test", 0)
    report = capsys.readouterr().out.splitlines()
    assert report[:3] == [
        "rows        66 read, 62 kept",
        f"removed     1 exact duplicates (text and target), 2 empty texts, first: {path}:62",
        f"skipped     1 pairs of a text and one over 9 times as long, first: {path}:65",
    ]
    assert (found.manifest.cleaning.unpaired, found.manifest.cleaning.out_of_ratio) == (2, 1)
    assert found.manifest.counts == {"train": (62,)} and found.labels == ()
    assert "labels" not in (tmp_path / "out" / "catalog.json").read_text().replace('"labels": []', "")


def test_sides_of_aligned_files_are_given_before_the_first(tmp_path: Path) -> None:
    source, target = aligned(tmp_path, PAIRS)
    (tmp_path / "h.en").write_text("a new one\n")
    (tmp_path / "h.fr").write_text("une nouvelle\n")
    words = ("--aligned", f"train={source}", target, "--aligned", f"dev={tmp_path / 'h.en'}", tmp_path / "h.fr")
    assert prepared(tmp_path / "out", *words).manifest.counts == {"train": (60,), "heldout": (1,)}


def refused(call, *words: str, error: type[Exception] = DataError) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize(("lines", "longer", "shorter"), [((3, 2), "a", "b"), ((2, 4), "b", "a"), ((0, 1), "b", "a")])
def test_files_of_unequal_length_name_the_first_line_without_a_partner(
    tmp_path: Path, lines: tuple[int, int], longer: str, shorter: str
) -> None:
    for name, count in zip("ab", lines, strict=True):
        (tmp_path / name).write_text("a line\n" * count)
    least = min(lines)
    line = (
        f"{tmp_path / longer}:{least + 1} has no partner, {tmp_path / shorter} ends with line {least}: mend the files"
    )
    refused(lambda: prepared(tmp_path / "out", "--aligned", tmp_path / "a", tmp_path / "b"), line)
    assert not (tmp_path / "out").exists()


BAD_WORDS = {
    "two kinds": (("x.tsv", "--target", "fr", "--label", "l"), "--label and --target make different things"),
    "tables too": (("x.tsv", "--aligned", "a", "b"), "'x.tsv' is given too"),
    "a column of lines": (("--aligned", "a", "b", "--text", "en"), "--text is of tables"),
    "a pair": (("x.tsv", "--target", "fr", "--pair", "p"), "--pair is a second text to tell a label of"),
    "one column": (("x.tsv", "--text", "fr", "--target", "fr"), "are both column 'fr'"),
    "ratio": (("x.tsv", "--target", "fr", "--ratio", 0.5), "--ratio 0.5 must be 1 or more, or 0"),
    "ratio alone": (("x.tsv", "--ratio", 3), "--ratio is for pairs of texts"),
    "builtin": (("--builtin", "--target", "fr"), "--builtin has no targets"),
    "some sides": (("--aligned", "train=a", "b", "--aligned", "c", "d"), "some inputs have a side"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_command_lines(tmp_path: Path, case: str) -> None:
    words, line = BAD_WORDS[case]
    refused(lambda: run_prepare(*words, "--out", tmp_path / "out"), line, error=ConfigError)
    assert not (tmp_path / "out").exists()


def test_bad_pairs_and_other_folders_are_one_line(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", [("a", "")])
    refused(
        lambda: prepared(tmp_path / "out", path, "--text", "en", "--target", "fr"), "no row has a text and a target"
    )
    path = table(tmp_path / "a.tsv", [("a", "b" * 20)])
    refused(lambda: prepared(tmp_path / "out", path, "--text", "en", "--target", "fr"), "or --ratio above 9")
    prepared(tmp_path / "pairs", table(tmp_path / "b.tsv", PAIRS), "--text", "en", "--target", "fr")
    refused(
        lambda: Labelled.open(tmp_path / "pairs"),
        "has pairs of texts, not labels of texts",
        'task.kind = "translation"',
    )
    (tmp_path / "c.csv").write_text("text,label\n" + "".join(f"text {n},{n % 2}\n" for n in range(60)))
    run_prepare(tmp_path / "c.csv", "--label", "label", "--tokenizer", "bytes", "--out", tmp_path / "labels")
    refused(lambda: Labelled.open(tmp_path / "labels", kind="pairs"), "has labels of texts, not pairs of texts")


def test_a_pair_as_a_model_reads_it() -> None:
    example = Example(np.array([5, 6, 7, 8, 9], np.int32), 2, 0)
    source, read, wanted = (array.tolist() for array in pair_of(example, 8, 0))
    assert (source, read, wanted) == ([5, 6, 0], [0, 7, 8, 9], [7, 8, 9, 0])
    source, read, wanted = (array.tolist() for array in pair_of(example, 2, 0))
    assert (source, read, wanted) == ([5, 6], [0, 7], [7, 8]), "cut, and no end is made up"


def test_micro_batches_are_pairs_in_rows_the_shortest_first(tmp_path: Path) -> None:
    some = [("aaaa", "bb"), ("a", "bbb"), ("a", "b"), ("aaaa", "b")]
    found = prepared(
        tmp_path / "out", table(tmp_path / "a.tsv", some), "--text", "en", "--target", "fr", "--heldout", 0, "--test", 0
    )
    examples = found.examples("train")
    made = TextPairs(examples, 16, found.tokenizer().eot).batch([3, 2, 1, 0], 7, 2)
    assert made.texts == (2, 6, 8, 11) and made.source.texts == (2, 4, 9, 14) and made.count == 11
    assert made.inputs["ids"].shape == (1, 16) == made.source.inputs["ids"].shape
    assert made.inputs["places"][0, :11].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert made.targets["mask"].sum() == 11 and made.targets["ids"].dtype == np.int32
    assert (made.targets["ids"][0, :10] == made.inputs["ids"][0, 1:11])[[0, 2, 3, 4, 6, 8, 9]].all()
    assert too_long(examples, 5) == (0, 5) and too_long(examples, 4) == (2, 5)


def test_pairs_that_do_not_fit_are_refused_or_cut(tmp_path: Path) -> None:
    prepared(tmp_path / "out", table(tmp_path / "a.tsv", PAIRS), "--text", "en", "--target", "fr")
    words = ("task.kind=translation", "model.kind=encoder_decoder", f"data.dir={tmp_path / 'out'}", "model.context=18")
    task = Translation(load(None, words), Plugins())
    refused(
        lambda: task.samples("train"), "do not fit model.context = 18, the longest side needs 19: set model.context"
    )
    cut = Translation(load(None, [*words, "task.too_long=cut"]), Plugins())
    assert "are cut, the longest side has 19 tokens" in cut.notes()[0][1]
    assert max(np.diff((0, *cut.samples("train").batch(range(20), 0, 0).texts))) == 18


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("task.kind=translation",), 'model.kind = "gpt" does not read several texts a row and a source text'),
        (("task.kind=translation", "model.kind=bert"), 'does not read a source text, which task.kind = "translation"'),
        (("model.kind=encoder_decoder",), 'model.kind = "encoder_decoder" reads a source text, which task.kind'),
    ],
)
def test_models_and_tasks_that_do_not_go_together(words: tuple[str, ...], line: str) -> None:
    refused(lambda: load(None, words), line, error=ConfigError)


def test_a_hint_comes_from_other_pairs(tmp_path: Path) -> None:
    """A word that one training pair alone has is a hint to texts that are held out, and none to that pair."""
    some = [("the house", "la maison"), ("house", "maison"), ("the red", "la rouge")]
    rows = [(f"{en} {number}", f"{fr} {number}", "train") for en, fr in some for number in range(20)]
    rows += [("the odd house", "la maison bizarre", "train"), ("odd red", "rouge bizarre", "heldout")]
    path = tmp_path / "a.tsv"
    path.write_text("en\tfr\tside\n" + "".join("\t".join(row) + "\n" for row in rows))
    found = prepared(tmp_path / "out", path, "--text", "en", "--target", "fr", "--split", "side", "--hints")
    decode, eot = found.tokenizer().decode, found.tokenizer().eot
    hints = {}
    for split in found.splits:
        for ids, second, _ in map(found.examples(split).read, range(len(found.examples(split)))):
            (end,) = np.flatnonzero(ids == eot)
            hints[decode(ids[end + 1 : second].tolist())] = decode(ids[:end].tolist())
    assert hints["the odd house"] == "la odd maison" and hints["odd red"] == "bizarre rouge"
    assert hints["the red 3"] == "la rouge 3" and found.manifest.hints["odd"] == "bizarre"
    plain = prepared(tmp_path / "plain", path, "--text", "en", "--target", "fr", "--split", "side")
    assert plain.content != found.content and "hints" not in (tmp_path / "plain" / "catalog.json").read_text()


def test_a_dictionary_that_does_not_fit_this_machine_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelling, "BYTES_A_MEETING", 1 << 40)
    path = table(tmp_path / "a.tsv", PAIRS)
    words = (path, "--text", "en", "--target", "fr", "--hints")
    refused(
        lambda: prepared(tmp_path / "out", *words), "--hints: words of the training pairs meet ", "leave long texts"
    )
    assert not (tmp_path / "out" / "catalog.json").exists()


def test_a_side_without_words_has_no_dictionary(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", [(f"word {number}", "!" * (number + 3)) for number in range(30)])
    line = "no pair on side train has words in both of its texts"
    refused(lambda: prepared(tmp_path / "out", path, "--text", "en", "--target", "fr", "--hints"), line)
