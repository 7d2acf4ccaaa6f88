"""Whether a run used each sample exactly once, as its ledger (evidence.py), checkpoints and corpus show.

Windows are drawn again from seed and corpus: what a loader delivered has their digest, or other samples were used than
the run had promised. That no window comes twice in an epoch of its corpus is counted, not believed.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm_mpi import config as configuration
from mlm_mpi.config import Config
from mlm_mpi.data.mixture import Mixture, mixture_of
from mlm_mpi.data.sampler import Sampler, digest
from mlm_mpi.errors import CheckpointError, ConfigError, DataError
from mlm_mpi.plug import Plugins
from mlm_mpi.train import checkpoint, evidence
from mlm_mpi.train.checkpoint import Manifest
from mlm_mpi.train.corpus import origin
from mlm_mpi.train.evidence import Begin, Line
from mlm_mpi.train.folder import RunFolder
from mlm_mpi.train.manifest import step_of
from mlm_mpi.train.same_run import check_plugins
from mlm_mpi.train.task import Task

MOST = 20  # findings, and skipped micro-batches, that are named
_ENOUGH = 1000  # findings after which nothing more is read
_AT_ONCE = 1 << 17  # samples drawn in one go: walks end together, so calls on few elements are few


class Skipped(NamedTuple):
    """A micro-batch that is in no sum: its samples of the run, [first, stop), and why."""

    step: int
    micro_batch: int
    first: int
    stop: int
    reason: str


@dataclass
class Proof:
    """What was found. Steps count from 1; `begins`: steps made before the ledger begins."""

    begins: int = 0
    steps: int = 0
    samples: int = 0
    corpus: str = ""  # the hash of its content, or ""
    epochs: tuple[float, ...] = ()  # of each corpus
    ranks: Counter[int] = field(default_factory=Counter)  # name -> micro-batches
    skipped: list[Skipped] = field(default_factory=list)  # the first MOST
    skipped_in_all: int = 0
    skipped_samples: int = 0
    undone: list[tuple[int, int]] = field(default_factory=list)  # [first, last] step, apart from each other
    undone_samples: int = 0
    torn: int = 0  # lines that are none of a ledger
    checkpoints: list[str] = field(default_factory=list)  # sound ones, the newest first
    saved: int = 0  # the step of the newest
    wrong: list[str] = field(default_factory=list)  # the first MOST findings
    wrong_in_all: int = 0
    unproven: str = ""  # why nothing could be said of windows

    @property
    def holds(self) -> bool:
        """Each sample was used exactly once, or is named as skipped."""
        return not self.wrong and not self.unproven

    def find(self, text: str) -> None:
        """Something is wrong."""
        self.wrong_in_all += 1
        if len(self.wrong) < MOST:
            self.wrong.append(text)


def prove(run: Path, plugins: Plugins | None = None, data: Sequence[str] = ()) -> Proof:
    """What the files of a run folder show. `data`: where its corpora lie now.

    Raises ConfigError, CheckpointError where there is nothing to examine.
    """
    folder, plugins, proof = RunFolder(run), plugins or Plugins(), Proof()
    _check_there(folder)
    _examine_checkpoints(folder, proof)  # first: the ledger of a live run only grows
    config, manifest = _settings(folder, plugins)
    try:
        sampler, proof.corpus = _promise(_with_data(config, folder, plugins, data), plugins, manifest)
    except DataError as error:
        sampler, proof.unproven = None, str(error)
    _read(folder, _Steps(config, proof, None if sampler is None else _Windows(sampler, proof)))
    proof.samples = config.train.micro_batches * config.train.rows_ramp().before(proof.steps)
    if sampler is not None:
        shares = zip(sampler.mixture.counts(proof.samples), sampler.mixture.windows, strict=True)
        proof.epochs = tuple(count / windows for count, windows in shares)
    return proof


def _read(folder: RunFolder, steps: "_Steps") -> None:
    """The whole ledger, unless so much is wrong that it is none."""
    lines = 0
    for step, line in evidence.read(folder.ledger):
        lines += 1
        steps.take(step, line)
        if steps.proof.wrong_in_all >= _ENOUGH:
            return
    steps.end()
    with open(folder.ledger, "rb") as file:
        steps.proof.torn = max(0, sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b"")) - lines)
    if not steps.proof.steps and not steps.proof.saved:
        raise ConfigError(f"{folder.ledger} has no line of a step: verify the run when it has made one")
    _compare_ends(folder, steps.proof)


def _check_there(folder: RunFolder) -> None:
    if not folder.path.is_dir():
        raise ConfigError(f"{folder.path} is no run folder: give the --run folder of a training")
    if not folder.ledger.exists():
        raise ConfigError(
            f"{folder.path} has no {folder.ledger.name}: it is no run folder, has made no step yet, or comes of a "
            "version without ledgers: give the --run folder of a training; one that goes on can be proven from there on"
        )


def _settings(folder: RunFolder, plugins: Plugins) -> tuple[Config, Manifest | None]:
    """Those that the newest checkpoint has sealed; before the first, config.toml."""
    manifest = checkpoint.newest_manifest(folder.checkpoints)
    if manifest is None:
        return configuration.load(folder.path / "config.toml", (), plugins), None
    return configuration.from_table(manifest.config, f"{folder.checkpoints}: manifest.json", plugins), manifest


def _with_data(config: Config, folder: RunFolder, plugins: Plugins, data: Sequence[str]) -> Config:
    """The same with the folders of its corpora as they were given, or as the last start wrote them down."""
    dirs = list(data)
    if not dirs:
        with suppress(ConfigError):
            last = configuration.load(folder.path / "config.toml", (), plugins).data
            dirs = list(last.mixture) or [last.dir]
    own = config.data
    if len(dirs) != max(1, len(own.mixture)):
        if data:
            raise ConfigError(f"--data names {len(dirs)} folders, the run has {max(1, len(own.mixture))} corpora")
        return config
    moved = replace(own, mixture=tuple(dirs)) if own.mixture else replace(own, dir=dirs[0])
    return replace(config, data=moved)


def _promise(config: Config, plugins: Plugins, manifest: Manifest | None) -> tuple[Sampler, str]:
    """Which windows each micro-batch was to read, and of which corpus. Raises DataError as `_task` does."""
    task, train = _task(config, plugins, manifest), config.train
    mixture = mixture_of(task.samples("train"))
    return Sampler(train.seed, mixture, train.micro_batches, train.rows_ramp()), task.content


def _task(config: Config, plugins: Plugins, manifest: Manifest | None) -> Task:
    """The task over the corpora that the run was trained on. Raises DataError where they are gone, or others."""
    wanted = "" if manifest is None else f"; the run was trained on {origin(manifest)}"
    remedy = ": make it again there, or give its folder by --data DIR"
    try:
        task: Task = plugins.find("tasks", config.task.kind, "task.kind").build(config, plugins)
        task.samples("train")
    except DataError as error:
        raise DataError(f"{error}{wanted}{remedy if wanted else ''}") from None
    if manifest is not None:
        if task.about()["catalog"] != manifest.catalog:
            where = " and ".join(config.data.mixture) or config.data.dir
            raise DataError(f"{where} holds another corpus, {task.about()['catalog'][:12]}{wanted}{remedy}")
        rooms = ("tasks", "objectives")
        check_plugins(Path(f"{config.task.kind} of the run"), manifest.plugins, plugins.used, rooms)
    return task


def _examine_checkpoints(folder: RunFolder, proof: Proof) -> None:
    for path in checkpoint.published(folder.checkpoints):
        proof.saved = max(proof.saved, step_of(path))
        try:
            checkpoint.check(path, checkpoint.read_manifest(path))
        except CheckpointError as error:
            if path.exists():  # else a live run has replaced it meanwhile
                proof.find(f"checkpoint {path.name} is damaged: {error}")
        else:
            proof.checkpoints.append(path.name)


def _compare_ends(folder: RunFolder, proof: Proof) -> None:
    """A ledger ends where the run does; of a run that was killed, or lives, it may be ahead of what is saved."""
    done = folder.completion()
    if proof.steps < proof.saved:
        proof.find(f"{_steps(proof.steps + 1, proof.saved)} no line, checkpoint step-{proof.saved:08} has made them")
    elif done is not None and proof.steps != done[0]:
        proof.find(f"the ledger ends after step {proof.steps}, DONE says step {done[0]}")
    if done is not None and proof.saved != done[0]:
        proof.find(f"DONE says step {done[0]}, the newest checkpoint is of step {proof.saved}")


def _steps(first: int, last: int) -> str:
    return f"step {first} has" if first == last else f"steps {first} to {last} have"


class _Steps:
    """The lines of a ledger, one after another."""

    def __init__(self, config: Config, proof: Proof, windows: "_Windows | None") -> None:
        self.micro_batches, self.rows = config.train.micro_batches, config.train.rows_ramp()
        self.proof, self.windows = proof, windows
        self._counted = 0, 0  # steps, their samples

    def take(self, step: int, line: Line | Begin | None) -> None:
        """The next line, which should be of the next step."""
        proof = self.proof
        if isinstance(line, Begin) and not proof.steps:
            proof.begins = proof.steps = line.step
            return
        if step > proof.steps + 1:
            proof.find(f"{_steps(proof.steps + 1, step - 1)} no line")
        if step <= proof.steps:
            proof.find(f"step {step} has another line, which comes after that of step {proof.steps}")
        else:
            proof.steps = step
        if isinstance(line, Line):
            self._examine(line)
        else:
            proof.find(f"the line of step {step} is not as mlm-mpi writes them")

    def _examine(self, line: Line) -> None:
        step, find, m = line.step, self.proof.find, self.micro_batches
        own = self._samples(step - 1), self._samples(step)
        if line.samples != own:
            find(f"step {step} lists samples {_range(*line.samples)}, its own are {_range(*own)}")
        names, counts = {name for name, _ in line.ranks}, [count for _, count in line.ranks]
        if sum(counts) != m or 0 in counts:
            find(f"step {step} lists ranks that ran {sum(counts)} of its {m} micro-batches: {str(counts)[:80]}")
        elif len(names) < len(counts):
            find(f"step {step} lists a rank twice: {str([name for name, _ in line.ranks])[:80]}")
        else:
            self.proof.ranks.update(dict(line.ranks))
        skipped = self._skipped(line)
        if line.undone is not None:
            self._undo(line.step, *line.undone)
        digests = _digests(line.windows, m)
        if digests is not None and any(digests[index] for index in skipped):
            find(f"step {step} skips a micro-batch of which it has a digest: it was run")
        if digests is None:
            find(f"step {step} has no 8 hex digits for each of its {m} micro-batches in windows")
        elif self.windows is not None:
            self.windows.take(step, own, digests, skipped)

    def _samples(self, steps: int) -> int:
        """Of the first so many steps: what `Sampler.samples` says, where there is no corpus."""
        if steps != self._counted[0]:  # 4 us, and lines follow each other
            self._counted = steps, self.micro_batches * self.rows.before(steps)
        return self._counted[1]

    def _skipped(self, line: Line) -> frozenset[int]:
        found = set()
        for name, reason in line.skipped.items():
            if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < self.micro_batches):
                self.proof.find(f"step {line.step} skips micro-batch {name[:20]!r} of {self.micro_batches}")
                continue
            rows = self.rows.at(line.step - 1)
            first = self._samples(line.step - 1) + int(name) * rows
            self.proof.skipped_in_all += 1
            self.proof.skipped_samples += rows
            if len(self.proof.skipped) < MOST:
                self.proof.skipped.append(Skipped(line.step, int(name), first, first + rows, reason))
            found.add(int(name))
        return frozenset(found)

    def _undo(self, step: int, first: int, last: int) -> None:
        if not 1 <= first <= last == step:
            self.proof.find(f"step {step} undoes steps {first} to {last}")
            return
        while self.proof.undone and self.proof.undone[-1][1] >= first - 1:  # one runs into the other
            first = min(first, self.proof.undone.pop()[0])
        self.proof.undone.append((first, last))

    def end(self) -> None:
        """After the last line."""
        if self.windows is not None:
            self.windows.compare()
        self.proof.undone_samples = sum(
            self._samples(last) - self._samples(first - 1) for first, last in self.proof.undone
        )


def _digests(text: str, micro_batches: int) -> np.ndarray | None:
    """Shapes: -> (M,); None where the text does not hold so many."""
    try:
        found = np.frombuffer(bytes.fromhex(text), ">u4") if len(text) == 8 * micro_batches else None
    except ValueError:
        return None
    return found if found is not None and len(found) == micro_batches else None  # fromhex passes blanks over


def _range(first: int, stop: int) -> str:
    return f"{first:,}-{stop - 1:,}"


_Read = tuple[int, np.ndarray, frozenset[int]]  # a step, digests of its micro-batches, which of them were skipped


class _Windows:
    """Draws again what each micro-batch should have read, some steps at a time, and compares."""

    def __init__(self, sampler: Sampler, proof: Proof) -> None:
        self.sampler, self.proof, self.census = sampler, proof, _Census(sampler.mixture)
        self._steps: list[_Read] = []  # one after another, not yet compared
        self._first = self._stop = 0  # their samples

    def take(self, step: int, samples: tuple[int, int], digests: np.ndarray, skipped: frozenset[int]) -> None:
        """The digests that the micro-batches of a step with these samples had."""
        if samples[0] != self._stop:
            self.compare()
        if not self._steps:
            self._first = samples[0]
        self._steps.append((step, digests, skipped))
        self._stop = samples[1]
        if self._stop - self._first >= _AT_ONCE:
            self.compare()

    def compare(self) -> None:
        """With the digests of what was to be read."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        first, stop = self._first, self._stop
        windows = self.sampler.draw(first, stop - first)
        own = np.array([digest(part) for part in self._micro_batches(steps, windows)], np.uint32)
        read = np.concatenate([digests for _, digests, _ in steps])
        for at in np.flatnonzero(own != read).tolist():
            number, index = divmod(at, self.sampler.micro_batches)
            step, _, skipped = steps[number]
            if index not in skipped:
                self.proof.find(
                    f"step {step}, micro-batch {index} read windows of digest {read[at]:08x}, its own have "
                    f"{own[at]:08x}"
                )
        if (twice := self.census.take(first, windows)) is not None:
            self.proof.find(f"{_range(first, stop)} of the run's samples: {twice}")

    def _micro_batches(self, steps: list[_Read], windows: np.ndarray) -> Iterator[np.ndarray]:
        at = 0
        for step, _, _ in steps:
            rows = self.sampler.rows.at(step - 1)
            for _ in range(self.sampler.micro_batches):
                yield windows[at : at + rows]
                at += rows


class _Census:
    """Which windows of each corpus have come up in its present epoch."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.next: int | None = None  # the sample after those counted
        self._bases = np.cumsum([0, *mixture.windows])
        self._had: list[int] = []  # samples of each corpus
        self._seen = [np.zeros(windows, bool) for windows in mixture.windows]

    def take(self, first: int, windows: np.ndarray) -> str | None:
        """The windows of samples from `first` on; says which of them its epoch has had before, if one has.

        An epoch has as many samples as its corpus has windows: where none comes twice, each comes once.
        """
        if self.next is None:
            self._had = self.mixture.counts(first)
        elif first != self.next:  # lines are missing, or come again: that is told, and the count ends
            return None
        self.next, found = first + len(windows), None
        for corpus in range(len(self._had)):
            own = windows[(windows >= self._bases[corpus]) & (windows < self._bases[corpus + 1])] - self._bases[corpus]
            for epoch, part in self._by_epoch(corpus, own):
                found = found or self._again(corpus, epoch, part)
        return found

    def _by_epoch(self, corpus: int, own: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        size = self.mixture.windows[corpus]
        while len(own):
            epoch, place = divmod(self._had[corpus], size)
            part, own = own[: size - place], own[size - place :]
            if place == 0:
                self._seen[corpus][:] = False
            self._had[corpus] += len(part)
            yield epoch, part

    def _again(self, corpus: int, epoch: int, part: np.ndarray) -> str | None:
        seen = self._seen[corpus]
        again, once = part[seen[part]], np.unique(part)
        seen[part] = True
        if not len(again) and len(once) == len(part):
            return None
        return f"a window of {self.mixture.names[corpus]} comes twice in epoch {epoch + 1}"
