"""`mlm-mpi predict RUN FILE`: labels of new texts, or translations, on any number of ranks. Alone it needs no MPI."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mlm_mpi.commands import sharing
from mlm_mpi.errors import ConfigError, StorageError
from mlm_mpi.plug import Plugins, named

if TYPE_CHECKING:  # --help and completion need no NumPy
    from mlm_mpi.comm.group import Group
    from mlm_mpi.data.rows import Row
    from mlm_mpi.prediction import Round, Written

_EXAMPLES = """examples:
  mlm-mpi predict runs/reviews new.csv --text review
  mlm-mpi predict runs/reviews new.jsonl --json --all --out labels.jsonl
  mlm-mpi run -n 4 -- predict runs/reviews new.tsv --out labels.tsv      # the same file, sooner

A line for each row of FILE, in their order: its label and the label's probability; of a row without text neither. Of a
model that translates: what it makes of the text, by greedy search."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi predict`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder of a training, or one of its checkpoints")
    add("file", metavar="FILE", help="table of texts: .csv, .tsv or .jsonl, also compressed")
    add("--best", action="store_true", help="the best checkpoint of RUN (eval.best), not the newest")
    add("--out", metavar="FILE", help="where to write (default: stdout); it appears when it is complete")
    add("--json", action="store_true", help="JSON lines instead of tab-separated ones")
    add("--all", action="store_true", help="the probabilities of all labels")
    add("--text", default="text", metavar="COLUMN", help="column with the text (text)")
    add("--pair", metavar="COLUMN", help="column with the second text, of a model of pairs")
    add("--no-header", action="store_true", help="the file begins with a row; columns are called 1, 2, …")
    add("--encoding", default="utf-8", metavar="NAME", help="of a file without a byte-order mark (utf-8)")
    add("--rows", type=int, default=64, metavar="N", help="a rank computes this many rows at once (64)")
    add("--device", choices=("cpu", "gpu"), help="where to calculate (default: where it was trained)")
    add("--plugins", metavar="DIR", help="the folder of plug-ins that the model was trained with")
    sharing.configure(parser)


def main(args: argparse.Namespace, group: "Group") -> int:
    """Runs the command. Collective."""
    from mlm_mpi.data.decoding import check_encoding
    from mlm_mpi.data.rows import Columns, read
    from mlm_mpi.prediction import Round, Written, predict, write
    from mlm_mpi.train.trained import load, note

    mesh, plugins = sharing.mesh_of(args, group, copies=True), Plugins()
    columns = Columns(args.text, args.pair, has_header=not args.no_header)
    with group.together("the arguments"):
        columns.check()
        check_encoding(args.encoding)
        if not 1 <= args.rows <= 1 << 16:
            raise ConfigError(f"--rows {args.rows} must be at least 1 and at most {1 << 16}")
        if args.out is not None:
            _check_out(args.out, args.file)
        if not Path(args.file).is_file():
            raise ConfigError(f"{args.file} is no file: give a table of texts")
        plugins = named(args.plugins)
    trained = load(sharing.checkpoint_of(args, group), plugins, args.device, None, group.on_node(), mesh)
    writes = trained.config.task.kind == "translation"
    with group.together("a look at the model"):
        labels = trained.manifest.labels
        if writes:
            _check_writes(args)
        elif not labels:
            raise ConfigError(f"{args.run} tells no labels: give a run whose task.kind is classification")
        elif trained.manifest.pairs != (args.pair is not None):
            remedy = "name the column of the second text with --pair" if trained.manifest.pairs else "leave --pair out"
            raise ConfigError(
                f"{args.run} tells labels of {'pairs' if args.pair is None else 'single texts'}: {remedy}"
            )
    context, cut, count, empty = trained.config.model.context, 0, 0, 0
    rows, model = read(Path(args.file), columns, args.encoding), (trained.chain, trained.tokenizer)
    rounds: Iterator[Round | Written]
    if writes:
        rounds = write(*model, rows, context, args.rows, mesh, trained.place)
    else:
        rounds = predict(*model, rows, context, args.pair is not None, args.rows, mesh, trained.place)
    with _opened(args.out if group.rank == 0 else os.devnull, group) as out:
        for found in rounds:
            if not count and not args.json and not writes:
                out.write(_header(labels, args.all))
            cut, count = cut + found.cut, count + len(found.rows)
            empty += sum(_is_empty(row) for row in found.rows)
            for line in _lines(found, labels, args) if isinstance(found, Round) else _texts(found, args.json):
                out.write(line)
    if group.rank == 0:
        said = [f"{count:,} rows"]
        said += [f"{cut:,} are longer than the context of {context} and have lost their ends"] if cut else []
        said += [f"{empty:,} have no text and no {'translation' if writes else 'label'}"] if empty else []
        note("; ".join(said))
    return 0


def _check_writes(args: argparse.Namespace) -> None:
    """Raises ConfigError for what is of labels alone."""
    for option in ("all", "pair"):
        if getattr(args, option):
            raise ConfigError(f"--{option} is for runs that tell labels, and {args.run} translates: leave it out")


def _check_out(path: str, source: str) -> None:
    """Raises ConfigError before anything is computed."""
    out = Path(path)
    if not path or out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {path!r} is no file in a folder that exists: give another path")
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise ConfigError(f"--out {path} is the file whose texts are read: give another path")


@contextlib.contextmanager
def _opened(path: str | None, group: "Group") -> Iterator[IO[str]]:
    """Where lines go: stdout, or a file that takes its name when all of it is written."""
    if path is None or (Path(path).exists() and not Path(path).is_file()):  # a pipe or a device stays what it is
        with contextlib.nullcontext(sys.stdout) if path is None else _plain(path) as out:
            yield out
        return
    path = os.path.realpath(path)  # a link stays one
    made = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(made, "w", encoding="utf-8") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        made.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}: make room or give another --out") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            made.unlink()


@contextlib.contextmanager
def _plain(path: str) -> Iterator[IO[str]]:
    try:
        with open(path, "w", encoding="utf-8") as out:
            yield out
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}: make room or give another --out") from None


def _is_empty(row: "Row") -> bool:
    return not row.text and not row.second


def _header(labels: list[str], every: bool) -> str:
    names = ["label", "probability", *(labels if every else [])]
    return "\t".join(names) + "\n"


def _texts(found: "Written", as_json: bool) -> Iterator[str]:
    """One line each, whatever line ends a text may have."""
    for text in found.texts:
        if as_json:
            import msgspec

            yield msgspec.json.encode({"text": text}).decode() + "\n"
        else:
            yield " ".join(text.splitlines()) + "\n"


def _lines(found: "Round", labels: list[str], args: argparse.Namespace) -> Iterator[str]:
    for source, row in zip(found.rows, found.probabilities, strict=True):
        best, nothing = int(row.argmax()), _is_empty(source)
        if args.json:
            import msgspec

            told: dict[str, object] = {"label": labels[best], "probability": _rounded(row[best])}
            if nothing:
                told = {"label": None, "probability": None}
            elif args.all:
                told["probabilities"] = {label: _rounded(p) for label, p in zip(labels, row, strict=True)}
            yield msgspec.json.encode(told).decode() + "\n"
        else:
            shown = [row[best], *(row if args.all else [])]
            yield "\t".join(["" if nothing else labels[best], *("" if nothing else f"{p:.6f}" for p in shown)]) + "\n"


def _rounded(probability: float) -> float:
    return round(float(probability), 6)
