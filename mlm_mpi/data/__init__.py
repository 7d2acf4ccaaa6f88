"""From text to micro-batches: cleaning, tokenizer, shards, catalog, sampler, loader."""

from dataclasses import dataclass

from mlm_mpi.config.keys import key


@dataclass(frozen=True)
class Data:
    """Where the tokens of a run come from, and how far they are read ahead."""

    dir: str = key("corpus", says="The corpus is read from this folder, which `mlm-mpi prepare --out` has written.")
    prefetch: int = key(
        4, says="A thread reads at most this many micro-batches ahead of the step.", unit="micro-batches", least=1
    )
