"""`make train` says whether README lists the weights it ended with; and README's table can be read."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from listed_weights import main, verdict

TABLE = "text\n| Python | machine |\n|---|---|\n| 3.11 | x86_64 | `aa` | `11` |\n| 3.11 | x86_64 | `bb` | `22` |\n"


def test_the_verdicts():
    assert (
        verdict(TABLE, "3.11", "x86_64", "bb", "22")
        == "README lists these weights for Python 3.11 on x86_64 and this corpus"
    )
    assert verdict(TABLE, "3.11", "x86_64", "aa", "22").startswith(
        "NOT the weights that README lists for Python 3.11 on"
    )
    assert verdict(TABLE, "3.11", "x86_64", "cc", "22").endswith("with the corpus aa, this one is cc: not comparable")
    assert verdict(TABLE, "3.12", "x86_64", "aa", "11") == "README lists no weights for Python 3.12 on x86_64"


def test_a_run_that_was_stopped_is_not_judged(tmp_path, capsys):
    main("README.md", str(tmp_path), str(tmp_path))
    assert capsys.readouterr().out == ""


def test_the_readme_has_a_row_for_a_python_that_it_shows(tmp_path, capsys):
    readme = Path(__file__).parents[2] / "README.md"
    (shown,) = re.findall(r"^ +weights sha256 ([0-9a-f]{64})$", readme.read_text(), re.MULTILINE)
    (row,) = [line for line in readme.read_text().splitlines() if shown in line and line.startswith("| ")]
    python, machine, content, weights = (cell.strip(" `") for cell in row.split("|")[1:-1])
    assert re.fullmatch("[0-9a-f]{12}", content)
    assert verdict(readme.read_text(), python, machine, content, weights).startswith("README lists these weights")
