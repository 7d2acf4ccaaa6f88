"""A rank that something goes wrong inside of: `python -m mlm_mpi.chaos.inside PLAN train …`, started by `chaos/job.py`.

PLAN is a `faults.Plan` as JSON. A rank says what is about to happen before it does.
"""

import json
import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mlm_mpi.chaos.faults import Plan
from mlm_mpi.chaos.job import STRUCK
from mlm_mpi.comm import launch
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mailbox import Mailbox
from mlm_mpi.layers.chain import Chain
from mlm_mpi.train import part as part_file
from mlm_mpi.train.engine import Engine

_MANY = 16  # messages under way
_ROOM_BYTES = 1 << 15  # of a file: a line of metrics has room, a checkpoint's part has none
_DISK_STEPS = 2


def _say(plan: Plan, what: str) -> None:
    os.write(2, f"{STRUCK}rank {launch.announced()[0]}, step {plan.step + 1}: {what}\n".encode())


def _die(plan: Plan, what: str) -> None:
    _say(plan, what)
    os.kill(os.getpid(), signal.SIGKILL)


def _in_step(plan: Plan, act: Callable[[], None]) -> None:
    """Before step number `plan.step`."""
    inner = Engine.step

    def step(self: Engine, number: int, *rest: Any) -> Any:
        if number == plan.step:
            act()
        return inner(self, number, *rest)

    Engine.step = step  # type: ignore[method-assign, assignment]


def _collective(plan: Plan) -> None:
    """The first wait for all in that step, and a moment of it."""
    armed = []
    _in_step(plan, lambda: armed.append(True))
    inner = Group.allgather_array

    def allgather_array(self: Group, row: np.ndarray, what: str) -> np.ndarray:
        if armed:
            _say(plan, what)
            timer = threading.Timer(0.002 * plan.delay, os.kill, (os.getpid(), signal.SIGKILL))
            timer.start()
            found = inner(self, row, what)
            time.sleep(1.0)  # it was faster than its death
            return found
        return inner(self, row, what)

    Group.allgather_array = allgather_array  # type: ignore[method-assign]


def _in_flight(plan: Plan) -> None:
    armed = []
    _in_step(plan, lambda: armed.append(True))
    inner = Mailbox.begin

    def begin(self: Mailbox, *words: Any, **more: Any) -> Any:
        message = inner(self, *words, **more)
        if armed and sum(other.request is not None for other in self._under_way) >= _MANY:
            _die(plan, f"{_MANY} messages are under way")
        return message

    Mailbox.begin = begin  # type: ignore[method-assign]


def _save(plan: Plan) -> None:
    """In the first save after that step, while its part is written."""
    armed = []
    _in_step(plan, lambda: armed.append(True))
    inner = part_file.write

    def write(descriptor: int, *rest: Any) -> Any:
        if armed:
            found = inner(descriptor, *rest)
            os.ftruncate(descriptor, found[0] // 2)
            _die(plan, "a part is half written")
        return inner(descriptor, *rest)

    part_file.write = write  # type: ignore[assignment]


def _memory(plan: Plan) -> None:
    def act() -> None:
        _say(plan, "no more memory")
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)
        np.ones(1 << 28)

    _in_step(plan, act)


def _raise(plan: Plan) -> None:
    def act() -> None:
        _say(plan, "raises")
        raise ZeroDivisionError("injected")

    _in_step(plan, act)


def _exit(plan: Plan) -> None:
    def act() -> None:
        _say(plan, "sys.exit(1)")
        sys.exit(1)

    _in_step(plan, act)


def _leave(plan: Plan) -> None:
    def act() -> None:
        _say(plan, "os._exit(3)")
        os._exit(3)

    _in_step(plan, act)


def _spin(plan: Plan) -> None:
    """In the first forward of that step, as a model's own code might."""

    def spoil(found: Any, ctx: Any) -> None:
        _say(plan, "an endless loop")
        while True:
            pass

    _in_forward(plan, spoil, lambda ctx: ctx.step == plan.step and ctx.training)


def _in_forward(plan: Plan, spoil: Callable[[Any, Any], None], wanted: Callable[[Any], bool]) -> None:
    inner = Chain.forward

    def forward(self: Chain, x: Any, ctx: Any) -> Any:
        found = inner(self, x, ctx)
        if wanted(ctx):
            spoil(found, ctx)
        return found

    Chain.forward = forward  # type: ignore[method-assign]


def _poison(plan: Plan) -> None:
    def spoil(found: Any, ctx: Any) -> None:
        _say(plan, f"micro-batch {ctx.micro_batch} raises")
        raise ZeroDivisionError("injected")

    _in_forward(plan, spoil, lambda ctx: ctx.training and _is_chosen(plan, ctx))


def _is_chosen(plan: Plan, ctx: Any) -> bool:
    """One micro-batch of the step: every rank chooses the same."""
    return bool(ctx.step == plan.step and ctx.micro_batch == int(4 * plan.delay))


def _spoiled(plan: Plan, spoil: Callable[[Any], None], times: int, wanted: Callable[[Any], bool]) -> None:
    """The gradient of the last block's first parameter, before it leaves."""
    inner, left = Chain.backward, [times]

    def backward(self: Chain, dy: Any, kept: Any, ctx: Any, *rest: Any) -> Any:
        given = rest[0] if rest else lambda number: None

        def ready(number: int) -> None:
            if number == len(self.parts) - 2 and wanted(ctx) and left[0] > 0:
                left[0] -= 1
                _say(plan, f"the gradient of micro-batch {ctx.micro_batch} is spoiled")
                spoil(ctx.grad(self.parts[number].parameters()[0]))
            given(number)

        return inner(self, dy, kept, ctx, ready, *rest[1:])

    Chain.backward = backward  # type: ignore[method-assign, assignment]


def _nan(plan: Plan) -> None:
    _spoiled(plan, lambda gradient: gradient.fill(np.nan), 1, lambda ctx: ctx.step == plan.step)


def _spike(plan: Plan) -> None:
    """Of what has no level before its 16th step nothing is a spike: then it is an infinity."""
    value = 1e6 if plan.step >= 16 else np.inf
    _spoiled(plan, lambda gradient: gradient.fill(value), 1, lambda ctx: ctx.step == plan.step)


def _nan_rank(plan: Plan) -> None:
    _spoiled(plan, lambda gradient: gradient.fill(np.nan), 1 << 30, lambda ctx: ctx.step >= plan.step)


def _nan_data(plan: Plan) -> None:
    _spoiled(plan, lambda gradient: gradient.fill(np.nan), 1 << 30, lambda ctx: _is_chosen(plan, ctx))


def _left_out(plan: Plan) -> None:
    """What a run must come to that did without the micro-batch of nan-data."""
    inner = Engine.plan

    def planned(self: Engine, *words: Any) -> Any:
        self.quarantine[plan.step, int(4 * plan.delay)] = "left out"
        return inner(self, *words)

    Engine.plan = planned  # type: ignore[method-assign, assignment]


def _flip(plan: Plan) -> None:
    """After that step's update, before anything is compared or saved."""
    inner = Engine.step

    def step(self: Engine, number: int, *rest: Any) -> Any:
        found = inner(self, number, *rest)
        if number == plan.step:
            _say(plan, "a bit flips")
            weights = self.machine.store.data.view(np.uint32)
            weights[int(plan.delay * (weights.size - 1))] ^= np.uint32(1 << int(31 * plan.delay))
        return found

    Engine.step = step  # type: ignore[method-assign, assignment]


def _disk(plan: Plan) -> None:
    inner, usual = Engine.step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(self: Engine, number: int, *rest: Any) -> Any:
        if number == plan.step:
            _say(plan, "no room on the disk")
            resource.setrlimit(resource.RLIMIT_FSIZE, (_ROOM_BYTES, usual[1]))
        if number == plan.step + _DISK_STEPS:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        return inner(self, number, *rest)

    Engine.step = step  # type: ignore[method-assign, assignment]


ACTS = {
    "collective": _collective, "in-flight": _in_flight, "save": _save, "memory": _memory, "raise": _raise,
    "exit": _exit, "leave": _leave, "spin": _spin, "poison": _poison, "disk": _disk, "nan": _nan, "spike": _spike,
    "nan-rank": _nan_rank, "nan-data": _nan_data, "left-out": _left_out, "flip": _flip,
}  # fmt: skip


def main() -> None:
    """The training, spoiled where this rank is one of the victims."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    plan = Plan(**json.loads(sys.argv.pop(1)))
    if launch.announced()[0] in plan.victims:
        ACTS[plan.fault](plan)
    runpy.run_module("mlm_mpi", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
