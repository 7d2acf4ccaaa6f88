"""Whether a run fits: a lower bound before anything is built, and what is held once it stands."""

import numpy as np
import psutil

from mlm_mpi.backend.arrays import Place
from mlm_mpi.config import Config
from mlm_mpi.errors import ConfigError
from mlm_mpi.train.engine import Engine
from mlm_mpi.train.task import Task

_LEVERS = {
    "parameters": "model.width, model.layers or another size of the model",
    "activations": "train.rows or model.context",
    "evaluation": "eval.rows or model.context", "prefetch": "data.prefetch",
}  # fmt: skip
_PART_BYTES = 10_000  # Python objects of a block and its parameters: 10,152 by tracemalloc, 1,000 blocks of width 8


def check_memory(config: Config, task: Task, moments: int, place: Place, on_node: int = 1) -> None:
    """Refuses what cannot fit where the ranks of a node calculate: a lower bound, made before anything is built.

    `moments`: flat buffers of the optimiser. `on_node`: ranks that share the node. Raises ConfigError.
    """
    needed = least_bytes(config, task, moments)
    each = config.mesh.pp * config.mesh.tp  # ranks that share a copy of the model, each at least so much of it
    needed |= {name: needed[name] // each for name in ("parameters", "activations")}
    present, where, share = psutil.virtual_memory().total, f"this machine, with {on_node} rank(s),", on_node
    if place.on_gpu:
        present, where, share = place.xp.cuda.Device().mem_info[1], "its GPU", 1
    if share * sum(needed.values()) > present:
        parts = ", ".join(f"{name} {value / 2**30:,.1f}" for name, value in needed.items())
        raise ConfigError(
            f"a rank needs at least {sum(needed.values()) / 2**30:,.1f} GiB ({parts}), {where} has "
            f"{present / 2**30:,.1f} GiB: lower {_LEVERS[max(needed, key=lambda name: needed[name])]}"
        )


def least_bytes(config: Config, task: Task, moments: int) -> dict[str, int]:
    """What a rank holds at least, in bytes: parameters with gradients and moments, one array of B·T·C a block, …"""
    size, rows = np.dtype(config.train.dtype).itemsize, config.train.rows
    bf16 = config.numerics.products == "bf16"  # of activations, and of a copy of the weights
    element, copy = (2, 2) if bf16 else (size, 0)
    least = task.least(rows)
    learns_all = not (config.start.freeze or config.start.lora_rank)
    copies = 2 + moments + (config.optim.average > 0) if learns_all else 1
    return {
        "parameters": (copies * size + copy) * least.parameters + least.parts * _PART_BYTES,
        "activations": element * least.kept,
        "evaluation": 2 * element * task.least(config.eval.rows).passing,
        "prefetch": 8 * config.data.prefetch * rows * task.row_tokens,
    }


def bytes_held(engine: Engine) -> dict[str, int]:
    """Bytes of a rank by what holds them, activations left out."""
    store = engine.machine.store
    held = {"weights": store.data[store.kept].nbytes, "gradients": engine.machine.reduction.costs()["held_bytes"]}
    if store.still is not None:
        held["frozen weights"] = store.still.data.nbytes
    if store.working is not store.data:
        held["weights in bf16"] = sum(one.working.nbytes for one in store.stores)
    if engine.second_sums:
        held["second sums of tied weights"] = sum(buffer.nbytes for buffer in engine.second_sums.values())
    optimizer = engine.machine.optimizer
    held["optimiser"] = sum(buffer.nbytes for buffer in optimizer.state().values())
    held["optimiser"] += getattr(optimizer, "work_bytes", 0)  # beside its state, which not every kind needs
    if engine.machine.average is not None:
        held["average of weights"] = engine.machine.average.flat.nbytes
    return held
