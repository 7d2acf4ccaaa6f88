"""A run from its start to its last words.

open the data · build the engine · resume · train (trainer.py) · report
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_mpi import config as configuration
from mlm_mpi.backend import registry
from mlm_mpi.backend.choice import place_of
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.mesh import Mesh, mesh, placement
from mlm_mpi.config import Config
from mlm_mpi.data.loader import Loader
from mlm_mpi.data.mixture import mixture_of
from mlm_mpi.data.sampler import Sampler
from mlm_mpi.errors import CheckpointError, ConfigError, DataError, MlmError, PeerLost, agreed, nearest
from mlm_mpi.layers.adapters import adapt
from mlm_mpi.layers.base import Part
from mlm_mpi.monitor.metrics import MetricsLog
from mlm_mpi.monitor.progress import Progress, Reporter, Silent, done_before, show_plan
from mlm_mpi.monitor.sinks import check, opened
from mlm_mpi.plug import Plugins, check_same
from mlm_mpi.train import checkpoint, reference
from mlm_mpi.train.build import build, reduction
from mlm_mpi.train.checkpoint import Manifest
from mlm_mpi.train.corpus import origin
from mlm_mpi.train.evidence import Evidence
from mlm_mpi.train.fingerprint import differences, digest, fingerprint, unforeseen
from mlm_mpi.train.folder import RunFolder, findable
from mlm_mpi.train.keeper import Keeper
from mlm_mpi.train.ledger import Ledger
from mlm_mpi.train.measure import measure
from mlm_mpi.train.memory import check_memory
from mlm_mpi.train.recovery import Recovery
from mlm_mpi.train.rhythm import Place, Rhythm
from mlm_mpi.train.same_run import check_same_run, check_wish, compare_fingerprints
from mlm_mpi.train.search import Heldout, Search
from mlm_mpi.train.start import (
    Origin,
    Words,
    check_origin,
    check_same_origin,
    fill,
    freeze,
    freeze_again,
    origin_at,
    sha256_of_vectors,
    words_of,
)
from mlm_mpi.train.stop import StopRequest
from mlm_mpi.train.table import plan_rows
from mlm_mpi.train.task import Refers, Task
from mlm_mpi.train.trainer import Trainer

OpenTask = Callable[[Config, Plugins], Task]


@dataclass(frozen=True)
class Options:
    """What a start of a run may choose without changing what the run computes."""

    run: Path
    resume: str = "auto"  # auto | never | must
    max_time_s: float | None = None
    max_steps: int | None = None
    quiet: bool = False
    plugins: Plugins = field(default_factory=Plugins)


class Run:
    """A run on one rank: its data, its engine, its folder."""

    def __init__(self, config: Config, options: Options, open_task: OpenTask, group: Group) -> None:
        self.options, self.plugins = options, options.plugins
        self.group = group.with_timeout(config.comm.timeout_s)
        self.stop = StopRequest(options.max_time_s, options.max_steps)
        self.folder = RunFolder(options.run)
        on_node = self.group.on_node()
        with self.group.together("opening the data"):
            configuration.check_ranks(config, group.size)
            if config.comm.spares and not group.recovers:
                raise ConfigError(
                    f"comm.spares = {config.comm.spares} are of no use here: this job ends with a rank that dies; "
                    "start it by mlm-mpi run on an Open MPI 5 with ULFM (mlm-mpi doctor), or set comm.spares = 0"
                )
            if not configuration.is_plain(config) and group.recovers:
                raise ConfigError(
                    "--with-ft ulfm lets ranks go on without one that dies, which they cannot where they share a model "
                    "or its moments (mesh.pp, mesh.tp, mesh.zero): leave it out, or start by mlm-mpi run"
                )
            if group.rank == 0:
                check(config.log)
            self.place = place_of(config, config.numerics.level, on_node)
            self.task = self._open(config, open_task)
            if isinstance(self.task, Refers) and not config.start.checkpoint:
                raise ConfigError(
                    f'task.kind = "{config.task.kind}" compares a model with what it began with: set start.checkpoint, '
                    "or begin by mlm-mpi finetune RUN"
                )
            self.samples, self.heldout = self.task.samples("train"), self.task.samples("heldout")
            train = config.train
            self.sampler = Sampler(train.seed, mixture_of(self.samples), train.micro_batches, train.rows_ramp())
            optimizer = self.plugins.find("optim", config.optim.name, "optim.name")
            check_memory(config, self.task, getattr(optimizer, "MOMENTS", 0), self.place, on_node[1])
            self.config = findable(config)
            self.search = self._search()
        check_same(self.plugins, self.group)
        self.mesh = mesh(self.group, config.mesh.pp, config.mesh.tp, config.mesh.sequence)
        self.origin: Origin | None = None  # of weights that are not drawn, where the run begins
        self.words: Words | None = None  # that rows of the table of tokens begin as
        self.began: dict[str, Any] = {}  # the manifest's fields that name both
        self.engine = build(self.config, self.plugins, self._parts(), self.mesh, self.place, self.task.width)
        self.placed = placement(self.mesh)
        self.facts = fingerprint(
            self.config, group.size, self.place, self.plugins.used, self.engine.machine.reduction.stable
        )
        self.incomparable = compare_fingerprints(self.group, self.facts)
        if self.incomparable:
            self.engine.machine.audit.every = 0  # ranks of different libraries differ, and none is ill

    def _open(self, config: Config, open_task: OpenTask) -> Task:
        try:
            return open_task(config, self.plugins)
        except DataError as error:  # say what a run that stands already was trained on
            manifest = checkpoint.newest_manifest(self.folder.checkpoints)
            trained = f"; {self.folder.path} was trained on {origin(manifest)}" if manifest else ""
            raise DataError(f"{error}{trained}") from None

    def _search(self) -> Search:
        """For the best weights, by a figure that the task knows. Raises ConfigError, DataError."""
        wanted, figures = self.config.eval, {"loss": False, **getattr(self.task, "figures", {})}
        if wanted.figure not in figures:
            raise ConfigError(f'eval.figure = "{wanted.figure}" is not measured{nearest(wanted.figure, figures)}')
        if wanted.searches and not len(self.heldout):
            raise DataError(
                "eval.best and eval.patience go by held-out text, and the corpora hold none out: prepare with a larger "
                "--heldout, or set eval.best = false and eval.patience = 0"
            )
        return Search(wanted, figures[wanted.figure], self.folder, self.group.rank == 0)

    def _parts(self) -> list[Part]:
        """The model with its adapters, and marked what of it is trained; where the run begins, what with is found.

        Collective.
        """
        start, found, parts = self.config.start, list[Any](), list[Part]()
        with self.group.together("a look at what the run begins with"):
            saved = checkpoint.newest_manifest(self.folder.checkpoints)
            path = str(origin_at(start.checkpoint).path) if start.checkpoint and saved is None else ""
            sha256 = sha256_of_vectors(start.vectors) if start.vectors and saved is None else ""
            found = [None if saved is None else saved.frozen, path, sha256]
        frozen, path, sha256 = self.group.broadcast(
            found, "what the run begins with"
        )  # rank 0's, if a live run changes it
        with self.group.together("the weights that the run begins with"):
            parts = self.task.parts()
            if start.lora_rank:
                adapt(parts, start.lora_rank, start.lora_alpha, start.lora_targets)
            if frozen is not None:
                freeze_again(parts, frozen)
                return parts
            if start.checkpoint:
                labels = self.task.about().get("labels", [])
                self.origin = origin_at(path).for_labels(labels, parts).for_tokens(parts)
                self.began["start"] = self.origin.name
                check_origin(self.origin, start, parts, self.task.tokenizer, self.plugins)
            if start.vectors:
                self.words = words_of(start, parts, self.task.tokenizer, sha256)
                self.began["vectors"] = sha256
            freeze(parts, start, None if self.origin is None else self.origin.shapes)
        return parts

    def run(self) -> int:
        """Trains to the last step, or to the agreed stop. Collective."""
        with self.stop.listening():
            return self._run()

    def _run(self) -> int:
        with self.group.together("taking the run folder"):
            check_wish(self.options.resume, self.folder.path, self.folder.checkpoints)
            if self.group.rank == 0:
                self.folder.acquire()
                checkpoint.remove_unfinished(self.folder.checkpoints)
        self.group.watch(self.config.comm.stall_s, self.folder.records)
        manifest = self._resume()
        done = self.group.broadcast(self.folder.completion() if self.group.rank == 0 else None, "a look at DONE")
        if manifest is not None and done is not None and done[0] == manifest.step and self._is_last(done):
            return self._say_complete(manifest, done)
        first = self._go_on(manifest)
        if isinstance(self.task, Refers):
            self._refer(self.task, manifest)
        self.ledger = self._open_ledger(first)
        config = self.config
        loader = Loader(self.samples, self.sampler, config.data.prefetch, config.comm.timeout_s)
        rhythm = Rhythm(config.train.steps, config.eval.every, config.checkpoint.every, config.guard.compare_every)
        self.engine.keep(first)
        recovery = Recovery(self, first, self.group.rank == 0) if self.group.recovers else None
        mend = recovery.mend if recovery is not None else None
        trainer = Trainer(
            rhythm, self.engine, loader, self.keeper(), self.ledger, self.stop, self._measure, self.search, mend
        )
        try:
            return self._to_the_end(trainer, Place(first))
        except MlmError as error:
            if error.agreed:  # all ranks are here: what was begun before is not lost
                trainer.keeper.publish()
            else:
                self._confess(str(error))
            raise
        except Exception as error:
            self._confess(f"{type(error).__name__}: {error}")
            raise
        finally:
            loader.close()
            self.ledger.close()

    def _confess(self, text: str) -> None:
        """Before this rank leaves: at which work it failed, for those who may be given it next."""
        self.group.note("its last words after an error")
        if self.group.recovers:
            self.folder.records.failed(*self.engine.at, text)

    def _to_the_end(self, trainer: Trainer, place: Place) -> int:
        """Training and last words, again and again with the ranks that are left. Collective."""
        while True:
            step = trainer.train(place)
            self.ledger.close()
            try:
                self._report(step)
                self.group.agree("the end of the training")
            except PeerLost as lost:
                if trainer.mend is None:
                    raise
                place = trainer.mend(trainer, lost, Place(step))
            else:
                return 0

    def regroup(self, group: Group) -> None:
        """Makes anew, for the ranks of a group, what hangs on one, but for what writes down. Collective over it."""
        self.group, self.mesh, self.search.names = group, Mesh(group), group.rank == 0
        config, plugins, new, place = self.config, self.plugins, self.mesh, self.place
        store = self.engine.machine.store
        self.engine.regroup(new, lambda assignment: reduction(config, plugins, store, assignment, new, place))
        if not self.engine.machine.reduction.stable:
            self.incomparable = f"a rank was lost, and comm.reduction = {config.comm.reduction}"

    def quarantines(self, step: int, index: int, text: str) -> bool:
        """Whether a step does without a micro-batch that has failed on two ranks; one is left of each step."""
        ill = self.engine.quarantine
        others = [pair for pair in ill if pair[0] == step and pair[1] != index]
        if self.config.guard.failing == "stop" or len(others) + 1 >= self.config.train.micro_batches:
            return False
        ill[step, index] = f"it has failed on two ranks: {text}"
        return True

    def _measure(self) -> Heldout | None:
        """Held-out loss and the figure of the search, None where the corpora hold nothing out. Collective."""
        wanted = self.config.eval
        with self.engine.measured():
            sums = measure(self.engine.machine.chain, self.heldout, wanted.rows, wanted.windows, self.mesh, self.place)
        if sums is None:
            return None
        if sums.parts:
            self.ledger.say("held-out  " + ", ".join(f"{name} {part.mean:.4f}" for name, part in sums.parts.items()))
        if not wanted.searches:
            return Heldout(sums.mean, sums.mean)
        figures = {**self.task.quality(sums), "loss": sums.mean}
        if wanted.figure != "loss":
            self.ledger.say(f"held-out  {wanted.figure} {figures[wanted.figure]:.4f}")
        return Heldout(sums.mean, self.group.broadcast(float(figures[wanted.figure]), "the figure of the search"))

    def keeper(self) -> Keeper:
        saving, engine = self.config.checkpoint, self.engine
        saver = checkpoint.Saver(
            self.folder.checkpoints, engine.machine.store, engine.state(), self.task.tokenizer, self.group,
            saving.keep, saving.background and saving.every > 0,  # nothing goes on beside a save at the end
            engine.machine.owned, self.search.spared,
        )  # fmt: skip
        return Keeper(saver, engine.check_weights, self._about, lambda text: self.ledger.alarm(text))

    def _about(self) -> dict[str, Any]:
        return self.task.about() | {
            "config": configuration.to_table(self.config), "fingerprint": self.facts,
            "incomparable": self._why_incomparable(), "plugins": dict(self.plugins.used),
            "levels": self.engine.machine.guard.state(), "search": self.search.state(),
        } | self.began  # fmt: skip

    def _why_incomparable(self) -> str | None:
        return self.incomparable or unforeseen(self.facts, registry.fallbacks())

    def _resume(self) -> Manifest | None:
        """Restores the newest sound checkpoint, if there is one. Collective."""
        store, state = self.engine.machine.store, self.engine.state()
        found = checkpoint.resume(
            self.folder.checkpoints, store, state, self.group, self._say,
            self._check_same,
            self.engine.machine.owned,
        )  # fmt: skip
        return None if found is None else found[1]

    def _check_same(self, path: Path, manifest: Manifest) -> None:
        check_same_run(path, manifest, self.config, self.task, self.plugins, self._say)
        check_same_origin(path, manifest, self.config.start)

    def _go_on(self, manifest: Manifest | None) -> int:
        """The step to go on with: 0, with new weights, or that of the checkpoint. Collective."""
        if manifest is None:
            self._begin()
            return 0
        self.began = {"start": manifest.start, "vectors": manifest.vectors}
        self.search.restore(manifest.search)
        if manifest.fingerprint != self.facts:
            changed = differences(manifest.fingerprint, self.facts)[0]
            self.incomparable = self.incomparable or f"the run was resumed with another {changed}"
        self.engine.machine.guard.restore(manifest.levels)
        self.incomparable = manifest.incomparable or self.incomparable
        return manifest.step

    def _begin(self) -> None:
        """Initial weights: drawn, or those of what the run begins with. Collective."""
        with self.group.together("the initial weights"):
            try:
                fill(self.engine.machine.store, self.config.train.seed, self.origin, self.words)
            except checkpoint.DamagedCheckpoint as error:
                raise CheckpointError(f"{error}: give another start.checkpoint") from None

    def _refer(self, task: Refers, manifest: Manifest | None) -> None:
        """Tells a task what the initial weights say of its samples. Collective."""
        found = dict[str, Any]()
        if manifest is None:
            self._say("asking the initial weights what they say of all samples")
            rows = self.config.train.rows
            found = reference.measured(task, self.engine.machine.chain, rows, self.mesh, self.place)
        with self.group.together("the reference"):
            path = self.folder.reference
            if manifest is not None:
                found = reference.read(path, manifest)
            elif self.group.rank == 0:
                reference.write(path, self.began.get("start", ""), self.task.about()["catalog"], found)
            task.refer(found)
            self.samples, self.heldout = task.samples("train"), task.samples("heldout")

    def _say(self, text: str) -> None:
        if self.group.rank == 0:
            print(text, flush=True)

    def _open_ledger(self, step: int) -> Ledger:
        """Run folder's files, start table, progress; on rank 0 only."""
        if self.group.rank != 0:
            return Ledger([], Silent())
        self.folder.describe(self.config, self.facts, self.group.size)
        if not self.options.quiet:
            rows = plan_rows(self.config, self.task, self.sampler, self.engine, step, digest(self.facts), self.placed)
            if self.origin is not None:
                rows.append(("start", self.origin.in_words(self.engine.machine.store)))
            if self.words is not None:
                rows.append(("start", self.words.in_words()))
            show_plan(f"training {self.folder.path}", rows)
        if self.incomparable:
            self._say(f"ALARM bits are not comparable: {self.incomparable}")
        return self.new_ledger(step, step)

    def new_ledger(self, step: int, first: int) -> Ledger:
        """Sinks and progress of a run that has made so many steps, in this start those after `first`."""
        log = self.config.log
        table, patience_s = configuration.to_table(self.config), min(30.0, self.config.comm.timeout_s / 2)
        sinks = [MetricsLog.open(self.folder.metrics, step), *opened(log, self.folder.path, table, patience_s)]
        before = done_before(self.folder.metrics, first, log.every) if step > first else []
        show: Reporter = Progress(
            self.config.train.steps, step, log.every, self.options.quiet, before=before, unit=self.task.unit
        )
        evidence = Evidence(self.folder.ledger, step, self.sampler.samples)
        return Ledger(sinks, show, self._tokens_read, evidence)

    def _tokens_read(self, steps: int) -> int:
        """By the first so many steps. Texts that are targets differ in length: then it is the mean of an epoch."""
        samples = self.sampler.samples(steps)
        if self.task.unit == "tokens":
            return samples * self.task.row_tokens
        mean = self.task.tokens("train") / sum(self.sampler.mixture.windows)
        return round(samples * min(mean, self.task.row_tokens))

    def _report(self, step: int) -> None:
        """The last words: curve, DONE, and the hash of the weights as the last line."""
        weights = self._weights()
        if self.group.rank == 0:
            if step >= self.config.train.steps:
                self.folder.finish(step, weights)
            elif self.search.is_over:
                self.folder.finish(step, weights, self.config.eval.patience)
                self._say(
                    f"ended after step {step} of {self.config.train.steps}, {self.search.in_words()} (eval.patience = "
                    f"{self.config.eval.patience})"
                )
            else:
                self._say(
                    f"stopped after step {step} of {self.config.train.steps} ({self.stop.reason or 'another rank'}): "
                    "the same command goes on"
                )
            if self.config.log.curve:
                self._draw_curve()
            self._say_what_was_handed_on()
            self.ledger.finish()
            if self.group.company is not None and (lost := self.group.company.lost):
                self._say(f"note: {len(lost)} of {len(lost) + self.group.size} ranks were lost on the way")
            if skipped := self.engine.skipped:
                self._say(f"note: {skipped} micro-batch{'es' * (skipped > 1)} skipped: mlm-mpi verify names them")
            self._say_hashes(self.facts, weights, self._why_incomparable())

    def _is_last(self, done: tuple[int, str, int]) -> bool:
        """Whether what DONE says is the end that is wanted now: the last step, or that of the same patience."""
        step, _, patience = done
        return step == self.config.train.steps or 0 < patience == self.config.eval.patience

    def _say_complete(self, manifest: Manifest, done: tuple[int, str, int]) -> int:
        """The last words of a start that finds nothing to do. Collective."""
        weights = self._weights()
        if self.group.rank == 0:
            self.folder.confirm()
            _, when, patience = done
            ended = f" (ended {when})" if when.isprintable() and when else ""
            made, more = f"all {manifest.step} steps are made", f"train.steps above {manifest.step}"
            if manifest.step < self.config.train.steps:
                made = f"it ended for eval.patience = {patience} after step {manifest.step}"
                more = f"eval.patience above {patience}"
            self._say(f"{self.folder.path} is complete: {made}{ended}, nothing is left to do")
            if manifest.fingerprint != self.facts:  # of another version, say, whose hash is another
                changed = differences(manifest.fingerprint, self.facts)[0]
                self._say(
                    f"note: it was trained with other numerics than now ({changed}); trained anew, bits may differ"
                )
            self._say(f"to go on, raise {more}; to train anew, give another --run")
            self._say_hashes(manifest.fingerprint, weights, manifest.incomparable)
        return 0

    def _weights(self) -> str:
        """The hash of the weights, the same everywhere. Collective."""
        weights = self.engine.weights_sha256()
        everybody = self.group.allgather(weights, "hashes of the weights")
        self.group.note("its last words")
        if len(set(everybody)) > 1:
            raise agreed(MlmError(f"ranks ended with different weights: {everybody}: report this as a bug"))
        return weights

    def _say_hashes(self, facts: dict[str, Any], weights: str, incomparable: str | None) -> None:
        self._say(f"fingerprint {digest(facts)}  corpus {self.task.content}  run {self.folder.path}")
        self._say(f"weights sha256 {weights}" + (f"  not comparable: {incomparable}" if incomparable else ""))

    def _say_what_was_handed_on(self) -> None:
        if self.config.train.dtype == "float32" and (fallen := registry.fallbacks()):
            self._say(f"note: the reference ran where no kernel's contract held: {fallen}")
        refused = {text: times for text, times in registry.refusals().items() if not text.endswith("memory")}
        if self.place.on_gpu and refused:  # sums on their way through host memory are no news
            self._say(f"note: kernels handed work to the next variant: {refused}")

    def _draw_curve(self) -> None:
        try:
            from mlm_mpi.monitor.report import loss_curve  # matplotlib takes half a second to import

            model = f"{self.task.model}, {self.engine.machine.store.count:,} parameters"
            loss_curve(self.folder.metrics, self.folder.curve, f"{self.folder.path}: {model}")
        except Exception as problem:  # a picture is not worth a finished run
            self._say(f"no loss curve: {problem}")
