"""Times on the device by events, several calls between two of them, variants in turn."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SAMPLE_MS = 3.0  # of device time in a sample; a call that takes longer is a sample of its own
MOST_CALLS = 40
SLOW_MS = (20.0, 1000.0)  # a slower variant is sampled a few times; a still slower one is timed once
FEW = 3
LEAD_BYTES = 256 << 20


class Clock:
    """Measures calls back to back. The host gets a head start, so that launching costs no device time.

    Before a sample, copies of a large buffer are queued for as long as the host needs to launch the sample. They also
    push the inputs out of the L2 cache.
    """

    def __init__(self, xp: Any, lead_bytes: int = LEAD_BYTES) -> None:
        self._xp = xp
        self._buffers = xp.zeros(lead_bytes, "u1"), xp.zeros(lead_bytes, "u1")
        self._wait_ms = 1e-3
        for _ in range(3):
            self._wait_ms = max(1e-3, self._sample([self._wait], 1, 0.0))

    def _wait(self) -> None:
        self._xp.copyto(*self._buffers)

    def _sample(self, runs: Sequence[Callable[[], Any]], calls: int, lead_ms: float) -> float:
        """Milliseconds a call; the inputs of one call after another."""
        for _ in range(min(64, round(lead_ms / self._wait_ms + 0.5))):
            self._wait()
        start, stop = self._xp.cuda.Event(), self._xp.cuda.Event()
        start.record()
        for number in range(calls):
            runs[number % len(runs)]()
        stop.record()
        stop.synchronize()
        return float(self._xp.cuda.get_elapsed_time(start, stop)) / calls

    def compare(
        self, variants: Mapping[str, Sequence[Callable[[], Any]]], repeats: int, rarely: Sequence[str] = ()
    ) -> dict[str, list[float]]:
        """Name -> milliseconds a call, one number a sample. A variant is one call for each set of inputs.

        `rarely`: variants that are worth a few samples only.
        """
        times: dict[str, list[float]] = {}
        plans = {}
        for name, runs in variants.items():
            for run in runs:  # what is compiled, allocated or chosen at the first call
                run()
            first = self._sample(runs, 1, 0.0)
            if first > SLOW_MS[1]:
                times[name] = [first]
                continue
            calls = max(1, min(MOST_CALLS, round(SAMPLE_MS / max(first, 1e-3))))
            began = time.perf_counter()
            for number in range(calls):
                runs[number % len(runs)]()
            lead_ms = 1.2e3 * (time.perf_counter() - began)
            times[name] = []
            plans[name] = runs, calls, lead_ms, FEW if first > SLOW_MS[0] or name in rarely else repeats
        for number in range(repeats):
            for name, (runs, calls, lead_ms, most) in plans.items():
                if number < most:
                    times[name].append(self._sample(runs, calls, lead_ms))
        return times


def microseconds(samples: Sequence[float]) -> float:
    """The median of samples in milliseconds."""
    return 1e3 * statistics.median(samples)
