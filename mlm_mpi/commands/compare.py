"""`mlm-mpi compare RUN RUN …`: where runs differ in their settings, and what became of it."""

import argparse
from pathlib import Path
from typing import Any

from mlm_mpi import config as configuration
from mlm_mpi.errors import ConfigError
from mlm_mpi.monitor.runs import Told, columns, told
from mlm_mpi.plug import Plugins, named

_EXAMPLES = """examples:
  mlm-mpi compare runs/one runs/two
  mlm-mpi compare sweeps/rates/*"""
_APART = ("data.dir",)  # is told as a corpus would be: by what was trained on, not by where it lay


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi compare`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, finished or not")
    parser.add_argument("--plugins", metavar="DIR", help="the folder of plug-ins that the models were trained with")


def main(args: argparse.Namespace) -> int:
    """Prints a row for each run."""
    if len(args.runs) < 2:
        raise ConfigError("one run alone compares with nothing: name two or more")
    plugins, runs = named(args.plugins), [Path(run) for run in args.runs]
    found = [told(run) for run in runs]
    settings = differing([_settings(run, plugins) for run in runs])
    print("\n".join(columns([head(settings, found), *rows(runs, settings, found)])))
    return 0


def _settings(run: Path, plugins: Plugins) -> dict[str, Any]:
    """section.key -> value, of the effective configuration."""
    table = configuration.to_table(configuration.load(str(run / "config.toml"), (), plugins))
    return {f"{section}.{key}": value for section, keys in table.items() for key, value in keys.items()}


def differing(settings: list[dict[str, Any]]) -> dict[str, list[str]]:
    """section.key -> each run's value, of the keys whose values are not all equal."""
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: [str(one.get(name, "-")) for one in settings] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def _shared(found: list[Told]) -> list[int]:
    """The last step after which all runs measured what they held out; none if there is no such step."""
    common = set.intersection(*(set(one.heldout) for one in found))
    return [max(common)] if common else []


def head(settings: dict[str, list[str]], found: list[Told]) -> list[str]:
    """What stands in the columns."""
    shared = [f"held-out at {step}" for step in _shared(found)]
    return ["run", *settings, "steps", "loss", "held-out", *shared, "tokens/s", "weights"]


def rows(runs: list[Path], settings: dict[str, list[str]], found: list[Told]) -> list[list[str]]:
    """A row for each run, in the order given."""
    return [
        [
            str(run), *(each[at] for each in settings.values()), str(one.steps), f"{one.loss:.4f}",
            f"{one.heldout[max(one.heldout)]:.4f}" if one.heldout else "-",
            *(f"{one.heldout[step]:.4f}" for step in _shared(found)), f"{one.speed:,.0f}", one.weights[:12] or "-",
        ]
        for at, (run, one) in enumerate(zip(runs, found, strict=True))
    ]  # fmt: skip
