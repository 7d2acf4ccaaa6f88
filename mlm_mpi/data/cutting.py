"""One long text as several documents: where it is cut, and which of them lie in its tail, to be held out.

A random choice among neighbours would show the model what comes before and after each of them; a tail has one
neighbour. A border is the best that lies near where one is wanted: a heading, else a blank line, a line end, the end
of a sentence, a space, and where there is none of these, any two characters.
"""

import enum
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

PIECE = 5_000  # characters, about: two pages of a book
LEAST_HELD_OUT = 500  # characters; a loss over less says little
_CHAPTER = 50_000  # characters of a chapter that stays whole
_LEAST = 1_000  # characters of a chapter: headings with less between them are one, or a table of contents
_DEEPEST = 3  # headings of one place: of a volume, a book and a chapter
_LICENCE_WITHIN = 1 << 16  # characters from the end of a text; it has 19,000

_NUMBER = r"(?:\d{1,4}\b|[IVXLCDM]+\b|[^\W\d_a-zа-яß-öø-ÿ])"  # or a word with a capital letter
_DIVISION = (
    "chapter|book|part|volume|act|scene|canto|stave|letter|section|kapitel|buch|teil|akt|aufzug|szene|auftritt|brief|"
    "chapitre|livre|partie|acte|scène|chant|lettre|capítulo|libro|parte|acto|escena|capitolo|atto|scena|hoofdstuk|"
    "deel|kapitola|rozdział|глава|часть|книга|том"
)
_HEADING = (
    rf"(?i:{_DIVISION})[ .:]+{_NUMBER}[^\n]{{0,60}}"
    rf"|[^\W\d_]\w{{1,20}}\.? (?i:{_DIVISION})\.?"  # Erstes Kapitel
    r"|(?i:prolog(?:ue)?|epilog(?:ue)?|preface|foreword|introduction|conclusion|vorwort|nachwort|préface)\.?"
    r"|\d{1,3}\.|[IVXLCDM]{1,8}\.?"  # digits alone number pages
    r"|第[0-9０-９一二三四五六七八九十百千零〇两]{1,9}[章回卷節节部][^\n]{0,60}"
    r"|\#{1,3} [^\n]{1,80}(?=\n[^\S\n]*+\n)"  # Markdown; a comment in a program has no blank line behind it
)
_BLANK_LINES = r"(?<=\S)[^\S\n]*+\n(?:[^\S\n]*+\n)++"  # tried once in a run of them: time stays linear
# (what is there, what a border lies behind), the best first
_BORDERS = [
    ("chapters", re.compile(rf"(?:\A|{_BLANK_LINES})(?=[^\S\n]*+(?:{_HEADING})[^\S\n]*+\n)")),
    ("blank lines", re.compile(_BLANK_LINES)),
    ("line ends", re.compile(r"\n")),
    ("sentence ends", re.compile(r"(?<=\S)[.!?…]['\"”’»)\]]*\s|[。！？][」』”’）]*")),
    ("spaces", re.compile(r"\s")),
    ("fixed lengths", re.compile(r"(?s:.)")),
]
_LICENCE = re.compile(r"^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK", re.MULTILINE)
_JOINERS = {"\u200c", "\u200d"}


class Side(enum.IntEnum):
    """Where a document was in the text that it was cut from."""

    WHOLE = 0  # it was not cut
    BODY = 1
    TAIL = 2
    LICENCE = 3  # Project Gutenberg's, behind the tail


@dataclass(frozen=True)
class Piece:
    """Characters start … stop − 1 of a text. `border`: what it begins at, an index of `border_names`."""

    start: int
    stop: int
    side: Side
    border: int


def border_names() -> list[str]:
    """What a text may be cut at."""
    return [name for name, _ in _BORDERS]


def cut(text: str, fraction: float) -> list[Piece]:
    """The documents of a text in their order; about `fraction` of its characters are in the tail.

    Each begins and ends with a line, or within one where lines are long; no space is lost but at borders.
    """
    headings = _headings(text)
    end = _end(text)
    tail = end
    edges = [(0, 0)]  # (place, what is there)
    if fraction:
        wanted = max(1, round(fraction * end))
        tail, border = _border(text, end - wanted, wanted // 4, headings)
        edges.append((tail, border))
    if end < len(text):
        edges.append((end, 2))
    found = []
    for (start, first), (stop, _) in pairwise([*edges, (len(text), 0)]):
        side = Side.LICENCE if start >= end else Side.TAIL if start >= tail else Side.BODY
        for low, high, border in _divided(text, start, stop, first, headings):
            low, high = _trimmed(text, low, high)
            if low < high:
                found.append(Piece(low, high, side, border))
    return found


def _headings(text: str) -> list[int]:
    """Where chapters begin; none where there are not at least two."""
    runs: list[list[int]] = []
    for match in _BORDERS[0][1].finditer(text):
        if runs and match.end() - runs[-1][-1] < _LEAST:
            runs[-1].append(match.end())
        else:
            runs.append([match.end()])
    return [run[0] if len(run) <= _DEEPEST else run[-1] for run in runs] if len(runs) > 1 else []


def _end(text: str) -> int:
    """Where the licence of Project Gutenberg begins, or the text ends."""
    match = _LICENCE.search(text, max(0, len(text) - _LICENCE_WITHIN))
    return match.start() if match and match.start() > _LEAST else len(text)


def _divided(
    text: str, start: int, stop: int, border: int, headings: list[int]
) -> Iterator[tuple[int, int, int]]:  # fmt: skip
    """(start, stop, border at the start) of its chapters or, without headings, of pieces of about PIECE."""
    edges = [(start, border)]
    for place in headings:
        if edges[-1][0] + _LEAST <= place <= stop - _LEAST:
            edges.append((place, 0))
    limit = _CHAPTER if headings else PIECE
    for (low, border), (high, _) in pairwise([*edges, (stop, 0)]):
        for parts in range(-(-(high - low) // limit), 1, -1):
            share = (high - low) // parts
            place, at = _border(text, low + share, share // 4)
            yield low, place, border
            low, border = place, at
        yield low, high, border


def _border(text: str, wanted: int, reach: int, headings: Sequence[int] = ()) -> tuple[int, int]:
    """(place, what is there): the best border that is at most `reach` characters away, of equals the nearest."""
    low, high = max(1, wanted - reach), min(len(text) - 1, wanted + reach)
    for border, (_, pattern) in enumerate(_BORDERS[:-1]):
        places = [match.end() for match in pattern.finditer(text, low - 1, high)] if border else headings
        if places := [place for place in places if low <= place <= high]:
            return min(places, key=lambda place: abs(place - wanted)), border
    while wanted > low and (unicodedata.combining(text[wanted]) or _JOINERS & {*text[wanted - 1 : wanted + 1]}):
        wanted -= 1
    return wanted, len(_BORDERS) - 1


def _trimmed(text: str, start: int, stop: int) -> tuple[int, int]:
    """Without blank lines at the begin, and at the end without spaces but for the end of the last line."""
    piece = text[start:stop]
    start += len(piece) - len(piece.lstrip("\n"))
    last = start + len(text[start:stop].rstrip())
    return start, min(stop, last + text.startswith("\n", last))
