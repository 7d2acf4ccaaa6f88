"""Training: who runs which micro-batch, one step, checkpoints, the loop."""

from dataclasses import dataclass, replace
from typing import Literal

from mlm_mpi.config.keys import key
from mlm_mpi.data.warmup import Ramp
from mlm_mpi.errors import ConfigError

_LANES = 8  # the most by default: a rank alone holds 1 + log2 8 buffers of gradients


@dataclass(frozen=True)
class Train:
    """The work of a step: M micro-batches of B rows, summed in J lanes (DESIGN.md)."""

    steps: int = key(
        100,
        says="The whole run makes this many updates of the weights.",
        unit="steps",
        least=1,
        most=1 << 32,  # a word of Philox's counter
        remedy="random numbers count steps in 32 bits",
    )
    micro_batches: int = key(
        8, says="A step is made of this many micro-batches, which the ranks share.", unit="micro-batches", least=1
    )
    rows: int = key(
        8,
        says="A micro-batch holds this many windows of text, which a rank computes at once.",
        unit="windows",
        least=1,
    )
    first_rows: int = key(
        1,
        says="In the steps of rows_warmup_steps, micro-batches begin with this many windows and double until they have "
        "as many as rows says.",
        unit="windows",
        least=1,
    )
    rows_warmup_steps: int = key(
        0,
        says="Micro-batches grow to their full size over this many steps, in stages of the same length; 0 means that "
        "they have it from the first step.",
        unit="steps",
        least=0,
    )
    first_context: int = key(
        32,
        says="In the steps of context_warmup_steps, the windows of a micro-batch are cut into shorter ones, first of "
        "this many tokens, doubling to the model's context: it reads the same text.",
        unit="tokens",
        least=1,
    )
    context_warmup_steps: int = key(
        0,
        says="Windows grow to the context over this many steps, in stages of the same length; 0 means that they have "
        "it from the first step.",
        unit="steps",
        least=0,
    )
    lanes: int = key(
        0,
        says="The gradients of a step are summed in this many lanes: they decide the bits, divide the micro-batches, "
        "and are the most ranks that can take part; 0 means the largest divisor of the micro-batches up to 8.",
        unit="lanes",
        least=0,
    )
    seed: int = key(0, says="Initial weights, the order of the data and dropout are drawn from this seed.", least=0)
    dtype: Literal["float32", "float64"] = key(
        "float32",
        says="Weights, gradients and moments are of this type; float64 is slow and there to examine numerics.",
    )
    recompute: bool = key(
        False,
        says="If true, blocks keep only their inputs and run their forward twice, for less memory, more time and the "
        "same bits.",
    )
    schedule: str = key(
        "single",
        says="The forwards and backwards of a step run in this order; single runs one micro-batch after another.",
        room="schedules",
    )

    def resolved(self) -> "Train":
        """The same with its number of lanes. Raises ConfigError where the lanes do not divide the micro-batches."""
        m, j = self.micro_batches, self.lanes
        if self.rows_warmup_steps:
            self._check_rows()
        if j == 0:
            return replace(self, lanes=max(lanes for lanes in range(1, _LANES + 1) if m % lanes == 0))
        if m % j != 0:
            raise ConfigError(
                f"train.micro_batches = {m} is not a multiple of train.lanes = {j}: "
                f"set train.micro_batches = {-(-m // j) * j}"
            )
        return self

    def rows_ramp(self) -> Ramp:
        """Rows of a micro-batch by step."""
        return Ramp(self.rows, self.first_rows, self.rows_warmup_steps)

    def context_ramp(self, context: int) -> Ramp:
        """Tokens of a row by step."""
        return Ramp(context, self.first_context, self.context_warmup_steps)

    def _check_rows(self) -> None:
        if self.first_rows >= self.rows:
            raise ConfigError(
                f"train.first_rows = {self.first_rows} must be below train.rows = {self.rows} to grow: lower it, or "
                "set train.rows_warmup_steps = 0"
            )
        self._check_stages("rows", self.rows_ramp())

    def check_context(self, context: int) -> None:
        """Raises ConfigError where windows cannot grow as the keys say."""
        ramp = self.context_ramp(context)
        if ramp.first >= context or ramp.first << ramp.doublings != context:
            lengths = [context >> n for n in range(1, context.bit_length()) if context % (1 << n) == 0]
            nearest = min(lengths, key=lambda length: abs(length - ramp.first), default=0)
            remedy = f"set it to {nearest}" if nearest else "set an even context"
            raise ConfigError(
                f"train.first_context = {ramp.first} does not double to model.context = {context}: {remedy}, or "
                "train.context_warmup_steps = 0"
            )
        self._check_stages("context", ramp)

    def _check_stages(self, what: str, ramp: Ramp) -> None:
        """Every stage has a step, and the run reaches the last."""
        key, count = f"train.{what}_warmup_steps", ramp.doublings
        if ramp.steps < count:
            raise ConfigError(
                f"{key} = {ramp.steps} is too few for {count} stages from {ramp.first} to {ramp.last}: set it to "
                f"{count} or more, or raise train.first_{what}"
            )
        if ramp.steps > self.steps:
            raise ConfigError(f"{key} = {ramp.steps} exceeds train.steps = {self.steps}: lower it")


@dataclass(frozen=True)
class Eval:
    """How often and on how much of the held-out text the loss is measured."""

    every: int = key(
        0,
        says="The held-out loss is measured every so many steps, and at the end; 0 means at the end only.",
        unit="steps",
        least=0,
    )
    windows: int = key(
        0, says="At most this many windows of the held-out text are used; 0 means all of them.", unit="windows", least=0
    )
    rows: int = key(8, says="A rank evaluates this many windows at once.", unit="windows", least=1)
    best: bool = key(
        False,
        says="If true, the checkpoint with the best held-out figure stays beside the newest ones, and best.json in the "
        "run folder names it.",
    )
    figure: str = key(
        "loss", says="The best checkpoint is the best by this figure: loss, or what the task says of its quality."
    )
    patience: int = key(
        0,
        says="The run ends when the figure was measured this many times in a row without getting better; 0 means "
        "never.",
        unit="evaluations",
        least=0,
    )

    @property
    def searches(self) -> bool:
        """Whether it matters which figure was the best."""
        return self.best or self.patience > 0

    def resolved(self) -> "Eval":
        """The same. Raises ConfigError where patience would wait for ever."""
        if self.patience and not self.every:
            raise ConfigError(
                f"eval.patience = {self.patience} counts evaluations, and eval.every = 0 makes one at the end: set "
                "eval.every, or eval.patience = 0"
            )
        return self


@dataclass(frozen=True)
class Start:
    """What a run begins with beside its seed: weights of another run, word vectors, and what of them is trained."""

    checkpoint: str = key(
        "",
        says="Initial weights are those of this run folder's newest checkpoint, or of this checkpoint, where names and "
        "shapes agree; the head's may be missing there and are drawn; an empty name means that all are drawn.",
    )
    partial: bool = key(
        False,
        says="If true, any weights may be missing in the checkpoint, not the head's alone, and some of it may be left "
        "over.",
    )
    vectors: str = key(
        "",
        says="Tokens whose word stands in this file of word vectors (word2vec, GloVe, fastText .vec) begin with its "
        "vector in the model's table of tokens, the others as without it; an empty name means that there is none.",
    )
    vectors_scale: float = key(
        0.0,
        says="Vectors of that file are multiplied by this; 0 means by the one number that gives those that are used "
        "the standard deviation with which the table is drawn.",
        least=0,
    )
    freeze: tuple[str, ...] = key(
        (),
        says="These parameters keep their initial values: names of parameters or of what holds them, block0 say, or "
        "beginnings of names with a * behind.",
    )
    lora_rank: int = key(
        0,
        says="The weights of the checkpoint are frozen, and adapters of this rank are trained beside them (Hu et al., "
        "arXiv:2106.09685); 0 means that there are none.",
        least=0,
    )
    lora_alpha: float = key(16.0, says="What an adapter adds is scaled by this over its rank.", above=0)
    lora_targets: tuple[str, ...] = key(
        ("attention.qkv", "attention.project"),
        says="Affine maps whose names end so have an adapter.",
    )

    def resolved(self) -> "Start":
        """The same. Raises ConfigError for adapters without a place, a scale of nothing."""
        if self.vectors_scale and not self.vectors:
            raise ConfigError(
                f"start.vectors_scale = {self.vectors_scale} needs start.vectors: name a file of word vectors, or set "
                "start.vectors_scale = 0"
            )
        if self.lora_rank and not self.checkpoint:
            raise ConfigError(
                f"start.lora_rank = {self.lora_rank} trains beside the weights of a checkpoint, and there is none: set "
                "start.checkpoint (mlm-mpi finetune), or start.lora_rank = 0"
            )
        if self.lora_rank and not self.lora_targets:
            raise ConfigError(
                f"start.lora_rank = {self.lora_rank} needs start.lora_targets: name some, or set start.lora_rank = 0"
            )
        return self


@dataclass(frozen=True)
class Checkpoint:
    """When a run is saved, and how much of what was saved is kept."""

    every: int = key(
        0,
        says="A checkpoint is saved every so many steps, and at the end; 0 means at the end only.",
        unit="steps",
        least=0,
    )
    keep: int = key(
        2, says="This many of the newest checkpoints stay, and older ones are removed.", unit="checkpoints", least=1
    )
    background: bool = key(True, says="If true, a thread writes the files of a checkpoint while training goes on.")


@dataclass(frozen=True)
class Guard:
    """What is done about numbers that have gone wrong, in a step or in a rank's memory."""

    policy: Literal["skip", "rollback", "stop"] = key(
        "skip",
        says="A step whose loss or gradient is not finite, or a spike, is run again; if it is wrong again, skip does "
        "without the micro-batches that are to blame, rollback also goes back to the weights of the last save where "
        "none of them is, and stop ends the run.",
    )
    spike: float = key(
        10.0,
        says="A loss or gradient norm that is this many times its running level is a spike, from the 17th step on; 0 "
        "means that none is. Of a classifier none is: most of its losses fall to nothing.",
        least=0,
    )
    failing: Literal["stop", "skip"] = key(
        "stop",
        says="If two ranks fail (comm.recover) at the same micro-batch, stop ends the run and skip goes on without it.",
    )
    compare_every: int = key(
        10,
        says="Ranks compare weights and moments every so many steps and before each save, and one that differs takes "
        "those of the majority; 0 means never.",
        unit="steps",
        least=0,
    )
    audit_every: int = key(
        100,
        says="Every so many steps one micro-batch is computed on a second rank too, and their gradients must agree in "
        "every bit; 0 means never.",
        unit="steps",
        least=0,
    )
