"""Trainings as a person sees them: in a real terminal, through mpiexec."""

import re
import sys

from programs import LAUNCH, Place
from terminal import Terminal

SLOW = """
import time
def before_step(rank, step):
    time.sleep(0.1)
    if rank == 1 and step == 6:
        sys.stderr.write("ALARM something of rank 1\\n")
"""


def test_a_bar_is_drawn_through_mpiexec_and_ctrl_c_stops_behind_a_step(place: Place):
    script = place.faulty_script(SLOW)
    words = place.words("run", None, "train.steps=200", "eval.every=5")
    terminal = Terminal([sys.executable, "-P", "-c", LAUNCH, "2", str(script), *words], place.folder)
    terminal.until(lambda lines: any("ALARM something" in line for line in lines), 60)
    terminal.until(lambda lines: re.match(r"step ━.* 1[2-9]/200 · loss .* · left ", lines[-1]) is not None, 60)
    terminal.type(b"\x03")
    assert terminal.end(30) == 130
    lines = terminal.lines
    assert lines[0] == "training run" and not [line for line in lines if "━" in line], "no bar is left"
    steps = [int(found[1]) for line in lines if (found := re.match(r"step +(\d+)/200  loss .* held-out ", line))]
    assert steps[:2] == [5, 10] and len(set(steps)) == len(steps), f"held-out losses stay, each once: {lines}"
    said = [
        next(at for at, line in enumerate(lines) if text in line)
        for text in (
            "step   5/200",
            "ALARM",
            "Ctrl-C: stopping after this step",
            "stopped after step",
            "weights sha256",
        )
    ]
    assert said == sorted(said), lines
    assert re.search(r"stopped after step \d+ of 200 \(as asked\): the same command goes on", "\n".join(lines))
    assert b"\x1b[?25l" not in terminal.raw, "the cursor stays, whoever is killed"
