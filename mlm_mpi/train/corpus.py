"""Which corpus a model was trained on, in words that its checkpoints keep, and how to get it back."""

import msgspec

from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.corpora import Corpora
from mlm_mpi.data.staging import PREPARED, Prepared
from mlm_mpi.files import read_whole
from mlm_mpi.train.checkpoint import Manifest

_PREPARED_BYTES = 1 << 20
_LONGEST = 1000  # characters of a command that are kept: ten thousand file names help nobody


def in_words(corpora: Corpora) -> str:
    """The size of each corpus and, where it says so, the command that made it."""
    if len(corpora.catalogs) == 1:
        return _in_words(corpora.catalogs[0])
    total = sum(corpora.weights)
    parts = zip(corpora.catalogs, corpora.weights, strict=True)
    return "; ".join(f"{weight / total:.4g} of {catalog.folder}: {_in_words(catalog)}" for catalog, weight in parts)


def _in_words(catalog: Catalog) -> str:
    shards = catalog.manifest.shards
    size = f"{sum(s.documents for s in shards):,} documents, {sum(s.tokens for s in shards):,} tokens"
    return f"{size}, content {catalog.manifest.content[:12]}{_making(catalog)}"


def _making(catalog: Catalog) -> str:
    try:
        content = read_whole(catalog.folder / PREPARED, _PREPARED_BYTES, catalog.folder)
        prepared = msgspec.json.decode(content, type=Prepared)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""  # nobody wrote down how it was made
    if prepared.content != catalog.manifest.content:
        return ""  # of the corpus that was here before
    command = prepared.command if len(prepared.command) <= _LONGEST else prepared.command[:_LONGEST] + " …"
    return f", made with Python {prepared.python[:20]} by: {command}"


def origin(manifest: Manifest) -> str:
    """Names a checkpoint's corpus in one line, whoever wrote the checkpoint."""
    words = "".join(c if c.isprintable() else "\ufffd" for c in manifest.corpus[: _LONGEST + 200])
    return f"corpus {manifest.catalog[:12]}" + (f" ({words})" if words else "")
