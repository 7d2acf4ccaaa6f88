"""Where numbers go besides metrics.jsonl: what a package lacks, what a sink breaks, what is read back."""

import sys
import time

import numpy as np
import pytest

from mlm_mpi import config
from mlm_mpi.errors import ConfigError
from mlm_mpi.monitor import Log, sinks
from mlm_mpi.monitor.progress import Silent
from mlm_mpi.train.engine import StepResult
from mlm_mpi.train.ledger import Ledger

DONE = StepResult(2.5, 100, 1.0, 1e-3, 0.5, 0.01, np.zeros((1, 2)))


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.said = []

    def message(self, text, important=False):
        assert important
        self.said.append(text)


class Listed:
    """A sink in memory; from step `breaks` on it raises, at its end too."""

    name = "listed"

    def __init__(self, breaks=10**9):
        self.rows, self.breaks, self.closed = [], breaks, False

    def write(self, **values):
        if values["step"] >= self.breaks:
            raise OSError(28, "No space\nleft")
        self.rows.append(values)
        return "news" if values["step"] == 2 else None

    def close(self):
        self.closed = True


@pytest.mark.parametrize("key", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_one_line_with_the_remedy(monkeypatch, key):
    monkeypatch.setitem(sys.modules, key, None)
    sinks.check(Log())
    wanted = config.load(None, [f"log.{key}={'true' if key == 'tensorboard' else 'mine'}"]).log
    with pytest.raises(ConfigError, match=rf"log\.{key} needs the package {key}, .*: pip install {key}, or"):
        sinks.check(wanted)


@pytest.mark.parametrize("name", ["a/b", "50%", "x" * 129])
def test_a_project_that_the_service_does_not_take(name):
    with pytest.raises(ConfigError, match=r"log.wandb = .* must be the name of a project, at most 128 characters"):
        config.load(None, [f"log.wandb='{name}'"])


def test_a_sink_that_breaks_is_one_alarm_and_the_others_go_on():
    sound, broken, show = Listed(), Listed(breaks=3), Heard()
    ledger = Ledger([broken, sound], show, tokens=lambda steps: 64 * steps)
    for step in range(1, 6):
        ledger.record(step, DONE, 0.0, 2.25 if step == 5 else None)
    ledger.finish()
    assert show.said == ["news", "news", "ALARM listed: [Errno 28] No space left: the run goes on without it"]
    assert [row["step"] for row in sound.rows] == [1, 2, 3, 4, 5] and len(broken.rows) == 2
    assert sound.rows[-1]["tokens"] == 320 and sound.rows[-1]["heldout_loss"] == 2.25
    assert "heldout_loss" not in sound.rows[0]
    assert sound.closed and not broken.closed


def test_tensorboard_reads_what_two_starts_have_written(tmp_path):
    """The second goes on after step 3: what the first wrote of steps 4 and 5 is gone."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, loss in ((range(1, 6), 1.0), (range(4, 7), 2.0)):
        board = sinks.TensorBoard(tmp_path / "tensorboard")
        for step in steps:
            board.write(step=step, time=time.time(), loss=loss, heldout_loss=np.float64("nan"))
        if loss == 2.0:
            board.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(found.Tags()["scalars"]) == ["heldout_loss", "loss"]
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(s, 1.0) for s in (1, 2, 3)] + [
        (s, 2.0) for s in (4, 5, 6)
    ]


def test_tensorboard_on_a_folder_that_cannot_be_made_is_one_alarm(tmp_path):
    pytest.importorskip("tensorboard")
    show = Heard()
    ledger = Ledger([sinks.TensorBoard(tmp_path / "no" / "tensorboard")], show)
    for step in (1, 2):
        ledger.record(step, DONE, 0.0, None)
    (alarm,) = show.said
    assert alarm.startswith("ALARM log.tensorboard: [Errno 2] No such file or directory")


def test_wandb_without_a_key_or_network_keeps_the_run_on_disk_under_one_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    ids = set()
    for first in (1, 4):
        sink, said = sinks.Wandb("p", tmp_path, {"model": {"width": 8}}, 60), []
        for step in range(first, first + 3):
            said.append(sink.write(step=step, time=0.0, loss=1.5))
        said.append(sink.close())
        ids.add((tmp_path / "wandb" / "run-id").read_text())
    (note,) = filter(None, said)
    assert note.startswith("note: log.wandb: No API key") and note.endswith(f"{tmp_path}/wandb/offline-run-*")
    assert len(ids) == 1 and [path.name.split("-")[-1] for path in (tmp_path / "wandb").glob("offline-run-*")] == [
        *ids, *ids
    ]  # fmt: skip


BROKEN = [
    ("1 / 0", 3, "division by zero"),
    ("import os; os._exit(3)", 3, "its program ended with exit code 3"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", 20_000, "it takes no more numbers"),
]


@pytest.mark.parametrize(("package", "steps", "reason"), BROKEN, ids=["fails", "dies", "stops"])
def test_a_service_that_does_not_do_its_work_is_one_alarm(tmp_path, monkeypatch, package, steps, reason):
    (tmp_path / "wandb.py").write_text(package)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "run").mkdir()
    show = Heard()
    ledger = Ledger([sinks.Wandb("p", tmp_path / "run", {}, 20)], show)
    for step in range(1, steps + 1):
        ledger.record(step, DONE, 0.0, None)
    ledger.finish()
    assert show.said == [f"ALARM log.wandb: {reason}: the run goes on without it"]


def test_a_service_that_never_ends_is_left_behind(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "run").mkdir()
    sink = sinks.Wandb("p", tmp_path / "run", {}, 0.1)
    assert sink.write(step=1, time=0.0) is None
    with pytest.raises(TimeoutError, match="not all was sent within 0.1 s: wandb sync"):
        sink.close()
