"""A trained language model read from its run folder: held-out quality, baselines, continuation of a prompt."""

import lzma
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import threadpoolctl

from mlm_mpi import config as configuration
from mlm_mpi.backend import Device
from mlm_mpi.backend.arrays import Place, cpu, keep_freed_memory, to_host, wide
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.config import Config
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.loader import TokenStream, heldout_batches
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import CheckpointError, ConfigError, DataError
from mlm_mpi.layers.attention import KeyValueCache
from mlm_mpi.layers.base import Context
from mlm_mpi.models import gpt
from mlm_mpi.models.stack import Stack
from mlm_mpi.params.store import FlatStore
from mlm_mpi.rng import key_of, uniform
from mlm_mpi.train import checkpoint, corpus
from mlm_mpi.train.checkpoint import Manifest
from mlm_mpi.train.folder import checkpoints_of, is_checkpoint
from mlm_mpi.train.replica import config_differences, place_of


@dataclass(frozen=True)
class Trained:
    """A model with the weights of a sound checkpoint, on one process; all of it from that checkpoint's folder."""

    checkpoint: Path
    manifest: Manifest
    config: Config
    tokenizer: Tokenizer
    stack: Stack
    place: Place

    @property
    def step(self) -> int:
        return self.manifest.step


def load(run: str | Path, device: Device | None = None) -> Trained:
    """The newest sound checkpoint of a run folder, or the one that `run` itself is. Settings are the sealed ones.

    `device`: "cpu" or "gpu", by default where it was trained. A damaged checkpoint is named on stderr and the one
    before is tried; so is a config.toml that differs. Raises ConfigError, CheckpointError.
    """
    folder = Path(named(run, "RUN"))
    if is_checkpoint(folder):
        return _restored(folder, checkpoint.read_manifest(folder), device)
    trained = checkpoint.newest_sound(
        checkpoints_of(folder), lambda path, manifest: _restored(path, manifest, device), note
    )
    _compare_settings(folder / "config.toml", trained)
    return trained


def named(path: str | Path, what: str) -> str:
    """The same path. Raises ConfigError for an empty one, which would be the working directory."""
    if not str(path):
        raise ConfigError(f"{what} is empty: give a folder")
    return str(path)


def note(text: str) -> None:
    """A line that is no result."""
    print(text, file=sys.stderr)


def _restored(path: Path, manifest: Manifest, device: Device | None) -> Trained:
    config = _runnable(configuration.from_table(manifest.config, f"{path}/manifest.json"), device)
    threadpoolctl.threadpool_limits(config.numerics.threads)
    keep_freed_memory()
    place = place_of(config)
    tokenizer = Tokenizer(checkpoint.read_tokenizer(path, manifest), f"{path}/{checkpoint.TOKENIZER_FILE}")
    if tokenizer.vocab_size != manifest.vocabulary:
        raise CheckpointError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model {manifest.vocabulary}: "
            "not saved by mlm-mpi; give another"
        )
    stack = _stack(path, manifest, config)
    try:
        store = FlatStore(stack.parameter_blocks(), Mesh(), config.train.dtype, place)
    except MemoryError:
        raise CheckpointError(f"{path}: its weights do not fit into the memory that is free here") from None
    checkpoint.restore(path, manifest, store, {"weights": store.data})
    return Trained(path, manifest, config, tokenizer, stack, place)


def _stack(path: Path, manifest: Manifest, config: Config) -> Stack:
    """The model of a checkpoint's settings, if its parameters are those that the checkpoint lists."""
    if config.model.layers <= len(manifest.shapes):  # more would have no parameters, and might have no end
        stack = gpt.build(config.model, manifest.vocabulary)
        shapes = {p.name: list(p.layout.shape) for block in stack.parameter_blocks() for p in block}
        if shapes == manifest.shapes:
            return stack
    raise CheckpointError(f"{path}: its parameters are not those of its settings: not saved by mlm-mpi; give another")


def _runnable(config: Config, device: Device | None) -> Config:
    if device is not None:
        config = replace(config, backend=replace(config.backend, device=device))
    if config.backend.device == "cpu":  # any CPU may read what a GPU or a CPU with bf16 has trained
        config = replace(config, numerics=replace(config.numerics, products="float32"))
    return config


def _compare_settings(path: Path, trained: Trained) -> None:
    sealed = configuration.from_table(trained.manifest.config, str(trained.checkpoint))
    try:
        changes = config_differences(configuration.to_table(configuration.load(path)), sealed)
    except ConfigError as error:
        changes = [str(error)]
    if changes:
        note(f"note: the settings are those of {trained.checkpoint.name}, not of {path}: {', '.join(changes)}")


def open_corpus(trained: Trained, data: str | None = None) -> Catalog:
    """The corpus that a model was trained on, or the one in `data`; another text is noted on stderr.

    Raises DataError, naming the model's corpus and how to get it back, if it is gone or has another tokenizer.
    """
    wanted = f"the model was trained on {corpus.origin(trained.manifest)}"
    try:
        catalog = Catalog.open(trained.config.data.dir if data is None else named(data, "--data"))
        catalog.check_files()
    except DataError as error:
        if data is not None:
            raise
        raise DataError(f"{error}; {wanted}: make it again there, or give its folder by --data DIR") from None
    if catalog.manifest.tokenizer.hash != trained.manifest.tokenizer:
        raise DataError(
            f"{catalog.folder} has another tokenizer than the model; {wanted}: give its folder by --data DIR, or for "
            f"another text prepare it with --tokenizer {trained.checkpoint / checkpoint.TOKENIZER_FILE}"
        )
    if catalog.digest != trained.manifest.catalog:
        note(f"note: the figures are of another text, corpus {catalog.digest[:12]} in {catalog.folder}; {wanted}")
    return catalog


@dataclass(frozen=True)
class Quality:
    """Held-out quality. Bits per character compare across tokenizers; the text's first token is not predicted."""

    loss: float  # nats per token
    tokens: int
    characters: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_character(self) -> float:
        return self.loss * self.tokens / math.log(2) / self.characters


_TOKENS_AT_ONCE = 1 << 16  # whatever `eval.rows` says in a checkpoint from elsewhere


def evaluate(trained: Trained, catalog: Catalog) -> Quality:
    """Quality on every target of the held-out split. Raises DataError if there is none."""
    total, counted = 0.0, 0
    stream = TokenStream(catalog, "heldout")
    context = trained.config.model.context
    rows = min(trained.config.eval.rows, max(1, _TOKENS_AT_ONCE // context))
    for batch in heldout_batches(stream, context, rows):
        ids, targets, mask = map(trained.place.put, (batch.ids, batch.targets, batch.mask))
        total += float(trained.stack.loss(ids, targets, mask, Context()))
        counted += batch.targets_count
    return Quality(total / counted, counted, catalog.characters("heldout"))


def unigram_bits_per_character(catalog: Catalog, vocabulary: int) -> float:
    """Bits per character of the held-out tokens under training frequencies, add-one smoothed."""
    training, heldout = TokenStream(catalog, "train"), TokenStream(catalog, "heldout")
    counts = np.ones(vocabulary)
    for start in range(0, training.tokens, 1 << 20):
        counts += np.bincount(training.read(start, min(start + (1 << 20), training.tokens)), minlength=vocabulary)
    bits = -np.log2(counts / counts.sum())
    targets = heldout.read(1, heldout.tokens)
    return float(bits[targets].sum() / catalog.characters("heldout"))


def xz_bits_per_character(catalog: Catalog, tokenizer: Tokenizer) -> tuple[float, float]:
    """Bits per character of `xz -9e` on the held-out text: alone, and what it adds after the training text.

    The training text is cut to its last 64 MiB, xz's window. Training and held-out share whole sentences,
    which a window of all training text copies and a small model does not remember.
    """
    training = _text(TokenStream(catalog, "train"), tokenizer)[-(64 << 20) :]
    heldout = _text(TokenStream(catalog, "heldout"), tokenizer)
    bits = 8.0 / catalog.characters("heldout")
    return bits * len(_xz(heldout)), bits * (len(_xz(training + heldout)) - len(_xz(training)))


def _text(stream: TokenStream, tokenizer: Tokenizer) -> bytes:
    return tokenizer.decode(stream.read(0, stream.tokens).tolist()).encode()


def _xz(content: bytes) -> bytes:
    return lzma.compress(
        content, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    )


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature below 1e-30: the likeliest. top_k 0 and top_p 1: no cut.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv:1904.09751 (top-p).
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for condition, text in (
            (0 <= self.temperature < math.inf, f"--temperature {self.temperature} must be finite and not negative"),
            (self.top_k >= 0, f"--top-k {self.top_k} must not be negative (0: no cut)"),
            (0 < self.top_p <= 1, f"--top-p {self.top_p} must be in (0, 1]"),
        ):
            if not condition:
                raise ConfigError(text)


# Below it float32 logits above 1e-20 that differ at all are more than e^500 apart; none divides to infinity above it.
_COLDEST = 1e-30


def choose(logits: np.ndarray, sampling: Sampling, number: int) -> int:
    """Token number `number` of a continuation, drawn from logits (V,)."""
    if sampling.temperature < _COLDEST:
        return int(logits.argmax())
    scaled = logits.astype("f8") / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    cumulative = np.cumsum(weights / weights.sum())
    kept = int(np.searchsorted(cumulative, sampling.top_p)) + 1 if sampling.top_p < 1 else len(order)
    cumulative = cumulative[:kept] / cumulative[min(kept, len(order)) - 1]
    draw = float(uniform(key_of(sampling.seed, "generate"), number, 1)[0])
    return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), len(cumulative) - 1)])


def continue_prompt(
    stack: Stack, context: int, prompt: Sequence[int], sampling: Sampling, cached: bool = True,
    place: Place | None = None,
) -> Iterator[int]:  # fmt: skip
    """Endless continuation of a prompt of at least one token.

    When the context is full, the newest half of it is read again and generation goes on from there.
    `cached=False` reads the whole window for every token: the reference for the cache.
    """
    place, held = place or cpu(), list(prompt)[-context:]
    cache, unread, number = KeyValueCache(context), list(held), 0
    while True:
        if cached:
            logits = stack.logits(place.put(np.array([unread], np.int32)), Context(cache=cache))[0, -1]
        else:
            logits = stack.logits(place.put(np.array([held], np.int32)), Context())[0, -1]
        token = choose(to_host(wide(logits)), sampling, number)
        yield token
        number += 1
        held, unread = [*held, token], [token]
        if len(held) > context:
            held = held[-max(1, context // 2) :]
            cache, unread = KeyValueCache(context), list(held)
