"""Messages of Django in twenty languages as a table: text, language, and the English message that it translates.

    python examples/language-id/texts.py > messages.tsv

Needs Django (`pip install 'mlm-mpi[examples]'`), of which the catalogues are read and nothing is run. Messages of which
half or less are letters, of fewer than eight bytes, or that several languages share, tell no language and are left out.
"""

import gettext
import re
import sys
from importlib.util import find_spec
from pathlib import Path

LANGUAGES = (
    *("ar", "cs", "da", "de", "el", "es", "fi", "fr", "hu", "it"),
    *("ja", "ko", "nl", "nb", "pl", "pt", "ru", "sv", "tr", "uk"),
)
SHORTEST = 8  # bytes
_PLACEHOLDER = re.compile(r"%(\([^)]*\))?[-#0-9.]*[a-zA-Z]|\{[^}]*\}|<[^>]*>|&[a-z]+;")


def messages(folder: Path, language: str) -> dict[str, str]:
    """English message -> its translation, from every catalogue of a language."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob(f"**/locale/{language}/LC_MESSAGES/*.mo")):
        with open(path, "rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog
        for key, translated in sorted(catalogue.items(), key=str):
            english = key[0] if isinstance(key, tuple) else key
            text = " ".join(_PLACEHOLDER.sub(" ", translated).split())
            source = " ".join(english.rpartition("\4")[2].split())  # behind its context
            letters = sum(map(str.isalpha, text))
            if source and text != source and 2 * letters > len(text) and len(text.encode()) >= SHORTEST:
                found.setdefault(source, text)
    return {source: text for text, source in {text: source for source, text in found.items()}.items()}  # each once


def main() -> None:
    spec = find_spec("django")
    if spec is None or spec.origin is None:
        sys.exit("Django is not installed: pip install 'mlm-mpi[examples]'")
    tables = {language: messages(Path(spec.origin).parent, language) for language in LANGUAGES}
    languages: dict[str, set[str]] = {}
    for language, table in tables.items():
        for text in table.values():
            languages.setdefault(text, set()).add(language)
    print("text\tlanguage\tenglish")
    for language, table in tables.items():
        for english, text in table.items():
            if len(languages[text]) == 1:
                print(f"{text}\t{language}\t{english}")


if __name__ == "__main__":
    main()
