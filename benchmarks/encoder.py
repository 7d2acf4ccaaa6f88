"""The encoder against PyTorch: a block forward and backward, what padding costs, sentences a second. One thread each.

    python benchmarks/encoder.py --pairs 20 --record        # the environment of the peer: see torch_peer.py

block     8 rows of 128 tokens, C 384, 6 heads, F 1536, post-norm, every gradient; nn.TransformerEncoderLayer in eager
          mode and training, without dropout.
padding   the same block over texts of 32 to 128 tokens, 80 on average: ours lie one behind the other, PyTorch's are
          padded to the longest and masked. In parts of the time of full rows, which is 8 · 128 tokens.
predict   4 layers of C 256, 20 labels, texts of 4 to 60 tokens, 64 at a time: from ids to probabilities. PyTorch pads
          each batch to its longest text; its layers have the exact GELU, for which alone they have a fast path in
          inference, and it is measured with that path and without. The faster one counts.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

ROWS, LENGTH, VOCABULARY, LABELS = 8, 128, 4096, 20
BLOCK = {"layers": 1, "width": 384, "heads": 6, "context": LENGTH, "feed_forward": 1536, "dropout": 0.0, "norm": "post"}
MODEL = {"layers": 4, "width": 256, "heads": 4, "context": 64, "feed_forward": 1024, "dropout": 0.0, "norm": "pre"}
SENTENCES, AT_ONCE = 512, 64


def lengths(low: int, high: int, count: int) -> np.ndarray:
    """Of texts. Shapes: -> (count,)."""
    return np.random.default_rng(1).integers(low, high + 1, count)


def ours(what: str) -> Callable[[], Any]:
    """What is measured, of our model."""
    from mlm_mpi.backend import choice
    from mlm_mpi.backend.arrays import cpu
    from mlm_mpi.comm.mesh import Mesh
    from mlm_mpi.data.batch import Batch
    from mlm_mpi.data.labelled import Example
    from mlm_mpi.data.texts import batch_of
    from mlm_mpi.layers.base import Context, Sizes
    from mlm_mpi.layers.chain import Chain
    from mlm_mpi.layers.classes import ClassHead
    from mlm_mpi.models import bert
    from mlm_mpi.params.store import FlatStore

    choice.select()
    choice.keep_freed_memory()  # as the trainer does
    settings = bert.Settings(**(MODEL if what == "predict" else BLOCK)).resolved()
    trunk = bert.build(settings, Sizes(VOCABULARY))
    trunk.table.tied = False
    head = ClassHead(trunk.width, LABELS, bert.final_norm(settings))
    chain = Chain([*trunk.parts, head])
    store = FlatStore(chain.parameter_blocks(), Mesh(), "f4", cpu())
    store.initialise(0)
    draw = np.random.default_rng(0)
    if what == "predict":
        texts = [Example(draw.integers(0, VOCABULARY, n).astype("i4"), 0, 0) for n in lengths(2, 58, SENTENCES)]

        def predict() -> None:
            for start in range(0, SENTENCES, AT_ONCE):
                batch = batch_of(texts[start : start + AT_ONCE], settings.context, 0, False)
                batch.targets.clear()
                chain.forward((), Context(batch=batch))

        return predict
    gradients, block = store.by_parameter(store.new_buffer()), trunk.parts[1]
    ends = np.cumsum(lengths(32, LENGTH, ROWS) if what == "padding" else [LENGTH] * ROWS)
    total = -(-int(ends[-1]) // 8) * 8
    shape = (1, total) if what == "padding" else (ROWS, LENGTH)
    x, dy = draw.standard_normal((2, *shape, settings.width)).astype("f4")
    batch = Batch(0, 0, {}, {}, 1, texts=tuple(ends.tolist()) if what == "padding" else ())
    ctx = Context(training=True, batch=batch, gradients=gradients)

    def run() -> None:
        _, saved = block.forward((x,), ctx)
        block.backward((dy,), saved, ctx)

    return run


def theirs(what: str) -> Callable[[], Any]:
    """The same of PyTorch."""
    import torch
    from torch import nn
    from torch_bert import PeerBert, gelu

    torch.set_num_threads(1)
    if what.startswith("predict"):
        settings = SimpleNamespace(**MODEL, segments=2, norm_epsilon=1e-12)
        model = PeerBert(settings, VOCABULARY, LABELS)
        for block in model.blocks:
            block.activation, block.activation_relu_or_gelu = nn.functional.gelu, 2
        model.eval()
        torch.backends.mha.set_fastpath_enabled(what == "predict, fast path")
        texts = [torch.randint(0, VOCABULARY, (int(n) + 2,)) for n in lengths(2, 58, SENTENCES)]

        def predict() -> None:
            with torch.inference_mode():
                for start in range(0, SENTENCES, AT_ONCE):
                    some = texts[start : start + AT_ONCE]
                    ids = nn.utils.rnn.pad_sequence(some, batch_first=True)
                    sizes = torch.tensor([len(text) for text in some])
                    padding = torch.arange(ids.shape[1])[None, :] >= sizes[:, None]
                    model.logits(ids, padding).softmax(1)

        return predict
    width, heads, inner = (int(BLOCK[name]) for name in ("width", "heads", "feed_forward"))
    block = nn.TransformerEncoderLayer(width, heads, inner, 0.0, gelu, batch_first=True)
    sizes = torch.from_numpy(lengths(32, LENGTH, ROWS)) if what == "padding" else torch.full((ROWS,), LENGTH)
    longest = int(sizes.max())
    x, dy = torch.randn(ROWS, longest, width, requires_grad=True), torch.randn(ROWS, longest, width)
    padding = torch.arange(longest)[None, :] >= sizes[:, None] if what == "padding" else None

    def run() -> None:
        block.zero_grad()
        x.grad = None
        block(x, src_key_padding_mask=padding).backward(dy)

    return run


def serve(run: Callable[[], Any]) -> None:
    """Runs once for every line of stdin and answers with milliseconds of wall and CPU time."""
    print(json.dumps({}), flush=True)
    while sys.stdin.readline().strip():
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        answer = {"wall": 1e3 * (time.perf_counter() - wall), "cpu": 1e3 * (time.process_time() - cpu)}
        print(json.dumps(answer), flush=True)


def main() -> None:
    import harness

    args = harness.arguments(__doc__).parse_args()
    report = harness.Report("encoder", "The encoder beside PyTorch, one thread", args)
    report.head("what", "ours, ms", "PyTorch, ms", "ratio", "ratio of CPU time")
    cases = (
        ("block", "block"),
        ("padding", "padding"),
        ("predict", "predict, fast path"),
        ("predict", "predict, plain"),
    )
    medians: dict[str, tuple[float, float]] = {}
    for what, peer in cases:
        workers = [
            harness.Worker([python, __file__, "worker", name, case], 1)
            for python, name, case in ((sys.executable, "ours", what), (harness.PEER_PYTHON, "theirs", peer))
        ]
        answers = [[worker.ask(go=1) for worker in workers] for _ in range(args.pairs + 2)][2:]
        a, b = ([answer["wall"] for answer in side] for side in zip(*answers, strict=True))
        c, d = ([answer["cpu"] for answer in side] for side in zip(*answers, strict=True))
        medians[peer] = statistics.median(a), statistics.median(b)
        own, other = medians[peer]
        report.row(
            peer, f"{own:.1f}", f"{other:.1f}", f"{harness.pair_ratio(a, b):.2f}", f"{harness.pair_ratio(c, d):.2f}"
        )
        for worker in workers:
            worker.close()
    report.say()
    share = int(lengths(32, LENGTH, ROWS).sum()) / (ROWS * LENGTH)
    report.say(
        f"Texts that fill {share:.2f} of full rows take {medians['padding'][0] / medians['block'][0]:.2f} of their "
        f"time; PyTorch's {medians['padding'][1] / medians['block'][1]:.2f}."
    )
    for peer in ("predict, fast path", "predict, plain"):
        own, other = (SENTENCES / median * 1e3 for median in medians[peer])
        report.say(f"{peer}: {own:,.0f} sentences/s, PyTorch {other:,.0f}.")
    report.save()


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        side, case = sys.argv[2:]
        serve({"ours": ours, "theirs": theirs}[side](case))
    else:
        main()
