"""`mlm-mpi sweep CONFIG --over KEY=V,V,…`: trains every combination a little, the better ones on, the best to the end.

Successive halving (Jamieson, Talwalkar, arXiv:1502.07943): of n candidates all make S/ηᵏ steps, the better ones go on
to S/ηᵏ⁻¹, and so on to S. A candidate is a run of its own, so that the same command goes on where it was stopped, and
what it finds depends on nothing but the configuration: weights, and so losses, have the same bits on any ranks.
"""

import argparse
import itertools
import math
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlm_mpi import config as configuration
from mlm_mpi.errors import ConfigError, MlmError
from mlm_mpi.monitor.live import live
from mlm_mpi.monitor.runs import Told, columns, told
from mlm_mpi.plug import named

_EXAMPLES = """examples:
  mlm-mpi sweep jobs/configs/tiny.toml --out sweeps/rates --over optim.learning_rate=0.01,0.02,0.04
  mlm-mpi sweep jobs/configs/tiny.toml --out sweeps/two -n 2 --over train.rows=1,2 --over optim.weight_decay=0,0.1

The same command goes on with a sweep that was stopped. `mlm-mpi compare sweeps/rates/*` shows more of each run."""
_MOST = 1000  # candidates
_FOLDER = 120  # characters of a name


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi sweep`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("config", metavar="CONFIG", help="TOML file, for example jobs/configs/tiny.toml")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for a run folder of each candidate")
    parser.add_argument(
        "--over", action="append", default=[], metavar="SECTION.KEY=V,V,…", help="values to try; several: all combined"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for all candidates")
    parser.add_argument("-n", "--ranks", type=int, default=1, metavar="N", help="ranks of each training (default 1)")
    parser.add_argument(
        "--eta",
        type=int,
        default=2,
        metavar="N",
        help="of N candidates one goes on, with N times the steps (default 2)",
    )
    parser.add_argument("--plugins", metavar="DIR", help="folder of your own models/, optim/, …")


@dataclass(frozen=True)
class Rung:
    """So many candidates make so many steps in all."""

    candidates: int
    steps: int


def rungs(candidates: int, steps: int, eta: int) -> list[Rung]:
    """From all candidates for a few steps to one for all. The first steps divide those of the rungs between."""
    higher = math.ceil(math.log(candidates) / math.log(eta) - 1e-9) if candidates > 1 else 0
    first = max(1, steps // eta**higher)
    made = [Rung(-(-candidates // eta**k), min(steps, first * eta**k)) for k in range(higher)]
    return [*made, Rung(1, steps)]


@dataclass(frozen=True)
class Candidate:
    """A combination of values: overrides of the configuration, and the folder of its run."""

    settings: tuple[str, ...]
    run: Path

    @property
    def name(self) -> str:
        return " ".join(self.settings)


def candidates(over: Sequence[str], out: Path) -> list[Candidate]:
    """Every combination, the first key's values slowest. Raises ConfigError."""
    keys = []
    for text in over:
        key, found, values = text.partition("=")
        if not found or not key or "" in values.split(","):
            raise ConfigError(f"--over {text!r} names no values: write --over section.key=value,value")
        keys.append([f"{key}={value}" for value in values.split(",")])
    if not keys:
        raise ConfigError("nothing to try: give --over section.key=value,value")
    if math.prod(map(len, keys)) > _MOST:
        raise ConfigError(f"{math.prod(map(len, keys)):,} combinations are more than {_MOST:,}: give fewer values")
    made = [Candidate(settings, out / _folder(settings)) for settings in itertools.product(*keys)]
    if len({candidate.run for candidate in made}) < len(made):
        raise ConfigError("two combinations are the same: give each value once")
    return made


def _folder(settings: tuple[str, ...]) -> str:
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(settings))
    return name if len(name) <= _FOLDER else f"{name[:_FOLDER]}-{zlib.crc32(name.encode()):08x}"


Train = Callable[[Candidate, Rung], None]


@dataclass
class Result:
    """How far a candidate came, and what it held out there; `failed`: why it did not come further."""

    candidate: Candidate
    reached: int = 0
    heldout: float = math.inf
    failed: str = ""


def halving(found: list[Candidate], plan: Sequence[Rung], measure: Callable[[Candidate, Rung], float]) -> list[Result]:
    """Candidates, the best first: who came further, then who held out less, then who was named first.

    `measure` trains a candidate up to a rung and returns its held-out loss; an MlmError ends that candidate.
    """
    results = [Result(candidate) for candidate in found]
    alive = results
    for rung in plan:
        alive = alive[: rung.candidates]
        for result in alive:
            try:
                result.heldout, result.reached = measure(result.candidate, rung), rung.steps
            except MlmError as error:
                result.failed = str(error)
        alive = sorted((result for result in alive if not result.failed), key=lambda result: result.heldout)
    return sorted(results, key=lambda result: (-result.reached, result.heldout))


class Trainings:
    """Starts candidates as `mlm-mpi run` does, one after another."""

    def __init__(self, args: argparse.Namespace, first: int, total: int) -> None:
        self.args, self.first, self.total, self.done = args, first, total, 0
        self.bar = live("sweep")

    def measure(self, candidate: Candidate, rung: Rung) -> float:
        """The held-out loss after the steps of a rung. Raises MlmError with the last line of a run that failed."""
        self.bar.update(self.done, self.total, f"{candidate.name}: to step {rung.steps:,}")
        made = _made(candidate.run)
        if made is None or rung.steps not in made.heldout:
            self._train(candidate, rung, 0 if made is None else made.steps)
            made = told(candidate.run)
        self.done += 1
        if rung.steps not in made.heldout:
            raise MlmError(f"no held-out loss after step {rung.steps}: prepare a corpus with --heldout")
        heldout = made.heldout[rung.steps]
        self.bar.line(f"step {rung.steps:>6,}  held-out {heldout:.4f}  {candidate.name}")
        return heldout

    def _train(self, candidate: Candidate, rung: Rung, made: int) -> None:
        args = self.args
        overrides = [*args.set, *candidate.settings, f"eval.every={self.first}"]
        words = [word for text in overrides for word in ("--set", text)]
        plugins = [] if args.plugins is None else ["--plugins", args.plugins]
        command = [
            sys.executable, "-P", "-m", "mlm_mpi", "run", "-n", str(args.ranks), "--", "train", args.config,
            "--run", str(candidate.run), "--max-steps", str(rung.steps - made), "--quiet", *plugins, *words,
        ]  # fmt: skip
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            lines = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
            raise MlmError(lines[-1] if lines else f"exit code {ended.returncode}")


def _made(run: Path) -> Told | None:
    """What a run has made so far; None where it has not begun."""
    return told(run) if (run / "metrics.jsonl").exists() else None


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.eta < 2:
        raise ConfigError(f"--eta {args.eta} must be at least 2: of two candidates one goes on")
    if not args.out:
        raise ConfigError("--out '' is empty, which would be the current folder: name a folder")
    plugins, found = named(args.plugins), candidates(args.over, Path(args.out))
    configs = [configuration.load(args.config, [*args.set, *one.settings], plugins) for one in found]
    for config in configs:
        configuration.check_ranks(config, args.ranks)
    steps = {config.train.steps for config in configs}
    if len(steps) > 1:
        raise ConfigError("--over train.steps would compare runs of other lengths: leave it out")
    plan = rungs(len(found), steps.pop(), args.eta)
    print("\n".join(f"rung {k + 1}: {rung.candidates} × {rung.steps} steps" for k, rung in enumerate(plan)), flush=True)
    trainings = Trainings(args, plan[0].steps, sum(rung.candidates for rung in plan))
    try:
        results = halving(found, plan, trainings.measure)
    finally:
        trainings.bar.close()
    print("\n".join(_table(results)))
    best = results[0]
    if best.failed or not best.reached:
        raise MlmError(f"every candidate failed, the first with: {best.failed}")
    print(f"best: {best.candidate.name}, in {best.candidate.run}")
    return 0


def _table(results: list[Result]) -> list[str]:
    rows = [["candidate", "steps", "held-out"]]
    for result in results:
        heldout = f"{result.heldout:.4f}" if result.reached else "-"
        rows.append([result.candidate.name, f"{result.reached:,}", heldout])
    notes = [f"  {result.candidate.name} failed: {result.failed}" for result in results if result.failed]
    return [*columns(rows), *notes]
