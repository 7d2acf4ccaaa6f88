"""Quality after equal training: our weights and PyTorch's from equal starts on equal data, in bits per character.

    python benchmarks/quality.py --peer torch                              # GPT-2, tiny, built-in text
    python benchmarks/quality.py --peer torch --config C --corpus DIR --steps 400 --ranks 2

Ours is trained by the command line (`mlm-mpi run -n R -- train`) and judged by `mlm-mpi evaluate`. PyTorch
(`torch_peer.py`) starts from the same weights (drawn from seed and name), reads the same micro-batches of
the same steps, follows the same schedule with its own AdamW and clipping, and is judged on every target of
the held-out split. The bar: at most 0.01 bits per character apart.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
from harness import Report, Worker

from mlm_mpi import config

BAR = 0.01
BUILTIN = ["prepare", "--builtin", "--out"]


def mlm_mpi(*words: str) -> str:
    """Runs a sub-command of the package; returns what it printed."""
    done = subprocess.run([sys.executable, "-m", "mlm_mpi", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"mlm-mpi {' '.join(words)} ended with exit code {done.returncode}:\n{done.stdout}")
    return done.stdout


def curve(path: Path) -> list[float]:
    """Training losses by step of a metrics file."""
    return [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--config", default=str(harness.HERE.parent / "jobs/configs/gpt2-tiny.toml"))
    parser.add_argument("--corpus", help="prepared corpus (default: `prepare --builtin` into a temporary folder)")
    parser.add_argument("--steps", type=int, help="instead of the configuration's")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--peer", choices=["torch"], default="torch")
    parser.add_argument("--peer-python", default=harness.PEER_PYTHON)
    args = parser.parse_args()
    report = Report("quality", "Quality against PyTorch", args)
    with tempfile.TemporaryDirectory(prefix="mlm-quality-") as folder:
        corpus, run = args.corpus or f"{folder}/corpus", Path(folder, "run")
        if not args.corpus:
            mlm_mpi(*BUILTIN, corpus)
        changes = [*args.set, f"data.dir={corpus}", f"numerics.threads={args.threads}"]
        changes += [f"train.steps={args.steps}"] if args.steps else []
        c = config.load(args.config, changes)
        settings = [word for change in changes for word in ("--set", change)]
        start = time.perf_counter()
        mlm_mpi("run", "-n", str(args.ranks), "--", "train", args.config, "--run", str(run), "--quiet", *settings)
        seconds = time.perf_counter() - start
        ours: dict[str, Any] = json.loads(mlm_mpi("evaluate", str(run), "--json", "--baselines"))
        losses = curve(run / "metrics.jsonl")
        job = {"task": "quality", "config": config.to_table(c), "threads": args.threads, "keep_freed_memory": True}
        peer = Worker([args.peer_python, str(harness.HERE / "torch_peer.py"), json.dumps(job)], args.threads)
        start = time.perf_counter()
        theirs = peer.ask(train=True)
        peer_seconds = time.perf_counter() - start
        peer.close()
    difference = ours["bits_per_character"] - theirs["bits_per_character"]
    batch = c.train.micro_batches * c.train.rows * c.model.context
    report.say(
        f"{c.model.layers} layers, width {c.model.width}, context {c.model.context}, {c.train.steps} steps of {batch} "
        f"tokens, {c.train.dtype}, seed {c.train.seed}; ours on {args.ranks} ranks, PyTorch {peer.hello['torch']}; "
        f"held-out {ours['tokens']} tokens, {ours['characters']} characters, unigram "
        f"{ours['unigram_bits_per_character']:.3f}, xz {ours['xz_bits_per_character']:.3f} bits per character"
    )
    report.say()
    report.head("", "bits per character", "loss, nats per token", "last training loss", "wall s")
    for name, quality, last, wall in (
        ("mlm_mpi", ours, losses[-1], seconds), ("PyTorch", theirs, theirs["losses"][-1], peer_seconds),
    ):  # fmt: skip
        report.row(name, f"{quality['bits_per_character']:.5f}", f"{quality['loss']:.5f}", f"{last:.5f}", f"{wall:.1f}")
    apart = [abs(a - b) for a, b in zip(losses, theirs["losses"], strict=True)]
    report.say()
    report.say(
        f"difference {difference:+.5f} bits per character, bar {BAR}: {'met' if abs(difference) <= BAR else 'MISSED'}; "
        f"training losses apart at step 1: {apart[0]:.1e}, at step 11: {apart[min(10, len(apart) - 1)]:.1e}, "
        f"at most: {max(apart):.1e}"
    )
    report.save()
    raise SystemExit(0 if abs(difference) <= BAR else 1)


if __name__ == "__main__":
    main()
