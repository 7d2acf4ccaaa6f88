"""Every data-parallel rank holds the same weights and moments; one whose memory says otherwise takes the majority's.

A bit that flips in one rank's memory changes what that rank computes, and through the sum of gradients everybody's
weights, alike on all: ranks differ in what flipped, which is how it is found. What they learned from it stays.
"""

from collections import Counter

import numpy as np

from mlm_mpi.backend.arrays import fill, to_host
from mlm_mpi.errors import MlmError, agreed, ranges
from mlm_mpi.params.digest import digest
from mlm_mpi.train.engine import Engine


def repaired(engine: Engine, step: int) -> tuple[str, ...]:
    """Compares what ranks hold after `step` steps, and mends it; what is to be said of it, on all ranks. Collective.

    Raises MlmError, agreed, where no majority says what is right.
    """
    group, state = engine.group, engine.state()
    if group.size == 1:
        return ()
    mine = np.array([digest(flat) for flat in state.values()], np.uint64)
    everybodys = [tuple(row) for row in group.allgather_array(mine, f"hashes of the weights after step {step}")]
    right, count = Counter(everybodys).most_common(1)[0]
    if count == group.size:
        return ()
    if 2 * count <= group.size:
        raise agreed(
            MlmError(
                f"ranks hold different weights or moments after step {step}, and no majority says which are right: "
                "start again to go on from the last checkpoint, and test the memory of their nodes"
            )
        )
    source = everybodys.index(right)
    others = [rank for rank, held in enumerate(everybodys) if held != right]
    wrong = [name for k, name in enumerate(state) if any(everybodys[rank][k] != right[k] for rank in others)]
    for name in wrong:
        host = to_host(state[name])
        group.spread(host, source, f"the {name} of rank {group.name(source)}")
        if group.rank in others:
            fill(state[name], host)
    engine.machine.store.refresh()
    who = ranges(sorted(group.name(rank) for rank in others))
    where = f"rank {who} held other {', '.join(wrong)} than {count} of {group.size} ranks"
    return (f"ALARM after step {step}: {where}, and has taken theirs: test the memory of its node",)
