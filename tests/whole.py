"""A whole language model driven by arrays: forward, backward and logits of its chain."""

from dataclasses import replace

import numpy as np

from mlm_mpi import generation
from mlm_mpi.backend.choice import place_of
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.config import Config
from mlm_mpi.data.batch import Batch
from mlm_mpi.layers.adapters import adapt
from mlm_mpi.layers.base import Context, Sizes
from mlm_mpi.layers.chain import Chain, Recomputed
from mlm_mpi.layers.head import TokenHead
from mlm_mpi.models import gpt
from mlm_mpi.params.store import FlatStore
from mlm_mpi.plug import Plugins
from mlm_mpi.train.build import build
from mlm_mpi.train.engine import Engine
from mlm_mpi.train.start import freeze


def batch_of(ids, targets, mask=None, step=0, index=0) -> Batch:
    wanted = {"ids": targets} if mask is None else {"ids": targets, "mask": mask}
    return Batch(step, index, {"ids": ids}, wanted, int(targets.size if mask is None else mask.sum()))


def blocks_of(settings, vocabulary):
    """The parameters of a GPT with its head, by part: what a store is made of."""
    trunk = gpt.build(settings, Sizes(vocabulary))
    return [part.parameters() for part in (*trunk.parts, TokenHead(trunk))]


class Whole:
    """A model with its head, its store and one flat buffer of gradients."""

    def __init__(self, settings, vocabulary, dtype="f8", place=None, recompute=False, model=gpt):
        trunk = model.build(settings, Sizes(vocabulary))
        self.head = TokenHead(trunk)
        parts = list(map(Recomputed, trunk.parts[1:])) if recompute else trunk.parts[1:]
        self.chain = Chain([trunk.parts[0], *parts, self.head])
        self.store = FlatStore(self.chain.parameter_blocks(), Mesh(), dtype, place)
        self.gradient = self.store.new_buffer()

    def __getitem__(self, parameter):
        """The gradient of a parameter."""
        return self.store.by_parameter(self.gradient)[parameter]

    def loss(self, ids, targets, mask, ctx):
        """The summed loss; with a training context, of a training forward (dropout), without any gradient."""
        ctx = replace(ctx, batch=batch_of(ids, targets, mask), tally={})
        hidden, _ = Chain(self.chain.parts[:-1]).forward((), ctx)
        self.head.forward(hidden, replace(ctx, training=False))
        return ctx.tally["loss"]

    def loss_and_grad(self, ids, targets, mask, ctx, *ready, inputs=None, halves=False):
        """The summed loss; every gradient is written or added to `gradient`. `inputs`: of the batch, beside ids.
        `halves`: one after the other."""
        batch, views = batch_of(ids, targets, mask), self.store.by_parameter(self.gradient)
        batch.inputs.update(inputs or {})
        ctx = replace(ctx, training=True, batch=batch, tally={}, gradients=views)
        _, kept = self.chain.forward((), ctx)
        if halves:
            _, owed = self.chain.backward_input((), kept, replace(ctx, gradients=self.store.apart(), accumulate=False))
            self.chain.backward_weight(owed, ctx, *ready)
        else:
            self.chain.backward((), kept, ctx, *ready)
        return ctx.tally["loss"]

    def logits(self, ids, cache=None):
        return generation.logits(self.chain, ids, cache)


class Driven:
    """Parts, the last a head, driven by batches: with their store and one flat buffer of gradients."""

    def __init__(self, parts, dtype="f8", place=None, recompute=False):
        self.head = parts[-1]
        inner = list(map(Recomputed, parts[1:-1])) if recompute else parts[1:-1]
        self.chain = Chain([parts[0], *inner, self.head])
        self.store = FlatStore(self.chain.parameter_blocks(), Mesh(), dtype, place)
        self.gradient = self.store.new_buffer()

    def __getitem__(self, parameter):
        """The gradient of a parameter."""
        return self.store.by_parameter(self.gradient)[parameter]

    def hidden(self, batch, ctx=None):
        """What flows into the head."""
        return Chain(self.chain.parts[:-1]).forward((), replace(ctx or Context(), batch=batch))[0][0]

    def tally(self, batch):
        """What is told outside training."""
        ctx = Context(batch=batch)
        self.chain.forward((), ctx)
        return ctx.tally

    def training_loss(self, batch, ctx):
        """The summed loss of a training step; its gradients go into a buffer of nobody."""
        kept, self.gradient = self.gradient, self.store.new_buffer()
        loss = self.loss_and_grad(batch, ctx)
        self.gradient = kept
        return loss

    def loss_and_grad(self, batch, ctx, halves=False):
        """The summed loss; every gradient is written to `gradient`. `halves`: one after the other."""
        views = self.store.by_parameter(self.gradient)
        ctx = replace(ctx, batch=batch, tally={}, gradients=views)
        _, kept = self.chain.forward((), ctx)
        if halves:
            _, owed = self.chain.backward_input((), kept, replace(ctx, gradients=self.store.apart()))
            self.chain.backward_weight(owed, ctx)
        else:
            self.chain.backward((), kept, ctx)
        return ctx.tally["loss"]


def engine_of(config: Config, vocabulary: int, mesh: Mesh | None = None, labels: int = 0) -> Engine:
    """What a run of this configuration trains with; its weights are zero."""
    plugins, sizes = Plugins(), Sizes(vocabulary, labels=labels)
    parts = plugins.find("tasks", config.task.kind, "task.kind").parts(config, plugins, sizes)
    if config.start.lora_rank:
        adapt(parts, config.start.lora_rank, config.start.lora_alpha, config.start.lora_targets)
    freeze(parts, config.start, None)
    return build(config, plugins, parts, mesh or Mesh(), place_of(config), config.model.width)


class Listed:
    """Batches as the samples of a split, for `measure`."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def batch(self, numbers, step, index, rows=None):
        assert len(numbers) == 1
        return self.batches[numbers[0]]


def mask_of(batch: Batch) -> np.ndarray:
    """Which targets count."""
    return batch.targets.get("mask", np.ones(batch.targets["ids"].shape, bool))
