"""Cleaning: what every document goes through before anything looks at it."""

import codecs
import re
import unicodedata
from dataclasses import dataclass

_NEWLINES = re.compile(r"\r\n?")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all of Unicode's Cc but \t and \n
_SURROGATES = re.compile("[\ud800-\udfff]")

# How bytes are decoded: each place that is not of the encoding becomes a lone surrogate, which `clean` counts.
MARK = "mlm_mpi.mark"
codecs.register_error(MARK, lambda error: ("\udfff", error.end))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Cleaned:
    """A document's text, and what had to be done to get it."""

    text: str
    replaced: int  # places that were not valid Unicode and became U+FFFD
    controls: int  # control characters taken out


def clean(raw: bytes | str) -> Cleaned:
    """Unicode NFC without control characters; line ends become \\n, a byte-order mark goes.

    What is not valid UTF-8 (or a lone surrogate in a str) becomes U+FFFD and is counted. Idempotent.
    """
    text, replaced = _SURROGATES.subn("\ufffd", raw.decode(errors=MARK) if isinstance(raw, bytes) else raw)
    text, controls = _CONTROLS.subn("", _NEWLINES.sub("\n", text))
    return Cleaned(unicodedata.normalize("NFC", text.lstrip("\ufeff")), replaced, controls)
