"""The training loop.

    open the data · build the replica · resume · step, step, step · save · report

All ranks run this function. What one rank decides alone (its clock, a signal, a failed write) travels
with the next step's losses as a note, so that all ranks act on it at the same step.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_mpi import config as configuration
from mlm_mpi.backend import registry
from mlm_mpi.backend.choice import place_of
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.config import Config
from mlm_mpi.data.catalog import Catalog
from mlm_mpi.data.loader import Loader, TokenStream, heldout_batch, heldout_count
from mlm_mpi.data.sampler import Sampler, windows_of
from mlm_mpi.errors import CheckpointError, DataError, MlmError, agreed
from mlm_mpi.monitor.metrics import MetricsLog
from mlm_mpi.monitor.progress import Progress, Reporter, Silent, show_plan
from mlm_mpi.train import checkpoint, corpus
from mlm_mpi.train.fingerprint import differences, digest, fingerprint
from mlm_mpi.train.folder import RunFolder, findable
from mlm_mpi.train.replica import Replica, StepResult, bytes_held, check_memory, config_differences

_STOP, _WRITTEN = 0, 1  # columns of a step's notes

# keys that may differ on resume without another run being meant
_FREE = (
    "backend.", "checkpoint.", "comm.", "data.dir", "data.prefetch", "eval.", "log.", "numerics.", "train.recompute",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What a start of a run may choose without changing what the run computes."""

    run: Path
    resume: str = "auto"  # auto | never | must
    max_time_s: float | None = None
    max_steps: int | None = None
    quiet: bool = False


class StopRequest:
    """SIGUSR1, SIGTERM or SIGINT, or a limit of this start: a wish to stop, acted on by all ranks together."""

    def __init__(self, max_time_s: float | None, max_steps: int | None) -> None:
        self.reason: str | None = None
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s
        self._steps_left = max_steps

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handles the signals while the block runs."""
        before = {s: signal.signal(s, self._note) for s in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":  # asked twice: now
            signal.default_int_handler(number, frame)
        self.reason = signal.Signals(number).name

    def wanted(self) -> bool:
        """Whether this rank wants to stop after the step at hand; asked once per step."""
        if self._steps_left is not None:
            self._steps_left -= 1
            if self._steps_left <= 0:
                self.reason = self.reason or "--max-steps"
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = self.reason or "--max-time"
        return self.reason is not None


class Trainer:
    """A run on one rank: its data, its replica, its folder, and the loop over steps."""

    def __init__(self, config: Config, options: Options, group: Group) -> None:
        self.config, self.options = config, options
        self.group = group.with_timeout(config.comm.timeout_s)
        self.stop = StopRequest(options.max_time_s, options.max_steps)
        self.folder = RunFolder(options.run)
        on_node = self.group.on_node()
        with self.group.together("opening the data"):
            configuration.check_ranks(config, group.size)
            self.place = place_of(config, config.numerics.level, on_node)
            self._open_data()
            check_memory(config, self.vocabulary, self.place, on_node[1])
            self.config = config = findable(config)
        self.replica = Replica(config, self.vocabulary, Mesh(self.group), self.place)
        self.facts = fingerprint(config, group.size, self.place)
        self.incomparable = self._compare_fingerprints()

    def _open_data(self) -> None:
        config = self.config
        try:
            self.catalog = Catalog.open(config.data.dir)
            self.catalog.check_files()
            self.tokenizer = self.catalog.tokenizer()
        except DataError as error:
            raise DataError(f"{error}{self._origin()}") from None
        self.vocabulary = self.tokenizer.vocab_size
        windows = windows_of(self.catalog.tokens("train"), config.model.context)
        sampler = Sampler(config.train.seed, windows, config.train.micro_batches, config.train.rows)
        self.loader = Loader(
            TokenStream(self.catalog, "train"), sampler, config.model.context, config.data.prefetch,
            config.comm.timeout_s,
        )  # fmt: skip
        self.heldout = TokenStream(self.catalog, "heldout")

    def _origin(self) -> str:
        """What a run that stands already was trained on, as the end of a line; nothing for a new run."""
        manifest = checkpoint.newest_manifest(self.folder.checkpoints)
        return f"; {self.folder.path} was trained on {corpus.origin(manifest)}" if manifest else ""

    def _compare_fingerprints(self) -> str | None:
        """Why bits cannot be compared with other runs of this configuration; None if they can. Collective."""
        everybody = self.group.allgather(self.facts, "numerics fingerprints")
        for rank, facts in enumerate(everybody):
            if facts != everybody[0]:
                return f"rank {rank} differs from rank 0 in {differences(everybody[0], facts)[0]}"
        return None

    def run(self) -> int:
        """Trains to the last step, or to the agreed stop. Collective."""
        with self.stop.listening():
            return self._run()

    def _run(self) -> int:
        with self.group.together("taking the run folder"):
            self._check_wish()
            if self.group.rank == 0:
                self.folder.acquire()
                checkpoint.remove_unfinished(self.folder.checkpoints)
        first = self._resume()
        show = self._open_display(first)
        buffers, keep = self.replica.state(), self.config.checkpoint.keep
        self.saver = checkpoint.Saver(
            self.folder.checkpoints, self.replica.store, buffers, self.tokenizer.content, self.group, keep,
            self.config.checkpoint.background,
        )  # fmt: skip
        try:
            step = self._train(first, show)
        except MlmError as error:
            if error.agreed and self.saver.busy:  # all ranks are here: what was begun before is not lost
                self._publish(show)
            raise
        finally:
            self.loader.close()
            show.close()
        return self._report(step)

    def _train(self, step: int, show: Reporter) -> int:
        """Steps until the last one or until a rank wants to stop, saved; returns the number of steps done."""
        self.loader.start(self.replica.plan(step, self.config.train.steps))
        while step < self.config.train.steps:
            waited = self.loader.waited_s
            notes = (float(self.stop.wanted()), float(self.saver.written))
            result = self.replica.step(step, self.loader.next, notes)
            step += 1
            if self.saver.busy and result.notes[:, _WRITTEN].all():
                self._publish(show)
            last = step == self.config.train.steps
            stopping = result.notes[:, _STOP].any()
            unsaved = None
            if last or stopping:  # before the evaluation: whoever wants the job to end does not wait for ever
                unsaved = self._save_finally(step, show)
            elif self._is_time(self.config.checkpoint.every, step):
                if self.saver.busy:
                    self._publish(show)
                self._begin_save(step)
            heldout = self._evaluate() if last or self._is_time(self.config.eval.every, step) else None
            self._record(step, result, self.loader.waited_s - waited, heldout, show)
            if unsaved is not None:
                raise agreed(CheckpointError(f"the final checkpoint (step {step}) was not saved: {unsaved}"))
            if stopping:
                break
        return step

    def _is_time(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _evaluate(self) -> float | None:
        """Held-out loss in nats per target, None where the corpus holds nothing out. Collective."""
        model, wanted = self.config.model, self.config.eval
        count = heldout_count(self.heldout.tokens, model.context, wanted.rows, wanted.windows)
        if count == 0:
            return None
        return self.replica.heldout_loss(
            lambda number: heldout_batch(self.heldout, model.context, wanted.rows, number, wanted.windows), count
        )

    def _record(self, step: int, result: StepResult, waited_s: float, heldout: float | None, show: Reporter) -> None:
        rate = result.targets / result.step_s
        show.update(
            step, result.loss, rate, result.exposed_s / result.step_s, waited_s / result.step_s,
            result.learning_rate, heldout,
        )  # fmt: skip
        if self.metrics is not None:
            extra = {} if heldout is None else {"heldout_loss": heldout}
            self.metrics.write(
                step=step - 1, loss=result.loss, learning_rate=result.learning_rate, gradient_norm=result.gradient_norm,
                tokens_per_s=rate, step_s=result.step_s, comm_s=result.exposed_s, wait_s=waited_s, time=time.time(),
                **extra,
            )  # fmt: skip

    def _about(self) -> dict[str, Any]:
        return {
            "config": configuration.to_table(self.config), "vocabulary": self.vocabulary,
            "catalog": self.catalog.digest, "corpus": corpus.in_words(self.catalog), "fingerprint": self.facts,
            "incomparable": self.incomparable,
        }  # fmt: skip

    def _begin_save(self, step: int) -> None:
        self.replica.check_weights(step)
        self.saver.begin(step)

    def _publish(self, show: Reporter) -> str | None:
        """Publishes the save under way; a failure is an alarm, and training goes on. Collective."""
        problem = self.saver.publish(self._about())
        if problem is not None:
            show.message(f"ALARM checkpoint not saved, training goes on: {problem}", important=True)
        return problem

    def _save_finally(self, step: int, show: Reporter) -> str | None:
        """The last checkpoint, which must succeed; returns what went wrong. Collective."""
        if self.saver.busy:
            self._publish(show)
        self._begin_save(step)
        return self.saver.publish(self._about())

    def _check_wish(self) -> None:
        """Refuses a run folder that --resume does not allow, before it is made."""
        wish, folder = self.options.resume, self.folder.checkpoints
        saved = checkpoint.published(folder)
        if wish == "never" and saved:
            raise CheckpointError(
                f"{self.folder.path} holds {saved[0].name} and --resume is never: give another --run, or --resume auto"
            )
        if wish == "must" and not saved:
            raise CheckpointError(f"{folder} holds no checkpoint and --resume is must: use --resume auto")

    def _resume(self) -> int:
        """The step to go on with: 0, or where the newest sound checkpoint stands. Collective."""
        folder, replica = self.folder.checkpoints, self.replica
        found = checkpoint.resume(folder, replica.store, replica.state(), self.group, self._say, self._check_same_run)
        if found is None:
            self.replica.store.initialise(self.config.train.seed)
            return 0
        manifest = found[1]
        if manifest.fingerprint != self.facts:
            changed = differences(manifest.fingerprint, self.facts)[0]
            self.incomparable = self.incomparable or f"the run was resumed with another {changed}"
        self.incomparable = manifest.incomparable or self.incomparable
        return manifest.step

    def _check_same_run(self, path: Path, manifest: checkpoint.Manifest) -> None:
        """Refuses what would make another run of it, says what may change bits."""
        if manifest.tokenizer != self.tokenizer.hash or manifest.catalog != self.catalog.digest:
            what = "tokenizer" if manifest.tokenizer != self.tokenizer.hash else "catalog"
            raise CheckpointError(
                f"{path} was trained on another {what} than {self.config.data.dir} holds: set data.dir to its own, "
                f"{corpus.origin(manifest)}, or give another --run"
            )
        checkpoint.read_tokenizer(path, manifest)
        changed = [d for d in config_differences(manifest.config, self.config) if not d.startswith(_FREE)]
        steps = [d for d in changed if d.startswith("train.steps")]
        others = [d for d in changed if d not in steps]
        if others:
            raise CheckpointError(
                f"{path} was saved with other settings ({others[0]}): restore them, or give another --run"
            )
        if manifest.step > self.config.train.steps:
            raise CheckpointError(
                f"{path} stands at step {manifest.step}, train.steps = {self.config.train.steps}: raise train.steps"
            )
        if steps:
            self._say(f"note: {steps[0]}: the learning-rate schedule changes from step {manifest.step} on")

    def _say(self, text: str) -> None:
        if self.group.rank == 0:
            print(text, flush=True)

    def _open_display(self, step: int) -> Reporter:
        """Run folder's files, start table, progress; on rank 0 only."""
        self.metrics: MetricsLog | None = None
        if self.group.rank != 0:
            return Silent()
        self.folder.describe(self.config, self.facts, self.group.size)
        self.metrics = MetricsLog.open(self.folder.metrics, step)
        if not self.options.quiet:
            show_plan(f"training {self.folder.path}", self._plan_rows(step))
        if self.incomparable:
            self._say(f"ALARM bits are not comparable: {self.incomparable}: pin numerics.level and numerics.threads")
        return Progress(self.config.train.steps, step, self.config.log.every, self.options.quiet)

    def _plan_rows(self, step: int) -> list[tuple[str, str]]:
        config, train, replica, ranks = self.config, self.config.train, self.replica, self.group.size
        costs = replica.reduction.costs()
        held = bytes_held(replica)
        parts = ", ".join(f"{name} {value / 2**20:,.1f}" for name, value in held.items())
        samples = train.micro_batches * train.rows
        tokens = self.catalog.tokens("train")
        epochs = train.steps * samples / windows_of(tokens, config.model.context)
        reduction = f"{config.comm.reduction}, overlap {'on' if config.comm.overlap else 'off'}"
        if replica.place.on_gpu and config.comm.reduction != "nccl":
            reduction += f", {replica.reduction.transport.name}"
        sent = f"sends {costs['sent_bytes'] / 2**20:,.1f} MiB a step"
        size = f"{replica.store.count:,} parameters, vocabulary {self.vocabulary:,}, {train.dtype}"
        if config.numerics.products != train.dtype:
            size += f", products in {config.numerics.products}"
        where = replica.place.description if replica.place.on_gpu else f"{config.numerics.threads} thread each"
        shape = f"{train.micro_batches} micro-batches of {train.rows} × {config.model.context}"
        return [
            ("mesh", f"{replica.mesh}: {ranks} rank{'s' * (ranks > 1)}, {where}"),
            ("model", f"{config.model.kind}: {size}"),
            ("step", f"{samples * config.model.context:,} tokens: {shape}"),
            ("run", f"steps {step} to {train.steps}, {epochs:.1f} epochs of {tokens:,} tokens"),
            ("lanes", f"{train.lanes} over {ranks} rank{'s' * (ranks > 1)}, balance {replica.assignment.balance:.0%}"),
            ("reduction", f"{reduction}, {costs['buffers']} lane buffers, {sent}"),
            ("memory of a rank", f"{sum(held.values()) / 2**20:,.1f} MiB without activations: {parts}"),
            ("ops", registry.summary(train.dtype)),
            ("fingerprint", digest(self.facts)),
        ]

    def _report(self, step: int) -> int:
        """The last words: curve, DONE, and the hash of the weights as the last line."""
        weights = self.replica.store.weights_sha256()
        everybody = self.group.allgather(weights, "hashes of the weights")
        self.group.note("its last words")
        if len(set(everybody)) > 1:
            raise agreed(MlmError(f"ranks ended with different weights: {everybody}: report this as a bug"))
        complete = step >= self.config.train.steps
        if self.group.rank == 0:
            if self.metrics is not None:
                self.metrics.close()
            if complete:
                self.folder.finish(step, weights)
            else:
                self._say(
                    f"stopped after step {step} of {self.config.train.steps} ({self.stop.reason or 'another rank'}): "
                    "the same command goes on"
                )
            self._draw_curve()
            if self.config.train.dtype == "float32" and (fallen := registry.fallbacks()):
                self._say(f"note: the reference ran where no kernel's contract held: {fallen}")
            refused = {text: times for text, times in registry.refusals().items() if not text.endswith("memory")}
            if self.place.on_gpu and refused:  # sums on their way through host memory are no news
                self._say(f"note: kernels handed work to the next variant: {refused}")
            content = self.catalog.manifest.content[:12]
            self._say(f"fingerprint {digest(self.facts)}  corpus {content}  run {self.folder.path}")
            self._say(
                f"weights sha256 {weights}" + (f"  not comparable: {self.incomparable}" if self.incomparable else "")
            )
        return 0

    def _draw_curve(self) -> None:
        try:
            from mlm_mpi.monitor.report import loss_curve  # matplotlib takes half a second to import

            loss_curve(self.folder.metrics, self.folder.curve)
        except Exception as problem:  # a picture is not worth a finished run
            self._say(f"no loss curve: {problem}")
