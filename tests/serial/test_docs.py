"""README, DESIGN and docs/: links lead to files and headings that are there, and commands exist.

`make docs` builds the pages, and finds what this finds of links again.
"""

import re
import shlex
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from mlm_mpi.__main__ import COMMANDS, command
from mlm_mpi.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "DESIGN.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)
TARGET = re.compile(r"^([a-z][a-z%-]*):", re.MULTILINE)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def prose(text: str) -> str:
    """A page without its code: there a bracket is no link and # no heading."""
    text = FENCE.sub("", text)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "code", text)


def code(text: str) -> Iterator[str]:
    """Every line of code of a page, and every piece of code within a line."""
    for language, block in FENCE.findall(text):
        if not language.startswith("{"):
            yield from block.splitlines()
    text = FENCE.sub("", text)
    yield from re.findall(r"^    (.*)$", text, re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


def anchors(page: Path) -> set[str]:
    """The names by which its headings are found: small letters, no punctuation, hyphens for spaces."""
    text = re.sub(r"^    .*$", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


def missing_links(page: Path) -> list[str]:
    missing = []
    for link in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    return missing


def unknown_commands(text: str) -> list[str]:
    """What `make` and `mlm-mpi` are asked for on a page and do not have."""
    targets = [target.replace("%", r"\d+") for target in TARGET.findall((ROOT / "Makefile").read_text())]
    unknown = []
    for line in code(text):
        for wanted in re.findall(r"(?:^|[;&|(] *)(?:\$ )?make ([a-z][\w-]*)(?![\w=])", line):
            if not any(re.fullmatch(target, wanted) for target in targets):
                unknown.append(f"make {wanted}")
        wanted = re.findall(r"\bmlm-mpi ([a-z]\w*)", line)
        wanted += re.findall(r"\bmlm-mpi run\b.*? -- ([a-z]\w*)", line)
        unknown += [f"mlm-mpi {name}" for name in wanted if name not in (*COMMANDS, "help")]
    return unknown


def refused_commands(text: str) -> list[str]:
    """What `mlm-mpi` says of whole commands that a page shows, but for those that it leaves open."""
    lines = re.findall(r"^ *(?:\$ )?mlm-mpi ([a-z].*)$", FENCE.sub(r"\2", text).replace("\\\n", ""), re.MULTILINE)
    refused = []
    for line in lines:
        name, *words = shlex.split(line.partition(" | ")[0], comments=True)
        if name in COMMANDS and "…" not in words:
            try:
                args = command(name)[0].parse(words)
                if name == "run":
                    inner, *rest = args.words[1:]
                    command(inner)[0].parse(rest)
            except ConfigError as error:
                refused.append(str(error))
    return refused


@every_page
def test_links_lead_to_files_and_headings_that_are_there(page: Path):
    assert missing_links(page) == []


@every_page
def test_commands_exist(page: Path):
    assert unknown_commands(page.read_text(encoding="utf-8")) == []


@every_page
def test_commands_have_these_options(page: Path):
    assert refused_commands(page.read_text(encoding="utf-8")) == []


def test_the_checks_see_what_is_wrong(tmp_path: Path):
    """A page with one fault of each kind, and code that only looks like one."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, and c\n[here](#a-b-and-c) [no](#d) [file](page.md#a-b-and-c) [gone](gone.md) [web](https://x.y)\n"
        "`[a](b)` `make train` `make nonsense` `make test-7`\n\n    mlm-mpi run -n 2 -- trian x; make RANKS=1 train\n"
        "```text\nmlm-mpi doctr\nmake lint && make lintt\nmake it so\n```\n"
    )
    assert missing_links(page) == ["#d", "gone.md"]
    assert sorted(unknown_commands(page.read_text())) == [
        "make it", "make lintt", "make nonsense", "mlm-mpi doctr", "mlm-mpi trian",
    ]  # fmt: skip
    page.write_text(
        "    mlm-mpi generate r --temprature 1\n\n    mlm-mpi run -n 2 -- train c.toml --run r --sets a.b=1  # x\n"
    )
    assert [said.partition(":")[0] for said in refused_commands(page.read_text())] == ["generate", "train"]


def test_the_tutorial_shows_the_digests_of_its_files():
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    shown = re.findall(r'"(\w+/\w+\.py)": "([0-9a-f]+)…"', text)
    shown += re.findall(r"with (\w+/\w+\.py) of SHA-256 (\w+)", text)
    assert len(shown) == 3
    for name, digest in shown:
        assert sha256((ROOT / "docs" / "mine" / name).read_bytes()).hexdigest().startswith(digest), name


def test_no_page_has_a_hole():
    assert [page.name for page in PAGES if "COMPLETE:" in page.read_text(encoding="utf-8")] == []
