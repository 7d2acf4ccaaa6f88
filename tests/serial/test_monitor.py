"""Metrics, progress and pictures of a run."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mlm_mpi.errors import MlmError
from mlm_mpi.monitor import metrics, progress, report
from mlm_mpi.monitor.metrics import MetricsLog


def read_metrics(path):
    return list(metrics.read_metrics(path))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("MLM_MPI_TERMINAL", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def test_lines_are_readable_at_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(step=1, loss=np.float32(1.5), tokens_per_s=10.0)
    log.write(step=2, loss=math.nan)
    assert read_metrics(log.path) == [{"step": 1, "loss": 1.5, "tokens_per_s": 10.0}, {"step": 2, "loss": None}]
    log.close()
    log.write(step=3)
    assert len(read_metrics(log.path)) == 2


def test_a_torn_line_is_left_out_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo')
    assert read_metrics(path) == [{"step": 0}]
    MetricsLog(path).write(step=2)
    assert read_metrics(path) == [{"step": 0}, {"step": 2}]


def test_resuming_drops_what_the_interrupted_run_left(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog.open(path, 0)
    for step in range(1, 6):
        log.write(step=step)
    MetricsLog.open(path, 3).write(step=4, again=True)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    assert read_metrics(path)[-1]["again"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    MetricsLog.open(path, 0)
    assert read_metrics(path) == []


def test_a_log_that_counts_from_0_goes_on_without_a_line_doubled_or_lost(tmp_path):
    """An earlier version's: steps 0 to 6 are the first seven; the run goes on after five."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": {step / 7}, "odd": null}}\n' for step in range(7)))
    for _ in range(2):  # another start does not move them again
        MetricsLog.open(path, 5).close()
        assert read_metrics(path) == [{"step": step + 1, "loss": step / 7, "odd": None} for step in range(5)]
    MetricsLog.open(path, 5).write(step=6)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_is_one_alarm_and_training_goes_on(tmp_path, monkeypatch, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(step=0)
    real = os.write
    room = [5]

    def full(descriptor: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        written = real(descriptor, data[: room[0]])
        room[0] = 0
        return written

    monkeypatch.setattr(metrics.os, "write", full)
    log.write(step=1)
    log.write(step=2)
    monkeypatch.undo()
    log.write(step=3)
    assert read_metrics(log.path) == [{"step": 0}, {"step": 3}]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "ALARM cannot write" in err
    assert "No space left on device" in err


def test_a_folder_that_cannot_be_written_is_an_alarm_too(tmp_path, capsys):
    MetricsLog.open(tmp_path / "missing" / "metrics.jsonl", 4).write(step=4)
    assert capsys.readouterr().err.count("ALARM") == 1
    with pytest.raises(MlmError, match=r"cannot read .*: give the folder of a run"):
        read_metrics(tmp_path / "missing" / "metrics.jsonl")


def test_only_the_launcher_knows_about_the_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert progress.on_terminal()
    monkeypatch.setenv("PMI_RANK", "0")
    assert not progress.on_terminal()
    monkeypatch.setenv("MLM_MPI_TERMINAL", "1")
    assert progress.on_terminal()
    monkeypatch.setenv("MLM_MPI_TERMINAL", "0")
    assert not progress.on_terminal()


def drive(bar: progress.Reporter, steps: int = 5) -> None:
    for step in range(1, steps + 1):
        done = progress.Done(step, 5.0 - step / 10, 1000, step / 10, step / 200, step / 1000, 1e-3)
        bar.update(done, heldout=4.25 if step == 3 else None)
        bar.message(f"aside {step} [not markup]")
    bar.message("checkpoint kept", important=True)
    bar.close()


def test_plain_lines(capsys):
    drive(progress.Progress(5, every=2, terminal=False))
    out = capsys.readouterr().out
    steps = [line for line in out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in steps] == ["2/5", "3/5", "4/5", "5/5"]
    # the first line is of steps 1 and 2, which took 0.1 and 0.2 s
    assert steps[0].startswith("step 2/5  loss 4.8500  lr 1.00e-03  6,667 tokens/s  comm 5%  wait 1%")
    assert steps[1].startswith("step 3/5  loss 4.7500  held-out 4.2500  lr 1.00e-03  4,000 tokens/s"), "of 2 and 3"
    assert "aside 1 [not markup]" in out
    assert "\x1b" not in out
    assert "\r" not in out


def test_quiet_keeps_important_messages_and_the_last_line(capsys):
    drive(progress.Progress(9, every=1, quiet=True, terminal=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "checkpoint kept"
    assert lines[1].startswith("step 5/9  loss 4.5000")
    assert len(lines) == 2


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    drive(progress.Progress(5, start_step=2, terminal=True))
    out = capsys.readouterr().out
    assert "\x1b[" in out
    for text in ("loss 4.800", "held-out 4.250", "tokens/s", "comm 5%", "wait 1%", "aside 4 [not markup]", "5/5"):
        assert text in out
    assert re.findall(r"step (\d/5)  loss", out) == ["3/5", "5/5"], "held-out losses and the last step, each once"


def test_other_ranks_are_silent(capsys):
    drive(progress.Silent())
    assert capsys.readouterr().out == ""


def test_the_plan(capsys):
    rows = [("ranks", "2 × 1 thread"), ("parameters", "3.2 M [float32]")]
    progress.show_plan("Plan", rows, terminal=False)
    assert capsys.readouterr().out == "Plan\n  ranks       2 × 1 thread\n  parameters  3.2 M [float32]\n"
    progress.show_plan("Plan", rows, terminal=True)
    assert "3.2 M [float32]" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def write_run(path: Path, steps: int = 220, **odd: Any) -> None:
    """`odd`: instead of the loss of a step, by its number."""
    log = MetricsLog(path)
    noise = np.random.default_rng(0).normal(0, 0.05, steps)
    for step in range(1, steps + 1):
        loss = odd.get(f"step{step}", 2.5 + 6 * math.exp(-step / 40) + noise[step - 1])
        heldout = {"heldout_loss": 2.6 + 6 * math.exp(-step / 40)} if step % 50 == 0 else {}
        log.write(step=step, tokens=2048 * step, loss=loss, learning_rate=1e-3 * (1 - step / steps), **heldout)


def drawn(path: Path, monkeypatch: pytest.MonkeyPatch, title: str = "run") -> Figure:
    """The figure that becomes the picture."""
    kept = []
    monkeypatch.setattr(report, "FigureCanvasAgg", lambda figure: kept.append(figure) or FigureCanvasAgg(figure))
    report.loss_curve(path, path.with_name("loss.png"), title)
    return kept[0]


def test_the_loss_curve(tmp_path, monkeypatch):
    write_run(tmp_path / "metrics.jsonl")
    figure = drawn(tmp_path / "metrics.jsonl", monkeypatch, "runs/$a: gpt")  # $: no formula
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (1200, 750)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50
    losses, rate = figure.axes
    assert losses.get_title(loc="left") == "runs/$a: gpt, 451 k tokens"
    raw, smooth, heldout = losses.get_lines()
    assert smooth.get_label() == "training, mean of 9 steps"
    assert raw.get_xdata().tolist() == smooth.get_xdata().tolist() == list(range(1, 221))
    assert smooth.get_ydata()[100] == pytest.approx(raw.get_ydata()[96:105].mean())
    assert heldout.get_xdata().tolist() == [50, 100, 150, 200]
    assert rate.get_lines()[0].get_ydata()[-1] == 0
    (tokens,) = losses.child_axes
    assert tokens.get_xlim()[1] == pytest.approx(2048 * losses.get_xlim()[1])


def test_no_axis_of_tokens_where_steps_read_more_and_more(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, tokens in enumerate((512, 1024, 3072, 5120), 1):
        log.write(step=step, tokens=tokens, loss=3.0 - step / 10)
    losses = drawn(tmp_path / "metrics.jsonl", monkeypatch).axes[0]
    assert losses.child_axes == [] and losses.get_title(loc="left") == "run, 5.12 k tokens"


def test_a_loss_that_explodes_hides_nothing(tmp_path, monkeypatch):
    write_run(tmp_path / "metrics.jsonl", step90=1e25, step91=math.nan)
    losses = drawn(tmp_path / "metrics.jsonl", monkeypatch).axes[0]
    raw, smooth, _ = losses.get_lines()
    assert 8 < losses.get_ylim()[1] < 9 and raw.get_ydata().max() == 1e25 and smooth.get_ydata().max() < 9
    assert 91 not in raw.get_xdata()


@pytest.mark.parametrize("steps", [1, 2, 5000])
def test_a_curve_of_any_length(tmp_path, monkeypatch, steps):
    write_run(tmp_path / "metrics.jsonl", steps, step3=9.5)
    raw = drawn(tmp_path / "metrics.jsonl", monkeypatch).axes[0].get_lines()[0]
    assert len(raw.get_xdata()) <= 2000 and (steps < 3 or 9.5 in raw.get_ydata())
    assert raw.get_marker() == ("o" if steps == 1 else "None"), "a line needs two points"


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (614_400, "614 k"), (2.5e6, "2.5 M"), (1.2e9, "1.2 B"), (15e12, "15 T")]
)
def test_counts_in_words(count, text):
    assert report.in_words(count) == text


def test_no_loss_curve_without_losses(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0}) + "\n")
    with pytest.raises(MlmError, match="holds no losses yet"):
        report.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    write_run(tmp_path / "metrics.jsonl", 3)
    with pytest.raises(MlmError, match="cannot write"):
        report.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "no" / "loss.png")
