"""`mlm-mpi verify RUN`: proves that a run used each sample exactly once, or says what is wrong. Needs no MPI."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_mpi.errors import ranges
from mlm_mpi.plug import named

if TYPE_CHECKING:  # --help and completion need no NumPy
    from mlm_mpi.train.proof import Proof

_EXAMPLES = """examples:
  mlm-mpi verify runs/one
  mlm-mpi verify runs/one --data corpora/moved --json

Exit code 0: each sample was used exactly once, or is named as skipped or undone. 1: something is wrong, a line
each. 2: nothing to examine, or the corpus is not there and which samples were used stays unproven."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi verify`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("run", metavar="RUN", help="run folder of a training, finished or not")
    parser.add_argument("--data", metavar="DIR", nargs="+", default=[], help="where its corpora lie now, if they moved")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--plugins", metavar="DIR", help="the folder of plug-ins that it was trained with")


def main(args: argparse.Namespace) -> int:
    """Says what was proven; returns the exit code."""
    from mlm_mpi.train.proof import prove
    from mlm_mpi.train.trained import named as folder

    proof = prove(Path(folder(args.run, "RUN")), named(args.plugins), args.data)
    if args.json:
        import msgspec

        print(msgspec.json.encode(_table(proof)).decode())
    else:
        print("\n".join(_lines(args.run, proof)))
    if proof.unproven and not args.json:
        sys.stdout.flush()
        print(f"mlm-mpi: which samples were used is not proven: {proof.unproven}", file=sys.stderr)
    return 1 if proof.wrong else 2 if proof.unproven else 0


def _table(proof: "Proof") -> dict[str, Any]:
    return {
        "proven": proof.holds, "steps": proof.steps, "from_step": proof.begins + 1, "samples": proof.samples,
        "corpus": proof.corpus, "epochs": proof.epochs, "skipped": [one._asdict() for one in proof.skipped],
        "skipped_micro_batches": proof.skipped_in_all, "undone": proof.undone,
        "undone_samples": proof.undone_samples, "torn_lines": proof.torn,
        "ranks": {str(name): n for name, n in proof.ranks.items()},
        "checkpoints": proof.checkpoints, "wrong": proof.wrong, "findings": proof.wrong_in_all,
        "unproven": proof.unproven,
    }  # fmt: skip


def _lines(run: str, proof: "Proof") -> list[str]:
    lines = [f"{run}: {_extent(proof)}: {_verdict(proof)}"]
    lines += [f"WRONG {_printable(text)}" for text in proof.wrong]
    lines += _more(proof.wrong_in_all, len(proof.wrong), "findings")
    for one in proof.skipped:
        which = f"step {one.step}, micro-batch {one.micro_batch} (samples {one.first:,}-{one.stop - 1:,})"
        lines.append(f"skipped: {which}: {_printable(one.reason)}")
    lines += _more(proof.skipped_in_all, len(proof.skipped), "skipped micro-batches")
    for first, last in proof.undone[:20]:
        which = f"step {first}" if first == last else f"steps {first} to {last}"
        lines.append(f"undone: {which}, by a roll-back: their samples are in no weight")
    if proof.torn:
        lines.append(f"left out: {proof.torn:,} line{'s' * (proof.torn > 1)} of the ledger, torn or not of mlm-mpi")
    if proof.begins:
        lines.append(f"steps 1 to {proof.begins} were made before this run had a ledger: nothing is said of them")
    if proof.ranks:
        least, most = min(proof.ranks.values()), max(proof.ranks.values())
        each = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        several = len(proof.ranks) > 1
        who = f"rank{'s' * several} {ranges(sorted(proof.ranks))}"
        lines.append(f"{who} took part, with {each} micro-batches{' each' * several}")
    if proof.checkpoints:
        lines.append(f"sound checkpoints: {', '.join(proof.checkpoints)}")
    if not proof.saved:
        lines.append("nothing is saved yet")
    elif proof.steps > proof.saved:
        lines.append(f"steps after {proof.saved} are not saved: if this run does not live, a start makes them again")
    return lines


def _extent(proof: "Proof") -> str:
    text = f"{proof.steps:,} steps, {proof.samples:,} samples"
    if not proof.corpus:
        return text
    return f"{text}, {' and '.join(f'{epochs:.1f}' for epochs in proof.epochs)} epochs of corpus {proof.corpus}"


def _verdict(proof: "Proof") -> str:
    since = f"from step {proof.begins + 1} on " if proof.begins else ""
    if proof.wrong:
        return f"{proof.wrong_in_all} finding{'s' if proof.wrong_in_all > 1 else ''}"
    if proof.unproven:
        return f"{since}each micro-batch of each step was run by one rank"
    lost = [f"{proof.skipped_samples:,} that were skipped"] if proof.skipped_in_all else []
    lost += [f"{proof.undone_samples:,} whose steps were undone"] if proof.undone else []
    return f"{since}each sample was used exactly once" + (f", but for {' and '.join(lost)}" if lost else "")


def _more(total: int, named: int, what: str) -> list[str]:
    return [f"… and {total - named:,} more {what}"] if total > named else []


def _printable(text: str) -> str:
    """A line for a terminal, whoever wrote it."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)[:600]
