"""Which implementation serves each op.

One entry per op. The reference in `mlm_mpi/ops` serves every op on every device; a hand-written kernel
will register here with its contract and be preferred where the contract holds.
"""

OPS = ("linear", "layernorm", "gelu", "attention", "embedding", "crossentropy", "dropout", "adamw", "sgd")


def serving() -> dict[str, str]:
    """op -> the implementation that runs, for `doctor` and the start table."""
    return dict.fromkeys(OPS, "reference (NumPy)")
