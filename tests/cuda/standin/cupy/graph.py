"""CUDA graphs of the stand-in: under capture nothing changes memory, every replay does all that was captured.

What waits for the device, or copies to or from the host, is an error under capture, as it is in CUDA.
"""

_state = {"recording": None, "held": []}


class Graph:
    """`held`: memory that was handed out under capture; it stays a pool's, whoever lets go of it."""

    def __init__(self, steps, held):
        self.steps, self.held = steps, held

    def launch(self, stream=None):
        for step in self.steps:
            step()


def begin():
    _state["recording"], _state["held"] = [], []


def end():
    steps, _state["recording"] = _state["recording"], None
    return Graph(steps, _state["held"])


def hold(memory):
    """A graph knows addresses only, for example in tensor maps: what it uses must outlive the capture."""
    if _state["recording"] is not None:
        _state["held"].append(memory)


def change(work):
    """Does work that changes memory: now, or in every replay."""
    if _state["recording"] is None:
        work()
    else:
        _state["recording"].append(work)


def again(work):
    """Does work in every replay."""
    if _state["recording"] is not None:
        _state["recording"].append(work)


def forbid_waiting():
    if _state["recording"] is not None:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing")
