"""`mlm-mpi predict RUN FILE`: labels of new texts or words, translations, or answers to questions, on any number of
ranks. Alone it needs no MPI."""

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mlm_mpi.commands import searching, sharing
from mlm_mpi.errors import ConfigError, StorageError
from mlm_mpi.files import publishing
from mlm_mpi.plug import Plugins, named

if TYPE_CHECKING:  # --help and completion need no NumPy
    import numpy as np

    from mlm_mpi.comm.group import Group
    from mlm_mpi.data.rows import Columns, Row
    from mlm_mpi.data.squad import Question
    from mlm_mpi.data.words import Sentence
    from mlm_mpi.prediction import Round, Written
    from mlm_mpi.train.checkpoint import Manifest
    from mlm_mpi.train.trained import Trained

_EXAMPLES = """examples:
  mlm-mpi predict runs/reviews new.csv --text review
  mlm-mpi predict runs/reviews new.jsonl --json --all --out labels.jsonl
  mlm-mpi run -n 4 -- predict runs/reviews new.tsv --out labels.tsv      # the same file, sooner
  mlm-mpi predict runs/names new.conll --out named.conll
  mlm-mpi predict runs/french new.tsv --text english --beams 4
  mlm-mpi predict runs/french lines.txt --out lines.fr                   # a text a line
  mlm-mpi predict runs/squad dev-v1.1.json --squad --out answers.json     # for SQuAD's own program

A line for each row of FILE, in their order: its label and the label's probability; of a row without text neither.
Of a model of words (prepare --tags) a line for each word: it, its label, the label's probability; empty lines stay.
Of a model that translates: what it makes of the text, by greedy search, or, slower and better, with --beams.
Of a model that answers (prepare --squad) FILE is as SQuAD's, or JSON lines {"question": …, "context": …}: the answer,
its probability, and its first character in the context and the one behind it."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi predict`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder of a training, or one of its checkpoints")
    add(
        "file",
        metavar="FILE",
        help="table of texts: .csv, .tsv or .jsonl; texts, one a line: .txt; words, one a line, or .jsonl; questions: "
        ".json or .jsonl; .gz too",
    )
    add("--best", action="store_true", help="the best checkpoint of RUN (eval.best), not the newest")
    add("--out", metavar="FILE", help="where to write (default: stdout); it appears when it is complete")
    add("--json", action="store_true", help="JSON lines instead of tab-separated ones")
    add("--squad", action="store_true", help="of questions: one JSON object, id to answer, as SQuAD's program reads it")
    add("--all", action="store_true", help="the probabilities of all labels")
    add("--text", metavar="COLUMN", help="column with the text (text), or with words (1, or tokens)")
    add("--pair", metavar="COLUMN", help="column with the second text, of a model of pairs")
    add("--no-header", action="store_true", help="the file begins with a row; columns are called 1, 2, …")
    add("--encoding", default="utf-8", metavar="NAME", help="of a file without a byte-order mark (utf-8)")
    add("--rows", type=int, default=64, metavar="N", help="a rank computes this many rows or sentences at once (64)")
    add("--device", choices=("cpu", "gpu"), help="where to calculate (default: where it was trained)")
    add("--plugins", metavar="DIR", help="the folder of plug-ins that the model was trained with")
    searching.configure(parser)
    sharing.configure(parser)


def main(args: argparse.Namespace, group: "Group") -> int:
    """Runs the command. Collective."""
    from mlm_mpi.data.decoding import check_encoding
    from mlm_mpi.train.trained import load, note

    mesh, plugins = sharing.mesh_of(args, group, copies=True), Plugins()
    with group.together("the arguments"):
        _columns(args).check()
        check_encoding(args.encoding)
        searching.beams_of(args)
        if not 1 <= args.rows <= 1 << 16:
            raise ConfigError(f"--rows {args.rows} must be at least 1 and at most {1 << 16}")
        if args.out is not None:
            _check_out(args.out, args.file)
        if not Path(args.file).is_file():
            raise ConfigError(f"{args.file} is no file: give one, as mlm-mpi help predict says")
        plugins = named(args.plugins)
    trained = load(sharing.checkpoint_of(args, group), plugins, args.device, None, group.on_node(), mesh)
    task = plugins.find("tasks", trained.config.task.kind, "task.kind")
    of_words, writes, answers = (getattr(task, name, False) for name in ("OF_WORDS", "WRITES", "FINDS"))
    with group.together("a look at the model"):
        if answers:
            _check_answering(args)
        else:
            _check_model(args, trained.manifest, of_words, writes)
    counts = Counter[str]()
    made = _word_lines if of_words else _written_lines if writes else _answer_lines if answers else _text_lines
    with _opened(args.out if group.rank == 0 else os.devnull) as out:
        for line in made(args, trained, counts):
            out.write(line)
    if group.rank == 0:
        said = _said_of_questions(counts, trained.config.task.question) if answers else None
        note("; ".join(said or _said(counts, trained.config.model.context, of_words, writes)))
    return 0


def _columns(args: argparse.Namespace) -> "Columns":
    from mlm_mpi.data.rows import Columns

    return Columns("text" if args.text is None else args.text, args.pair, has_header=not args.no_header)


def _check_model(args: argparse.Namespace, manifest: "Manifest", of_words: bool, writes: bool) -> None:
    """Raises ConfigError for a model that tells no labels, or others than the arguments are for."""
    if args.squad:
        raise ConfigError(f"--squad is for runs that answer questions, and {args.run} is none: leave it out")
    if not writes and searching.given(args):
        raise ConfigError(
            f"{searching.given(args)[0]} is for runs that translate, and {args.run} is none: leave it out"
        )
    if not of_words:
        _check_lines(args)
    if writes:
        for option in ("all", "pair"):
            if getattr(args, option):
                raise ConfigError(f"--{option} is for runs that tell labels, and {args.run} translates: leave it out")
    elif not manifest.labels:
        raise ConfigError(
            f"{args.run} tells no labels: give a run whose task.kind is classification, tagging, translation or "
            "question_answering"
        )
    elif of_words:
        for option in ("--pair", "--no-header"):
            if getattr(args, option[2:].replace("-", "_")):
                raise ConfigError(f"{args.run} tells labels of words, {option} is for tables of texts: leave it out")
        if args.all and not args.json:
            raise ConfigError("--all has no header to name the labels of words in: give --json too, or leave it out")
    elif manifest.pairs != (args.pair is not None):
        remedy = "name the column of the second text with --pair" if manifest.pairs else "leave --pair out"
        raise ConfigError(f"{args.run} tells labels of {'pairs' if args.pair is None else 'single texts'}: {remedy}")


def _check_answering(args: argparse.Namespace) -> None:
    """Raises ConfigError for what a model that answers questions has not."""
    given = [f"--{name}" for name in ("all", "pair", "text", "no_header") if getattr(args, name) not in (None, False)]
    given += searching.given(args)
    if given:
        option = given[0].replace("_", "-")
        raise ConfigError(f"{option} is not for questions, and {args.run} answers them: leave it out")
    if args.squad and args.json:
        raise ConfigError("--squad is one JSON object, --json has one a line: leave one out")


def _answer_lines(args: argparse.Namespace, trained: "Trained", counts: Counter[str]) -> Iterator[str]:
    """What is written of questions. Collective."""
    from mlm_mpi.data.questions import Cut
    from mlm_mpi.data.squad import read_new
    from mlm_mpi.prediction import predict_answers

    config = trained.config
    cut = Cut(config.model.context, config.task.question, config.task.stride, config.task.matches)
    rounds = predict_answers(
        trained.chain, trained.tokenizer, read_new(Path(args.file), args.encoding), cut, config.task.unanswerable,
        args.rows, trained.mesh, trained.place,
    )  # fmt: skip
    for found in rounds:
        if not counts["rows"] and not args.json:
            yield "{\n" if args.squad else "answer\tprobability\tstart\tend\n"
        for one, row in zip(found.questions, found.answers.tolist(), strict=True):
            counts.update(rows=1, empty=row[0] != row[0], nothing=row[1] == 0, again=args.squad and one.again)
            yield _answer_line(args, one, row, counts["rows"])
        counts.update(cut=found.cut)
    if args.squad:
        yield "\n}\n"


def _answer_line(args: argparse.Namespace, one: "Question", row: list[float], number: int) -> str:
    """`row`: first character, one past the last, probability; NaN where nothing was asked. `number`: from 1."""
    import msgspec

    start, end, probability = row
    gone = start != start
    answer = "" if gone else one.second[int(start) : int(end)]
    if args.squad:
        name = json.dumps(one.id or str(number))  # as it came, lone surrogates too
        told = msgspec.json.encode(answer).decode()
        return f"{',' * (number > 1)}{chr(10) * (number > 1)}{name}: {told}"
    if args.json:
        places = {"probability": None, "start": None, "end": None}
        found = places if gone else {"probability": _rounded(probability), "start": int(start), "end": int(end)}
        named = {"id": one.id.encode(errors="replace").decode()} if one.id else {}
        return msgspec.json.encode(named | {"answer": None if gone else answer} | found).decode() + "\n"
    shown = ["", "", ""] if gone else [f"{probability:.6f}", str(int(start)), str(int(end))]
    return "\t".join([" ".join(answer.split()), *shown]) + "\n"


def _said_of_questions(counts: Counter[str], most: int) -> list[str]:
    """What a person is told at the end."""
    told = [f"{counts['rows']:,} questions"]
    for name, what in (
        ("nothing", "have no answer"), ("cut", f"are longer than task.question = {most} and have lost their ends"),
        ("empty", "have no question or no context, and no answer"),
        ("again", "have the id of an earlier one, which readers of --squad's object may lose"),
    ):  # fmt: skip
        told += [f"{counts[name]:,} {what}"] if counts[name] else []
    return told


def _check_lines(args: argparse.Namespace) -> None:
    """Raises ConfigError for options of tables, where the file has a text a line."""
    from mlm_mpi.data.rows import is_lines

    for option, given in (("--text", args.text is not None), ("--pair", args.pair), ("--no-header", args.no_header)):
        if given and is_lines(Path(args.file)):
            raise ConfigError(f"{option} is of tables, and {args.file} has a text a line: leave it out")


def _rows(args: argparse.Namespace) -> Iterator["Row"]:
    """The texts of FILE."""
    from mlm_mpi.data import rows

    path = Path(args.file)
    if rows.is_lines(path):
        return rows.lines(path, args.encoding)
    return rows.read(path, _columns(args), args.encoding)


def _text_lines(args: argparse.Namespace, trained: "Trained", counts: Counter[str]) -> Iterator[str]:
    """What is written of a table of texts; `counts` takes what a person is told. Collective."""
    from mlm_mpi.prediction import predict

    labels = trained.manifest.labels
    rounds = predict(
        trained.chain, trained.tokenizer, _rows(args), trained.config.model.context, args.pair is not None, args.rows,
        trained.mesh, trained.place,
    )  # fmt: skip
    for found in rounds:
        if not counts["rows"] and not args.json:
            yield _header(labels, args.all)
        counts.update(rows=len(found.rows), cut=found.cut, empty=sum(map(_is_empty, found.rows)))
        yield from _lines(found, labels, args)


def _written_lines(args: argparse.Namespace, trained: "Trained", counts: Counter[str]) -> Iterator[str]:
    """Likewise of what is made of texts."""
    from mlm_mpi.prediction import encoded, write

    tokenizer, hints = trained.tokenizer, trained.manifest.hints or None
    rounds = write(
        trained.chain, tokenizer, _rows(args), lambda rows: encoded(tokenizer, rows, hints),
        trained.config.model.context, args.rows, searching.beams_of(args), trained.mesh, trained.place,
    )  # fmt: skip
    for found in rounds:
        counts.update(rows=len(found.rows), cut=found.cut, empty=sum(map(_is_empty, found.rows)))
        yield from _texts(found, args.json)


def _word_lines(args: argparse.Namespace, trained: "Trained", counts: Counter[str]) -> Iterator[str]:
    """Likewise of sentences."""
    import numpy as np

    from mlm_mpi.data.words import WordColumns, read
    from mlm_mpi.prediction import predict_words

    labels = trained.manifest.labels
    rounds = predict_words(
        trained.chain, trained.tokenizer, read(Path(args.file), WordColumns(args.text, labelled=False), args.encoding),
        trained.config.model.context, len(labels), args.rows, trained.mesh, trained.place,
    )  # fmt: skip
    for found in rounds:
        table = found.probabilities.reshape(-1, len(labels))
        counts.update(
            rows=sum(bool(sentence.words) for sentence in found.sentences), words=len(table), cut=found.cut,
            empty=int(np.isnan(table[:, 0]).sum()),
        )  # fmt: skip
        start = 0
        for sentence in found.sentences:
            own = table[start : start + len(sentence.words)]
            start += len(own)
            yield _object(sentence, own, labels, args.all) if args.json else _word_table(sentence, own, labels)


def _said(counts: Counter[str], context: int, of_words: bool, writes: bool) -> list[str]:
    """What a person is told at the end."""
    told = [f"{counts['rows']:,} sentences, {counts['words']:,} words" if of_words else f"{counts['rows']:,} rows"]
    if counts["cut"]:
        told.append(f"{counts['cut']:,} are longer than the context of {context} and have lost their ends")
    if counts["empty"]:
        nothing = f"have no text and no {'translation' if writes else 'label'}"
        nothing = "words have no label: they lie there, or have no token" if of_words else nothing
        told.append(f"{counts['empty']:,} {nothing}")
    return told


def _check_out(path: str, source: str) -> None:
    """Raises ConfigError before anything is computed."""
    out = Path(path)
    if not path or out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {path!r} is no file in a folder that exists: give another path")
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise ConfigError(f"--out {path} is the file whose texts are read: give another path")


@contextlib.contextmanager
def _opened(path: str | None) -> Iterator[IO[str]]:
    """Where lines go: stdout, or a file that takes its name when all of it is written."""
    if path is None or (Path(path).exists() and not Path(path).is_file()):  # a pipe or a device stays what it is
        with contextlib.nullcontext(sys.stdout) if path is None else _plain(path) as out:
            yield out
        return
    whole = Path(path).resolve()  # a link stays one
    with (
        publishing(whole, 0, nameless=True) as descriptor,
        open(descriptor, "w", encoding="utf-8", closefd=False) as out,
    ):
        yield out


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


def _texts(found: "Written[Row]", as_json: bool) -> Iterator[str]:
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


def _word_table(sentence: "Sentence", table: "np.ndarray", labels: list[str]) -> str:
    """A line for each word, and the empty ones behind the sentence. Shapes: (n, L)."""
    lines = []
    for word, row in zip(sentence.words, table, strict=True):
        best = int(row.argmax())  # the first, where all are NaN
        told = "\t" if row[best] != row[best] else f"{labels[best]}\t{row[best]:.6f}"
        lines.append(f"{word}\t{told}\n")
    return "".join(lines) + "\n" * sentence.empties


def _object(sentence: "Sentence", table: "np.ndarray", labels: list[str], every: bool) -> str:
    """A JSON line. Shapes: (n, L)."""
    import msgspec

    nothing, best = [row[0] != row[0] for row in table], table.argmax(axis=1).tolist() if len(table) else []
    shown = list(zip(table, best, nothing, strict=True))
    told: dict[str, object] = {
        "tokens": sentence.words,
        "labels": [None if gone else labels[number] for _, number, gone in shown],
        "probabilities": [None if gone else _rounded(row[number]) for row, number, gone in shown],
    }
    if every:
        told["all"] = [
            None if gone else {label: _rounded(p) for label, p in zip(labels, row, strict=True)}
            for row, _, gone in shown
        ]
    return msgspec.json.encode(told).decode() + "\n"


def _rounded(probability: float) -> float:
    return round(float(probability), 6)
