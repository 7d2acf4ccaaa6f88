"""An explanation as one HTML page, which asks for no other file and no network.

Tokens are data in it, never markup or script: they stand in a block of JSON without a "<", and the page's policy runs
only the script and style whose SHA-256 it names.
"""

import base64
import hashlib
import html
import json
from importlib import resources
from typing import Any

import numpy as np

from mlm_mpi.inside import colours
from mlm_mpi.inside.explanation import Explanation, Row
from mlm_mpi.layers.base import Map

MOST_BYTES = 9 << 20  # of maps, a byte a number: 144 heads of 256 tokens are 9 MiB; more are told as means of heads


def page(told: Explanation, layer: int, head: int) -> bytes:
    """`layer` (from 0) and `head` (from 1; 0: the mean of all): what it opens with."""
    parts = {name: _file(f"page.{name}") for name in ("html", "css", "js")}
    filled = {
        "TITLE": html.escape(f"Inside {told.model}"),
        "STYLE": parts["css"], "STYLE_HASH": _hash(parts["css"]),
        "SCRIPT": parts["js"], "SCRIPT_HASH": _hash(parts["js"]),
        "DATA": _json(_data(told, layer, head)),
    }  # fmt: skip
    pieces = parts["html"].split("@")  # a name stands between two of them, and there is no other
    return "".join(filled[piece] if number % 2 else piece for number, piece in enumerate(pieces)).encode()


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy has it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: dict[str, Any]) -> str:
    """JSON that ends no script, whatever its strings are."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(told: Explanation, layer: int, head: int) -> dict[str, Any]:
    maps = told.maps
    mean = sum(one.probabilities.size for one in maps.values()) > MOST_BYTES
    if mean:
        maps = {
            name: one._replace(probabilities=one.probabilities.mean(axis=0, keepdims=True))
            for name, one in maps.items()
        }
    words: dict[str, int] = {}
    a = told.attribution
    limits = "Attention is told to 0.4 %, small ones more finely (a byte holds the root), other numbers to four digits"
    return {
        "model": told.model, "question": told.question, "tokens": told.tokens, "places": told.places, "at": told.at,
        "source": told.source,
        "layer": layer, "head": 0 if mean else head,
        "layers": [_map(*named, called, mean) for named, called in zip(maps.items(), told.layers(), strict=True)],
        "lens": [_lens(row, words) for row in told.lens], "words": [*words],
        "attribution": {
            "output": a.output, "probability": a.probability, "score": a.score, "value": a.value,
            "baseline": a.baseline, "baseline_value": a.baseline_value, "steps": a.steps, "total": a.total,
            "difference": a.difference, "values": [round(float(value), 6) for value in a.values],
        },
        "scales": {kind: {theme: _bytes(colours.scale(kind, theme) / 255.0) for theme in ("light", "dark")}
                   for kind in ("amount", "sign")},
        "limits": limits + (f"; of each layer the mean of its heads is told, all would be more than "
                            f"{MOST_BYTES >> 20} MiB." if mean else "."),
    }  # fmt: skip


def _map(name: str, one: Map, called: str, mean: bool) -> dict[str, Any]:
    """`mean`: of the heads of what was there."""
    p = one.probabilities
    sides = {"rows": one.rows, "columns": one.columns}
    return {"name": name, "called": called, "heads": len(p), "mean": mean, "map": _bytes(p**0.5)} | sides


def _lens(row: Row, words: dict[str, int]) -> dict[str, Any]:
    """A word is named by its number in `words`, which grows."""
    top = [[[words.setdefault(word, len(words)), _rounded(p)] for word, p in best] for best in row.top]
    return {"name": row.name, "top": top, "came": [None if np.isnan(p) else _rounded(p) for p in row.came]}


def _rounded(p: float) -> float:
    return float(f"{p:.4g}")


def _bytes(values: np.ndarray) -> str:
    """Numbers from 0 to 1 in 1/255, a byte each, in base64."""
    return base64.b64encode(np.rint(255 * values).astype(np.uint8).tobytes()).decode()
