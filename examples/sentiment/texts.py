"""Snippets of film reviews as a table with labels, and texts without labels to learn a language from.

    python examples/sentiment/texts.py vaderSentiment-3.3.2.tar.gz FOLDER

writes FOLDER/reviews.tsv (text, label) and FOLDER/texts.jsonl. The archive is vaderSentiment's source distribution
(`pip download --no-deps --no-binary :all: vaderSentiment`), of which texts are read and nothing is run: snippets rated
by twenty people each (Hutto, Gilbert, ICWSM 2014). A review is `positive` or `negative` by the sign of its mean rating.
Without labels are those reviews which `prepare` will put on the training side, and all snippets of the other kinds:
products, newspapers, tweets.
"""

import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from mlm_mpi.data.sides import side_of
from mlm_mpi.data.text import clean

SEED, HELDOUT, TEST = 0, 0.1, 0.1  # what `prepare` has by default
_REVIEWS, _OTHERS = "movieReviewSnippets", ("amazonReviewSnippets", "nytEditorialSnippets", "tweets")


def snippets(archive: Path) -> Iterator[tuple[str, float, str]]:
    """(kind, mean rating, text) of every snippet."""
    with tarfile.open(archive) as outer:
        inside = next((name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz")), None)
        if inside is None:
            sys.exit(f"{archive} has no hutto_ICWSM_2014.tar.gz: give vaderSentiment's source distribution")
        packed = outer.extractfile(inside)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
            for kind in (_REVIEWS, *_OTHERS):
                file = inner.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
                assert file is not None
                for line in file.read().decode("utf-8", errors="replace").splitlines():
                    parts = re.split(r"\t", line, maxsplit=2)
                    if len(parts) == 3:
                        yield kind, float(parts[1]), " ".join(clean(parts[2]).text.split())


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "reviews.tsv").open("w") as reviews, (folder / "texts.jsonl").open("w") as texts:
        reviews.write("text\tlabel\n")
        for kind, rating, text in snippets(Path(sys.argv[1])):
            if kind == _REVIEWS and rating:
                reviews.write(f"{text}\t{'positive' if rating > 0 else 'negative'}\n")
            if kind != _REVIEWS or side_of(text, SEED, HELDOUT, TEST) == "train":
                texts.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
