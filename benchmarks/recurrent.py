"""An LSTM or GRU layer, forward and backward, against torch.nn.LSTM and torch.nn.GRU of the same size, by pairs.

    python benchmarks/recurrent.py --record        # the environment of the peer: see torch_peer.py

Both have one thread and make every gradient: of x, of both weights and of the biases. CPU time beside wall time: it
does not count what other programs take of the machine.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

LENGTH, WIDTH = 128, 384


def ours(kind: str, rows: int) -> Callable[[], Any]:
    """Forward and backward of one layer of ours."""
    from mlm_mpi.backend import choice
    from mlm_mpi.comm.mesh import Mesh
    from mlm_mpi.layers.base import Context
    from mlm_mpi.layers.recurrent import GRU, LSTM
    from mlm_mpi.params.store import FlatStore

    choice.select()
    choice.keep_freed_memory()  # as the trainer does
    cell = {"lstm": LSTM, "gru": GRU}[kind]("cell", WIDTH, WIDTH**-0.5)
    store = FlatStore([cell.parameters()], Mesh(), "f4")
    store.initialise(0)
    ctx = Context(training=True, gradients=store.by_parameter(store.new_buffer()))
    x, dy = np.random.default_rng(0).standard_normal((2, rows, LENGTH, WIDTH)).astype("f4")

    def run() -> None:
        _, saved = cell.forward(x, ctx)
        cell.backward(dy, saved, ctx)

    return run


def theirs(kind: str, rows: int) -> Callable[[], Any]:
    """The same of PyTorch's layer."""
    import torch

    torch.set_num_threads(1)
    layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](WIDTH, WIDTH, batch_first=True)
    x, dy = torch.randn(rows, LENGTH, WIDTH, requires_grad=True), torch.randn(rows, LENGTH, WIDTH)

    def run() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x)[0].backward(dy)

    return run


def serve(run: Callable[[], Any]) -> None:
    """Runs once for every line of stdin and answers with milliseconds."""
    print(json.dumps({}), flush=True)
    while sys.stdin.readline().strip():
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        print(
            json.dumps({"wall": 1e3 * (time.perf_counter() - wall), "cpu": 1e3 * (time.process_time() - cpu)}),
            flush=True,
        )


def main() -> None:
    import harness

    args = harness.arguments(__doc__).parse_args()
    report = harness.Report("recurrent", f"Recurrent layers, T {LENGTH}, C {WIDTH}, one thread", args)
    report.head(
        "layer", "B", "ours, ms", "PyTorch, ms", "ratio", "ours, CPU ms", "PyTorch, CPU ms", "ratio of CPU time"
    )
    for kind in ("lstm", "gru"):
        for rows in (8, 16):
            workers = [
                harness.Worker([python, __file__, "worker", name, kind, str(rows)], 1)
                for python, name in ((sys.executable, "ours"), (harness.PEER_PYTHON, "theirs"))
            ]
            answers = [[worker.ask(go=1) for worker in workers] for _ in range(args.pairs + 1)][1:]
            cells: list[str] = []
            for clock in ("wall", "cpu"):
                a, b = ([answer[clock] for answer in side] for side in zip(*answers, strict=True))
                medians = f"{statistics.median(a):.1f}", f"{statistics.median(b):.1f}"
                cells += [*medians, f"{harness.pair_ratio(a, b):.2f}"]
            report.row(kind, rows, *cells)
            for worker in workers:
                worker.close()
    report.save()


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        side, kind, rows = sys.argv[2:]
        serve({"ours": ours, "theirs": theirs}[side](kind, int(rows)))
    else:
        main()
