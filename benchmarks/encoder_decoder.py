"""An encoder-decoder against PyTorch's eager mode: steps of training, and beam search. One thread each.

    python benchmarks/encoder_decoder.py --pairs 16 --record        # the environment of the peer: see torch_peer.py

Both have the same weights and the same texts, and the losses and the texts that they find are compared first.

steps     forward and backward, every gradient, of 3 + 3 blocks of C 384, 6 heads, V 8192, over 32 pairs, 16 at a time.
          `mixed`: sources of 16 to 64 tokens, targets a quarter longer or shorter at most. Ours come as a sampler draws
          them; PyTorch's are sorted by length before they are cut into batches, and padded. `even`: all are of 40
          tokens, and nobody pads. "Memory kept": PyTorch may keep what it frees, as ours does (backend/choice.py).
beams     16 sources, 4 hypotheses each, 40 tokens written: sentences a second. The end of text has a row of zeros in
          the table, so that it is never likely and all searches have the same steps. Sources are of 40 tokens, or
          ("mixed") of 16 to 64, which PyTorch pads. PyTorch repeats a memory for each hypothesis, as is usual, or
          ("grouped") takes the hypotheses of a source as so many queries of one memory.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

VOCABULARY, END, PAIRS, AT_ONCE = 8192, 0, 32, 16
MODEL = {
    "layers": 3, "decoder_layers": 3, "width": 384, "heads": 6, "context": 64, "feed_forward": 1536, "dropout": 0.0,
    "init_std": 0.05, "norm_epsilon": 1e-5,
}  # fmt: skip
SOURCES, WIDTH, STEPS, EVEN = 16, 4, 40, 40
CASES = {  # of PyTorch, by ours
    "mixed": ("mixed", "mixed, memory kept"),
    "even": ("even",),
    "beams": ("beams", "beams, grouped"),
    "mixed beams": ("mixed beams", "mixed beams, grouped"),
}


def lengths(case: str) -> list[tuple[int, int]]:
    """Of sources and targets."""
    draw = np.random.default_rng(1)
    if case != "mixed":
        return [(EVEN, EVEN)] * PAIRS
    sources = draw.integers(16, 65, PAIRS)
    targets = np.rint(sources * draw.uniform(0.75, 1.25, PAIRS)).astype(int).clip(8, 64)
    return list(zip(sources.tolist(), targets.tolist(), strict=True))


def tokens(*sizes: int) -> list[np.ndarray]:
    """Texts of these sizes, int32, without ends."""
    draw = np.random.default_rng(2)
    return [draw.integers(1, VOCABULARY, size).astype(np.int32) for size in sizes]


def texts(case: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(source, target) of each pair."""
    sources, targets = zip(*lengths(case), strict=True)
    found = tokens(*sources, *targets)
    return list(zip(found[:PAIRS], found[PAIRS:], strict=True))


def sources(case: str) -> list[np.ndarray]:
    """Of the beams."""
    mixed = np.random.default_rng(3).integers(16, 65, SOURCES).tolist()
    return tokens(*mixed if case.startswith("mixed") else [EVEN] * SOURCES)


def ours(case: str, weights: str) -> tuple[Callable[[], Any], Any]:
    """What is measured, of our model, whose weights are written to a file; and what it has found."""
    from mlm_mpi.backend import choice
    from mlm_mpi.backend.arrays import cpu
    from mlm_mpi.beams import Beams, written
    from mlm_mpi.comm.mesh import Mesh
    from mlm_mpi.data.translation import Pair, pairs_batch
    from mlm_mpi.layers.base import Context, Sizes
    from mlm_mpi.layers.chain import Chain
    from mlm_mpi.layers.head import TokenHead
    from mlm_mpi.models import encoder_decoder
    from mlm_mpi.params.store import FlatStore

    choice.select()
    choice.keep_freed_memory()  # as the trainer does
    trunk = encoder_decoder.build(encoder_decoder.Settings(**MODEL), Sizes(VOCABULARY))
    chain = Chain([*trunk.parts, TokenHead(trunk)])
    store = FlatStore(chain.parameter_blocks(), Mesh(), "f4", cpu())
    store.initialise(0)
    trunk.table.data[END] = 0.0
    np.savez(weights, **store.named(store.data))
    if case.endswith("beams"):
        some = sources(case)

        def search() -> list[list[int]]:
            return written(chain, some, STEPS, END, Beams(WIDTH))

        return search, search()
    gradients = store.by_parameter(store.new_buffer())
    end = np.array([END], np.int32)
    pairs = [Pair(source, np.concatenate([end, target[:-1]]), target) for source, target in texts(case)]
    batches = []
    for start in range(0, PAIRS, AT_ONCE):
        some = sorted(pairs[start : start + AT_ONCE], key=lambda pair: (len(pair.source), len(pair.read)))
        batches.append(pairs_batch(some, END))

    def run() -> float:
        loss = 0.0
        for batch in batches:
            ctx = Context(training=True, batch=batch, gradients=gradients)
            _, kept = chain.forward((), ctx)
            chain.backward((), kept, ctx)
            loss += float(ctx.tally["loss"])
        return loss

    return run, run()


def theirs(case: str, weights: str) -> tuple[Callable[[], Any], Any]:
    """The same of PyTorch."""
    import torch
    from torch_encoder_decoder import PeerEncoderDecoder, written

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    if case.endswith("memory kept"):
        sys.path.append(str(Path(__file__).parents[1]))
        from mlm_mpi.backend.choice import keep_freed_memory

        keep_freed_memory()
    model = PeerEncoderDecoder(SimpleNamespace(**MODEL), VOCABULARY)
    model.load(np.load(weights))
    pad = torch.nn.utils.rnn.pad_sequence
    if "beams" in case:
        some = [torch.from_numpy(ids).long() for ids in sources(case)]
        there = pad([torch.ones(len(ids), dtype=torch.bool) for ids in some], True)
        batch = pad(some, True), None if there.all() else there

        def search() -> list[list[int]]:
            return written(model, *batch, END, WIDTH, STEPS, case.endswith("grouped")).tolist()

        return search, search()
    pairs = sorted(texts(case.partition(",")[0]), key=lambda pair: (len(pair[0]), len(pair[1])))
    batches = []
    for start in range(0, PAIRS, AT_ONCE):
        columns = zip(*pairs[start : start + AT_ONCE], strict=True)
        read, targets = ([torch.from_numpy(text).long() for text in side] for side in columns)
        wanted = pad(targets, True)
        behind = torch.nn.functional.pad(wanted[:, :-1], (1, 0), value=END)
        there = [pad([torch.ones(len(text), dtype=torch.bool) for text in side], True) for side in (read, targets)]
        masks = [None if mask.all() else mask for mask in there]
        batches.append((pad(read, True), behind, wanted, *masks))

    def run() -> float:
        loss = 0.0
        for batch in batches:
            model.zero_grad()
            found = model.loss(*batch)
            found.backward()
            loss += float(found.detach())
        return loss

    return run, run()


def serve(run: Callable[[], Any], found: Any) -> None:
    """Says what was found; runs once for every line of stdin and answers with milliseconds of wall and CPU time."""
    print(json.dumps({"found": found}), flush=True)
    while sys.stdin.readline().strip():
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        answer = {"wall": 1e3 * (time.perf_counter() - wall), "cpu": 1e3 * (time.process_time() - cpu)}
        print(json.dumps(answer), flush=True)


def agreement(case: str, own: Any, other: Any) -> str:
    """How far both have found the same."""
    if case.endswith("beams"):
        return f"{sum(a == b for a, b in zip(own, other, strict=True))} of {len(own)} texts are the same"
    return f"the losses differ by {abs(own - other) / own:.0e} of theirs"


def main() -> None:
    import harness
    from recovery_price import interval

    parser = harness.arguments(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="of the table")
    args = parser.parse_args()
    report = harness.Report("encoder-decoder", "The encoder-decoder beside PyTorch, one thread", args)
    report.head("what", "ours, ms", "PyTorch, ms", "ratio (95 %)", "ratio of CPU time (95 %)")
    said = []
    for case in args.cases:
        for peer in CASES[case]:
            with tempfile.TemporaryDirectory() as folder:
                weights = str(Path(folder, "weights.npz"))
                workers = [
                    harness.Worker([python, __file__, "worker", side, name, weights], 1)
                    for python, side, name in ((sys.executable, "ours", case), (harness.PEER_PYTHON, "theirs", peer))
                ]
            said.append(f"{peer}: {agreement(case, *(worker.hello['found'] for worker in workers))}")
            answers = [[worker.ask(go=1) for worker in workers] for _ in range(args.pairs + 1)][1:]
            for worker in workers:
                worker.close()
            cells, medians = [], [0.0, 0.0]
            for clock in ("cpu", "wall"):
                a, b = ([answer[clock] for answer in side] for side in zip(*answers, strict=True))
                ratio, (low, high) = harness.pair_ratio(a, b), interval([y / x for x, y in zip(a, b, strict=True)])
                cells.insert(0, f"{ratio:.3f} ({low:.3f}, {high:.3f})")
                medians = [statistics.median(a), statistics.median(b)]
            report.row(peer, *(f"{median:.0f}" for median in medians), *cells)
            if case.endswith("beams"):
                own, other = (SOURCES / median * 1e3 for median in medians)
                said[-1] += f"; {own:.1f} sentences/s, PyTorch {other:.1f}"
    report.say()
    report.say(f"Load {os.getloadavg()[0]:.2f} at the end, of which these two, by turns, are 1.")
    for line in said:
        report.say(f"{line}.")
    report.save()


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        side, case, weights = sys.argv[2:]
        serve(*{"ours": ours, "theirs": theirs}[side](case, weights))
    else:
        main()
