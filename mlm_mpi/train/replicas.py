"""Every data-parallel rank holds the same weights and moments; one whose memory says otherwise takes the majority's.

A bit that flips in one rank's memory changes what that rank computes, and through the sum of gradients everybody's
weights, alike on all: ranks differ in what flipped, which is how it is found. What they learned from it stays.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mlm_mpi.backend.arrays import fill, to_host
from mlm_mpi.errors import MlmError, agreed, ranges
from mlm_mpi.params.digest import digest
from mlm_mpi.train.engine import FROZEN, Engine
from mlm_mpi.train.sharing import Lent


def repaired(engine: Engine, step: int) -> tuple[str, ...]:
    """Compares what ranks hold after `step` steps, and mends it; what is to be said of it, on all ranks. Collective.

    Raises MlmError, agreed, where no majority says what is right.
    """
    world, state, columns = engine.world, engine.held(), engine.machine.mesh.columns()
    if engine.group.size == 1:
        return ()
    if engine.machine.owned is not None:  # moments are nobody else's
        shared = {FROZEN} if isinstance(engine.machine.chain.weights, Lent) else {FROZEN, "weights"}
        state = {name: flat for name, flat in state.items() if name in shared}
    mine = np.array([digest(flat) for flat in state.values()], np.uint64)
    everybodys = [tuple(row) for row in world.allgather_array(mine, f"hashes of the weights after step {step}")]
    said = []
    for column in columns:
        held = [everybodys[rank] for rank in column]
        right, count = Counter(held).most_common(1)[0]
        if 2 * count <= len(held):
            raise agreed(
                MlmError(
                    f"ranks hold different weights or moments after step {step}, and no majority says which are right: "
                    "start again to go on from the last checkpoint, and test the memory of their nodes"
                )
            )
        others = [place for place, one in enumerate(held) if one != right]
        wrong = [name for k, name in enumerate(state) if any(held[place][k] != right[k] for place in others)]
        if wrong and world.rank in column:
            _mend(engine, wrong, held.index(right), others)
        if wrong:
            who = ranges(sorted(world.name(column[place]) for place in others))
            where = f"rank {who} held other {', '.join(wrong)} than {count} of {len(held)} ranks"
            said.append(f"ALARM after step {step}: {where}, and has taken theirs: test the memory of its node")
    return tuple(said)


def _mend(engine: Engine, wrong: Sequence[str], source: int, others: Sequence[int]) -> None:
    """Buffers of one rank of dp to others of it. Collective over dp."""
    group, state = engine.group, engine.held()
    for name in wrong:
        host = to_host(state[name])
        group.spread(host, source, f"the {name} of rank {group.name(source)}")
        if group.rank in others:
            fill(state[name], host)
    for store in engine.machine.store.stores:
        store.refresh()
