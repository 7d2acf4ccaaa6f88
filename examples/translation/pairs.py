"""English messages and their French translations as a table: english, french, and the words of the English one.

    python examples/translation/pairs.py WHEEL ... > pairs.tsv

Needs JupyterLab's French language pack and Django (`pip install 'mlm-mpi[examples]'`), and takes wheels of other
programs besides (`pip download --no-deps`): of all their catalogues are read, and nothing is run. Placeholders are
numbered in the order of the English message, "{1}"; tags are left out. So are messages of which half or less are
letters, those with other placeholders in French, and all but the first translation of a message. Of messages with a
plural only the singular is taken: catalogues keep no English plural.

The third column is for splits: messages that differ in capitals or punctuation alone stand on one side.
"""

import gettext
import io
import itertools
import re
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

CATALOGUES = {
    "jupyterlab_language_pack_fr_FR": "locale/fr_FR/LC_MESSAGES/*.mo",
    "django": "**/locale/fr/LC_MESSAGES/*.mo",
}
_IN_WHEELS = re.compile(r"/fr(_FR)?/LC_MESSAGES/[^/]+\.mo$")
_WORD = re.compile(r"\w+")
_TAG = re.compile(r"<[^>]*>|&[a-z]+;")
_PLACEHOLDER = re.compile(r"%(?:\([^)]*\))?[-#0-9.]*[a-zA-Z]|%[0-9]+|\{[^}]*\}")


Catalogue = Iterator[tuple[str, str]]  # (English, French) of its messages


def of_package(package: str, pattern: str) -> Iterator[Catalogue]:
    """The catalogues of an installed package."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"{package} is not installed: pip install 'mlm-mpi[examples]'")
    for path in sorted(Path(spec.origin).parent.glob(pattern)):
        yield messages(path.read_bytes())


def of_wheel(path: str) -> Iterator[Catalogue]:
    """The French catalogues of a wheel. Exits where there is none, or one that cannot be read."""
    name = "it"
    try:
        with zipfile.ZipFile(path) as wheel:
            names = [*filter(_IN_WHEELS.search, sorted(wheel.namelist()))]
            for name in names:
                yield iter(list(messages(wheel.read(name))))
    except FileNotFoundError:
        sys.exit(f"{path} is not there: download it")
    except Exception as error:  # zipfile and gettext raise whatever a damaged file makes them stumble over
        sys.exit(f"{path} cannot be read, {name} is damaged ({error}): download it again")
    if not names:
        sys.exit(f"{path} has no French catalogue: leave it out")


def messages(content: bytes) -> Catalogue:
    """(English, French) of a catalogue."""
    catalogue = gettext.GNUTranslations(io.BytesIO(content))._catalog
    for key, french in sorted(catalogue.items(), key=str):
        english, number = key if isinstance(key, tuple) else (key, 0)
        if number == 0 and english:
            yield english.rpartition("\4")[2], french  # behind its context


def pair_of(english: str, french: str) -> tuple[str, str] | None:
    """Both in one line each, with numbered placeholders; None for a pair that is left out."""
    english, french = (_TAG.sub(" ", text) for text in (english, french))
    names = list(dict.fromkeys(_PLACEHOLDER.findall(english)))
    if set(_PLACEHOLDER.findall(french)) != set(names):
        return None
    numbers = {name: f"{{{number}}}" for number, name in enumerate(names, 1)}
    source, target = (
        " ".join(_PLACEHOLDER.sub(lambda found: numbers[found[0]], text).split()) for text in (english, french)
    )
    return (source, target) if all(2 * sum(map(str.isalpha, text)) > len(text) for text in (source, target)) else None


def main() -> None:
    pairs: dict[str, str] = {}
    installed = (catalogue for name, pattern in CATALOGUES.items() for catalogue in of_package(name, pattern))
    wheels = (catalogue for path in sys.argv[1:] for catalogue in of_wheel(path))
    for catalogue in itertools.chain(installed, wheels):
        for english, french in catalogue:
            pair = pair_of(english, french)
            if pair is not None:
                pairs.setdefault(*pair)
    print("english\tfrench\twords")
    for english, french in pairs.items():
        print(english, french, " ".join(_WORD.findall(english.lower())), sep="\t")


if __name__ == "__main__":
    main()
