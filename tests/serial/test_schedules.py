"""Every schedule of schedules/, proved in one process: what each stage runs, holds, sends and waits for, and how long.

A simulator runs all stages of a pipeline by the clock: a message takes no time, a forward 1, each half of a backward 1.
Sends belong to a mailbox: they are posted and not waited for. `blocking` ones end when the receiver receives.
"""

import itertools
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
from tiny import VOCABULARY, batches, tiny_config
from whole import engine_of

from mlm_mpi.errors import ConfigError
from mlm_mpi.plug import Plugins
from mlm_mpi.schedules import Backward, Forward, Message, check, messages

PLUGINS = Plugins()
KINDS = PLUGINS.kinds("schedules")
CUT = "interleaved"  # takes several chunks a stage


class Case(NamedTuple):
    """A pipeline."""

    kind: str
    stages: int
    micros: int
    chunks: int = 1

    @property
    def orders(self):
        """What each stage runs."""
        return orders_of(self)

    def messages(self, what, stage):
        return messages(what, stage, self.stages, self.chunks)


ALL = {kind: [Case(kind, stages, micros) for stages in range(1, 9) for micros in range(1, 17)] for kind in KINDS}
ALL[CUT] += [
    Case(CUT, stages, micros, chunks)
    for chunks in (2, 3, 4) for stages in range(1, 9) for micros in range(stages, 17, stages)
]  # fmt: skip
# a last group that lacks some: right, no deadlock, no longer than a whole one
UNEVEN = [
    Case(CUT, stages, micros, chunks)
    for chunks in (2, 3, 4) for stages in range(2, 9) for micros in range(1, 17) if micros % stages
]  # fmt: skip


@cache
def orders_of(case: Case):
    chunks = (case.chunks,) if case.kind == CUT else ()
    instructions = PLUGINS.find("schedules", case.kind, "train.schedule").instructions
    return [list(instructions(stage, case.stages, case.micros, *chunks)) for stage in range(case.stages)]


def cost(what) -> int:
    """A backward costs two forwards, as its two products do. Of a chunk."""
    return 2 if isinstance(what, Backward) and what.half == "both" else 1


@cache
def simulated(case: Case) -> tuple[int, set[Message]]:
    """When the last stage is through, and every message that was sent. Fails where no stage can go on."""
    left = [list(reversed(order)) for order in case.orders]
    free, sent = [0] * case.stages, {None: 0}  # what needs no message need not wait
    while any(left):
        before = sum(map(len, left))
        for stage, order in enumerate(left):
            while order and (pair := case.messages(order[-1], stage)).needs in sent:
                free[stage] = max(free[stage], sent[pair.needs]) + cost(order.pop())
                if pair.gives is not None:
                    assert pair.gives not in sent
                    sent[pair.gives] = free[stage]
        assert sum(map(len, left)) < before, f"deadlock: {[order[-1:] for order in left]}"
    return max(free), sent.keys() - {None}


def deadlocks_if_sends_block(case: Case) -> bool:
    """Every stage receives, works and sends in turn; a send meets its receive, as MPI_Ssend and MPI_Recv do."""
    plans = []
    for stage, order in enumerate(case.orders):
        pairs = [case.messages(what, stage) for what in order]
        plans.append([(way, m) for needs, gives in pairs for way, m in (("receive", needs), ("send", gives)) if m])
    at = [0] * case.stages
    while True:
        heads = {plan[place]: stage for stage, (plan, place) in enumerate(zip(plans, at, strict=True)) if plan[place:]}
        if not heads:
            return False
        met = [message for way, message in heads if way == "send" and ("receive", message) in heads]
        if not met:
            return True
        for message, way in itertools.product(met, ("send", "receive")):
            at[heads[way, message]] += 1


def most_live(order, until) -> int:
    """At most so many (micro-batch, chunk) lie between their forward and the last half in `until`."""
    live = most = 0
    for what in order:
        live += isinstance(what, Forward) - (isinstance(what, Backward) and what.half in until)
        most = max(most, live)
    return most


WHOLE, INPUT, WEIGHT = ("both",), ("both", "input"), ("both", "weight")


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_runs_everything_in_micro_batch_order(kind):
    """Gradients leave in that order, of every stage and chunk: it alone keeps the sum the same under any schedule."""
    for case in [*ALL[kind], *(UNEVEN if kind == CUT else [])]:
        for order in case.orders:
            check(order, case.micros, kind, case.chunks)
            for chunk in range(case.chunks):
                through = [what for what in order if what.chunk == chunk]
                forwards = [what.micro for what in through if isinstance(what, Forward)]
                backwards = [what for what in through if isinstance(what, Backward)]
                halves = [[what.micro for what in backwards if what.half in half] for half in (INPUT, WEIGHT)]
                assert [forwards, *halves] == [list(range(case.micros))] * 3, case


@pytest.mark.parametrize("kind", KINDS)
def test_no_pipeline_deadlocks_and_messages_keep_their_order(kind):
    """Every message is sent once and received once; between two stages each way's arrive in the order of receipt."""
    for case in [*ALL[kind], *(UNEVEN if kind == CUT else [])]:
        _, sent = simulated(case)
        posted, received = {}, {}
        for stage, order in enumerate(case.orders):
            for what in order:
                way = isinstance(what, Forward)
                needs, gives = case.messages(what, stage)
                if needs:
                    assert needs.dest % case.stages == stage
                    received.setdefault((way, needs.source % case.stages, stage), []).append(needs)
                if gives:
                    assert gives.source % case.stages == stage
                    posted.setdefault((way, stage, gives.dest % case.stages), []).append(gives)
        assert posted == received, case
        assert sorted(sent) == sorted(itertools.chain(*received.values()))
        assert len(sent) == 2 * case.micros * (case.stages * case.chunks - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_which_pipelines_would_deadlock_if_sends_blocked(kind):
    """A stage sends forward while the next sends back: a mailbox must own sends of all but `single` and `gpipe`.

    Several chunks block with one micro-batch too: all stages may send on in a ring, one stage alone to itself.
    """
    for case in ALL[kind]:
        safe = kind in ("single", "gpipe") or (case.chunks == 1 and 1 in (case.stages, case.micros))
        assert deadlocks_if_sends_block(case) is not safe, case


# how long the pipeline stands still, in the time of a forward of a chunk
BUBBLES = {
    "single": lambda case: 3 * (case.stages - 1) * case.micros,
    "gpipe": lambda case: 3 * (case.stages - 1),
    "one_f_one_b": lambda case: 3 * (case.stages - 1),
    "interleaved": lambda case: 3 * (case.stages - 1),  # of chunks: by their number less of a stage's time
    # (P − 1)(F + B − W); with fewer micro-batches than stages the way there and back of the last one is longer
    "zero_bubble": lambda case: (case.stages - 1) + max(case.stages - case.micros, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_stands_still_for_as_long_as_theory_says(kind):
    for case in ALL[kind]:
        assert simulated(case)[0] == 3 * case.micros * case.chunks + BUBBLES[kind](case), case


# (micro-batch, chunk)s whose activations stage `stage` holds at most
LIVE = {
    "single": lambda case, stage: 1,
    "gpipe": lambda case, stage: case.micros,
    "one_f_one_b": lambda case, stage: min(case.stages - stage, case.micros),
    "interleaved": lambda case, stage: min(
        2 * (case.stages - stage - 1) + (case.chunks - 1) * case.stages + 1 if case.chunks > 1 else case.stages - stage,
        case.micros * case.chunks,
    ),
    "zero_bubble": lambda case, stage: min(case.stages - stage, case.micros),
}


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_bounded(kind):
    for case in ALL[kind]:
        for stage, order in enumerate(case.orders):
            assert most_live(order, INPUT) == LIVE[kind](case, stage), case


def test_what_weight_halves_wait_with_is_no_more_than_the_first_stage_of_1f1b_holds():
    """ZB-H1's bound, "p·M_B" in the paper's table."""
    for case in ALL["zero_bubble"]:
        assert [most_live(order, WEIGHT) for order in case.orders] == [min(case.stages, case.micros)] * case.stages


F, B = Forward, Backward


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([F(0), B(0), F(1)], "runs 2 forwards, 1 input halves and 1 weight halves of 2 micro-batches"),
        ([F(0), F(1), B(1), B(0)], "Backward(micro=1, chunk=0, half='both') comes out of turn"),
        ([B(0), F(0), F(1), B(1)], "Backward(micro=0, chunk=0, half='both') comes out of turn"),
        ([F(0), B(0), F(1), B(1), F(2)], "Forward(micro=2, chunk=0) comes out of turn"),
        ([F(0), B(0), B(0), F(1), B(1)], "Backward(micro=0, chunk=0, half='both') comes out of turn"),
        ([], "runs 0 forwards"),
        ([F(0), B(0, half="weight")], "half='weight') comes out of turn"),
        ([F(0), B(0, half="input"), B(0)], "half='both') comes out of turn"),
        ([F(0), B(0), B(0, half="weight")], "half='weight') comes out of turn"),
        ([F(0), F(1), B(0, half="input"), B(1)], "Backward(micro=1, chunk=0, half='both') comes out of turn"),
        ([F(0), F(1), B(1, half="input")], "Backward(micro=1, chunk=0, half='input') comes out of turn"),
        ([F(0), B(0, half="inputs")], "half='inputs') comes out of turn"),
        ([F(0), F(1), B(0), B(1, half="input")], "2 forwards, 2 input halves and 1 weight halves of 2"),
        ([F(0), F(0, 1)], "Forward(micro=0, chunk=1) comes out of turn"),
    ],
)
def test_a_schedule_that_forgets_is_refused_before_the_first_step(order, said):
    with pytest.raises(ConfigError) as refused:
        check(order, 2, "mine")
    assert said in str(refused.value) and refused.value.agreed
    check([F(0), F(1), B(0), B(1)], 2, "mine")
    check([F(0), B(0, half="input"), F(1), B(0, half="weight"), B(1)], 2, "mine")


def test_a_schedule_that_forgets_a_chunk_is_refused_too():
    with pytest.raises(ConfigError, match=r"runs 0 forwards, .* of 1 micro-batches through chunk 1"):
        check([F(0), B(0)], 1, "mine", chunks=2)
    check([F(0), F(0, 1), B(0, 1), B(0)], 1, "mine", chunks=2)


def test_a_last_group_that_lacks_some_takes_no_longer_than_a_whole_one():
    """And needs no more memory: what is left out by the guard may be any."""
    for case in UNEVEN:
        whole = case._replace(micros=-(-case.micros // case.stages) * case.stages)
        assert simulated(case)[0] <= simulated(whole)[0], case
        for stage, order in enumerate(case.orders):
            assert most_live(order, INPUT) <= LIVE[CUT](case, stage), case
    assert not list(PLUGINS.find("schedules", CUT, "train.schedule").instructions(1, 2, 0, 2))


def test_messages_of_the_ends_and_of_a_chunk_that_wraps():
    assert messages(F(3), 0, 4) == (None, Message(3, 0, 1))
    assert messages(F(3), 3, 4) == (Message(3, 2, 3), None) == messages(F(3), 3, 4, chunks=1)
    assert messages(F(3), 3, 4, chunks=2) == (Message(3, 2, 3), Message(3, 3, 4)), "stage 3's first chunk to stage 0"
    assert messages(B(3, 1), 0, 4, chunks=2) == (Message(3, 5, 4), Message(3, 4, 3)), "and back"
    assert messages(B(3, half="input"), 1, 4) == messages(B(3), 1, 4) == (Message(3, 2, 1), Message(3, 1, 0))
    assert messages(B(3, half="weight"), 1, 4) == (None, None)


def trained(schedule, instructions=None):
    """Losses, norms and the digest of weights after two steps of one stage."""
    config = tiny_config(f"train.schedule={schedule}", "train.steps=2")
    engine = engine_of(config, VOCABULARY)
    if instructions is not None:
        engine.machine = replace(engine.machine, instructions=instructions)
    engine.machine.store.initialise(config.train.seed)
    source = batches(config, engine.plan(0, 2))
    results = [engine.step(step, source) for step in range(2)]
    return [(r.loss, r.gradient_norm) for r in results], engine.machine.store.weights_sha256()


@pytest.fixture(scope="module")
def alone():
    return trained("single")


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_trains_the_same_bits(kind, alone):
    assert trained(kind) == alone


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("one_f_one_b", 0), ("one_f_one_b", 2), ("zero_bubble", 0), ("zero_bubble", 2), ("zero_bubble", 3)],
)
def test_the_order_of_a_stage_of_four_trains_the_same_bits(kind, stage, alone):
    """Weight halves come in other lanes than the input halves just before: no lane is open for those."""
    order = PLUGINS.find("schedules", kind, "train.schedule").instructions
    assert trained("single", lambda _, __, micros: order(stage, 4, micros)) == alone
