"""Sends the numbers of a run to Weights & Biases: a program of its own, which `Wandb` in sinks.py starts.

In a session of its own it has no terminal to ask for a login, and neither its service, which inherits what it has open,
nor a network that hangs can hold up a rank or its launcher. It imports nothing of mlm_mpi.

stdin: a line of JSON about the run, a line for each step, `null` at a good end. stdout: "note …" or "failed …".
"""

import json
import os
import queue
import sys
import threading
from typing import Any

_BEHIND = 100_000  # steps that may wait here, 40 MiB


def _read(lines: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        lines.put(line)
    lines.put("")


def _start(folder: str, about: dict[str, Any]) -> Any:
    """The run at the service; on disk where it cannot be reached."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, init_timeout=20)
    about = about | {"dir": folder, "resume": "allow", "settings": settings}
    try:
        return wandb.init(**about)
    except wandb.Error as error:  # no API key, no network
        reason = str(error).partition("\n")[0].rstrip(".")
        wandb.teardown()  # a service of its own still holds the run's id
        run = wandb.init(**about, mode="offline")
        print(f"note {reason}: kept on disk, send it by: wandb sync {folder}/wandb/offline-run-*", flush=True)
        return run


def main() -> None:
    """Sends until stdin ends, then for at most `patience_s` more."""
    lines: queue.Queue[str] = queue.Queue(_BEHIND)
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    job = json.loads(lines.get())
    run = _start(job["folder"], job["about"])
    while (line := lines.get()).strip() not in ("null", ""):
        values = json.loads(line)
        run.log(values, step=values["step"])
    limit = threading.Timer(job["patience_s"], os._exit, [1])
    limit.daemon = True
    limit.start()
    run.finish(exit_code=0 if line else 1)


if __name__ == "__main__":
    try:
        main()
    except Exception as problem:  # whatever the package raises: the run goes on without it
        print(f"failed {' '.join(str(problem).split()) or type(problem).__name__}", flush=True)
        os._exit(1)
