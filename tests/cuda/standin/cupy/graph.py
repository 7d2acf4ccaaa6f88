"""CUDA graphs of the stand-in: under capture nothing changes memory, every replay does all that was captured.

What waits for the device, or copies to or from the host, is an error under capture, as it is in CUDA.
"""

_state = {"recording": None}


class Graph:
    def __init__(self, steps):
        self.steps = steps

    def launch(self, stream=None):
        for step in self.steps:
            step()


def begin():
    _state["recording"] = []


def end():
    steps, _state["recording"] = _state["recording"], None
    return Graph(steps)


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
