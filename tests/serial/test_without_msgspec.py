"""A training step needs NumPy only: the machines of `make gpu-check` have no msgspec."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

STEP = """
import numpy as np

from mlm_mpi.backend import choice
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.data.batch import Batch
from mlm_mpi.layers.base import Context, Sizes
from mlm_mpi.layers.chain import Chain
from mlm_mpi.layers.head import TokenHead
from mlm_mpi.models import gpt
from mlm_mpi.optim import adamw
from mlm_mpi.params.clip import clip_factor, norm
from mlm_mpi.params.store import FlatStore

model = gpt.Settings(layers=1, width=8, heads=2, context=4).resolved()
choice.select()
trunk = gpt.build(model, Sizes(11))
chain = Chain([*trunk.parts, TokenHead(trunk)])
store = FlatStore(chain.parameter_blocks(), Mesh(), "float32")
store.initialise(0)
optimizer, gradient = adamw.build(adamw.Settings(), store, Mesh()), store.new_buffer()
ids = np.arange(8, dtype=np.int32).reshape(2, 4)
losses = []
for number in range(1, 4):
    batch = Batch(0, 0, {"ids": ids}, {"ids": ids + 1}, ids.size)
    ctx = Context(training=True, batch=batch, gradients=store.by_parameter(gradient))
    _, kept = chain.forward((), ctx)
    chain.backward((), kept, ctx)
    losses.append(float(ctx.tally["loss"]))
    length, broken = norm(store, gradient)
    assert broken is None
    optimizer.step(gradient, 1e-2, clip_factor(1.0, length / 8) / 8, number)
assert losses[0] > losses[1] > losses[2], losses
"""


def test_a_step_of_gpt_needs_no_msgspec(tmp_path):
    (tmp_path / "msgspec.py").write_text("raise ImportError('this machine has no msgspec')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ended = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
