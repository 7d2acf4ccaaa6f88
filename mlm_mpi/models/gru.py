"""The GRU language model: that of `models/lstm.py` with gated recurrent units for cells (`ops/gru.py`)."""

from dataclasses import dataclass

from mlm_mpi.config.keys import key
from mlm_mpi.layers.base import Least, Sizes, Trunk
from mlm_mpi.layers.recurrent import GRU
from mlm_mpi.models import lstm

HEEDS = lstm.HEEDS


@dataclass(frozen=True)
class Settings(lstm.Settings):
    """A stack of GRU layers that predicts the next token from a state, without attention."""

    kind: str = key("gru", says="The run trains this model.", room="models")


def build(settings: Settings, sizes: Sizes) -> Trunk:
    """A GRU of these settings, with parameters not yet bound to memory."""
    return lstm.stack(settings, sizes, GRU)


def least(settings: Settings, sizes: Sizes, rows: int) -> Least:
    """Lower bounds for micro-batches of B rows; layers are alike, and none but one is built."""
    return lstm.bounds(settings, sizes, rows, GRU)


def flops(settings: Settings, sizes: Sizes, tokens: int) -> float:
    """Floating-point operations of forward and backward over `tokens` positions: 6 per weight of a product, each."""
    return lstm.products(settings, sizes, tokens, GRU.GATES)
