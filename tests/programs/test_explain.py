"""`mlm-mpi explain` as a program: a page and a picture, or one line and nothing."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mlm_mpi.__main__ import command
from mlm_mpi.errors import ConfigError


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_page_and_a_picture(home, straight, say, tmp_path: Path) -> None:
    done = say("explain", home.folder / "straight", "a text", "--out", tmp_path / "look.html")
    assert done.code == 0, done.err
    assert files(tmp_path) == ["look.html", "look.png"]
    page = (tmp_path / "look.html").read_text(encoding="utf-8")
    assert '"tokens":["\\u25a0","a"," ","t","e","x","t"]' in page and "straight, step 6" in page
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == [
        "model", "question", "answer", "explained", "attributions", "attention",
    ]  # fmt: skip
    total, difference = (float(lines[4].split()[place]) for place in (1, 4))
    assert abs(total - difference) < 1e-3
    again = say("explain", home.folder / "straight", "a text", "--out", tmp_path / "look.html")
    assert again.code == 2 and again.err.endswith("look.html is there already: remove it, or give another --out\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("", "--out", "look.html"), "TEXT is empty: give some words"),
        (("\x00", "--out", "look.html"), "the text is empty: give some words"),
        (("x" * 16, "--out", "look.html"),
         "the text has 16 tokens, there is room for 15 (model.context = 16): shorten it"),
        (("x", "--out", "look.png"), "--out 'look.png' is no .html file in a folder that exists: give another path"),
        (("x", "--out", "no/look.html"), "--out 'no/look.html' is no .html file in a folder that exists: give another"),
        (("x", "--out", "look.html", "--layer", "2"), "--layer 2 is none of straight: give 1 to 1"),
        (("x", "--out", "look.html", "--head", "3"), "--head 3 is none of layer 1: give 1 to 2, or 0 for their mean"),
        (("x", "--out", "look.html", "--at", "2"), "--at 2 is no token of the text, which has 1: 1 'x'"),
        (("x", "--out", "look.html", "--target", "no"), "--target 'no' is 2 tokens of this model: give one of 'n', "),
        (("x", "--out", "look.html", "--steps", "31"), "--steps 31 must be at least 32 and at most 1048576"),
        (("x", "--out", "look.html", "--pair", "y"), "--pair is of classifiers of pairs, and straight is none"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(home, straight, say, tmp_path: Path, monkeypatch, words, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "straight").symlink_to(home.folder / "straight")
    done = say("explain", "straight", *words)
    assert done.code == 2 and done.out == "" and done.err.startswith(f"mlm-mpi: {line}") and done.err.count("\n") == 1
    assert files(tmp_path) == ["straight"]


def test_several_ranks_are_one_too_many() -> None:
    parser, module = command("explain")
    args = parser.parse(["run", "x", "--out", "look.html"])
    with pytest.raises(ConfigError, match="the work of one rank, the launcher gave 3: start it without mlm-mpi run"):
        module.main(args, SimpleNamespace(size=3))
