"""`mlm-mpi train`: arguments -> configuration -> run. Pins BLAS and NumPy before they load."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from mlm_mpi import config as configuration
from mlm_mpi.config import Config
from mlm_mpi.config.reader import Beneath, Pin
from mlm_mpi.errors import ConfigError
from mlm_mpi.plug import Plugins, named

_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_EXAMPLES = """examples:
  mlm-mpi train jobs/configs/tiny.toml --run runs/one
  mlm-mpi run -n 4 -- train jobs/configs/tiny.toml --run runs/four --set train.steps=500 --set data.dir=corpora/mine
  mlm-mpi run -n 4 -- train jobs/configs/tiny.toml --run runs/four --max-time 50m   # the same command again goes on

`mlm-mpi config` explains every key."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi train`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("config", metavar="CONFIG", help="TOML file, for example jobs/configs/tiny.toml")
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder: configuration, metrics, checkpoints")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    parser.add_argument("--plugins", metavar="DIR", help="folder of your own models/, optim/, … (docs/tutorial.md)")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="the same as --set backend.device=…")
    parser.add_argument(
        "--resume", choices=("auto", "never", "must"), default="auto",
        help="auto: from the newest checkpoint if there is one (default); never: refuse if there is; must: require one",
    )  # fmt: skip
    parser.add_argument("--max-time", metavar="T", help="save and leave after this time: 90s, 50m, 12h")
    parser.add_argument("--max-steps", type=int, metavar="N", help="save and leave after N more steps")
    parser.add_argument("--quiet", action="store_true", help="only alarms and the last lines")


def main(args: argparse.Namespace) -> int:
    """Runs the command on this rank."""
    return begin(args, settings)


def begin(args: argparse.Namespace, settings: Callable[[argparse.Namespace, Plugins, Pin], Config]) -> int:
    """A run of the settings that the arguments ask for, on this rank."""
    plugins = named(args.plugins)
    config = settings(args, plugins, configuration.prepare_environment)
    from mlm_mpi.comm import launch
    from mlm_mpi.train.run import Options, Run

    limit = None if args.max_time is None else seconds(args.max_time)
    options = Options(Path(args.run), args.resume, limit, args.max_steps, args.quiet, plugins)
    group = launch.start()
    task = plugins.find("tasks", config.task.kind, "task.kind")
    run = Run(config, options, task.build, group)
    code = run.run()
    return launch.leave(run.group, code)


def settings(
    args: argparse.Namespace, plugins: Plugins, pin: Pin | None = None, beneath: Beneath | None = None
) -> Config:
    """The configuration that the arguments ask for, all of them checked; `pin` and `beneath` as in `load`.

    Raises ConfigError.
    """
    if not args.run:
        raise ConfigError("--run '' is empty, which would be the current folder: name a folder")
    if args.max_steps is not None and args.max_steps < 1:
        raise ConfigError(f"--max-steps {args.max_steps} must be at least 1")
    if args.max_time is not None:
        seconds(args.max_time)
    device = [] if args.device is None else [f"backend.device={args.device}"]
    return configuration.load(args.config, args.set + device, plugins, pin, beneath)


def seconds(text: str) -> float:
    """ "50m" -> 3000.0. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([smhd]?)", text.strip())
    if not match:
        raise ConfigError(f"--max-time {text!r} is no time: write 90s, 50m, 12h or 2d")
    return float(match[1]) * _UNITS_S[match[2]]
