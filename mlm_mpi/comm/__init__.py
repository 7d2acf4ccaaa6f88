"""Ranks: how they start, wait for each other and sum their gradients."""

import threading
from dataclasses import dataclass
from typing import Literal

from mlm_mpi.config.keys import key


@dataclass(frozen=True)
class Axes:
    """How many ranks share the work along which axis; their product is the number of ranks."""

    dp: int = key(
        0,
        says="So many copies of the model share the micro-batches of a step; 0 means as many as the ranks make.",
        unit="copies",
        least=0,
    )
    pp: int = key(
        1,
        says="A copy of the model is cut into so many stages of a pipeline, a rank or tp ranks each (on the CPU); "
        "train.schedule says in which order they work. The bits are those of one stage.",
        unit="stages",
        least=1,
    )
    chunks: int = key(
        1,
        says="A stage holds so many pieces of the model, with those of other stages between them; train.schedule = "
        "interleaved then stands still for as much less of a step, and sends as many times the messages.",
        unit="pieces",
        least=1,
    )
    tp: int = key(
        1,
        says="So many ranks share a copy of the model: each has some of its heads, features and tokens (on the "
        "CPU). The bits are those of one rank.",
        unit="ranks",
        least=1,
    )
    sequence: bool = key(
        False,
        says="If true, ranks of tp hold a part of the positions each where no sum needs all: norms, residuals, dropout "
        "(sequence parallelism). Less memory, as many bytes sent, the same bits.",
    )
    zero: int = key(
        0,
        says="The ranks of dp share this out (ZeRO, on the CPU): 0 nothing, 1 the optimiser's state, each updating a "
        "range of the weights, 2 the sum of gradients too, 3 the weights too, which come when they are read. The bits "
        "are the same.",
        least=0,
        most=3,
    )


@dataclass(frozen=True)
class Comm:
    """How gradients are summed over the ranks."""

    reduction: str = key(
        "canonical",
        says="Gradients are summed in this way: canonical gives the same bits on any number of ranks, allreduce "
        "leaves the order to the MPI library, nccl sums between GPUs.",
        room="reductions",
    )
    overlap: bool = key(True, says="If true, gradients are sent while the backward of the last micro-batch still runs.")
    bucket_mib: float = key(
        4.0,
        says="A round of messages carries this much of the gradients.",
        unit="MiB",
        least=0.001,
        remedy="every bucket is a message to each rank",
    )
    gpu_aware: Literal["auto", "yes", "no"] = key(
        "auto",
        says="This says whether MPI reads a GPU's memory itself: auto asks the library, and no copies through host "
        "memory.",
    )
    recover: bool = key(
        True,
        says="If true, the job goes on without a rank that has died, or was stopped (SIGSTOP) for a second, to the "
        "same bits: under mlm-mpi run, with an Open MPI 5 that has ULFM.",
    )
    spares: int = key(
        0,
        says="So many ranks have no micro-batches until another one has died; they hold all else, so that the work is "
        "shared by as many as before at once.",
        unit="ranks",
        least=0,
    )
    stall_s: float = key(
        5.0,
        says="A rank that spends ten times as long on a piece of a step as ever, and no less than this (twice where it "
        "sleeps), is shown to have stalled by ranks of its node, or by a process there that looks out for other nodes, "
        "and killed (comm.recover) or the job ended; 0 leaves all to comm.timeout_s, a node that is cut off too.",
        unit="s",
        least=0,
    )
    timeout_s: float = key(
        600.0,
        says="A rank waits this long for the others before it says who is missing, and kills those (comm.recover) or "
        "ends the job.",
        unit="s",
        above=0,
        most=threading.TIMEOUT_MAX,
    )
