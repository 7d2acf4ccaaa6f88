"""Fortune files: short texts with a line `%` between them, each a document. A format is one file."""

from collections.abc import Iterator

from mlm_mpi.data.decoding import Content

SUFFIXES = (".fortune",)  # .fortune.gz and others are read too


def documents(content: Content) -> Iterator[str]:
    """The texts of one file, which is read whole."""
    for text in content.text().split("\n%\n"):
        yield text.strip("\n")
