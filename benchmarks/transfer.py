"""What word vectors and other reviews are worth: the classifier of examples/sentiment, tuned and drawn, by seeds.

    make example-sentiment            # corpora, the pre-trained encoder in runs/visitors
    python benchmarks/transfer.py --seeds 3 --record

Both arms see the same labelled texts in the same order, with the settings of finetune.toml and the best of their
checkpoints by held-out accuracy; the model of one has the sizes of the other. A drawn encoder begins without
vectors and checkpoint and has, by `--scratch KEY=VALUE`, its own best learning rate and warm-up, chosen on the held-out
side like those of finetune.toml. Of the test side, which nothing was chosen by, is the last figure of each.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness

EXAMPLE = harness.HERE.parent / "examples" / "sentiment"
MODEL = ("kind", "layers", "width", "heads", "context", "norm", "ngrams")
SCRATCH = ("optim.learning_rate=3e-3", "optim.warmup_steps=40")


def ran(*words: str) -> str:
    """What `mlm-mpi` says."""
    return subprocess.run(
        [sys.executable, "-m", "mlm_mpi", *words], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip


def accuracies(run: Path, ranks: int, *words: str) -> tuple[float, float]:
    """Trains on some ranks, then measures the best weights: accuracy held out, and on the test side."""
    ran(*(("run", "-n", str(ranks), "--") if ranks > 1 else ()), *words, "--run", str(run), "--quiet")
    heldout = float(json.loads((run / "best.json").read_text())["value"])
    test = float(json.loads(ran("evaluate", str(run), "--best", "--split", "test", "--json"))["accuracy"])
    shutil.rmtree(run)
    return heldout, test


def settings_of(run: Path) -> list[str]:
    """The sizes of a trained model, as words of a command line."""
    manifest = json.loads(next(run.glob("checkpoints/*/manifest.json")).read_text())["manifest"]
    return [word for key in MODEL for word in ("--set", f"model.{key}={manifest['config']['model'][key]}")]


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=1, help="so many trainings side by side")
    parser.add_argument("--run", type=Path, default=Path("runs/visitors"), help="the pre-trained encoder")
    parser.add_argument("--data", default="corpora/critics", help="the labelled texts")
    parser.add_argument("--scratch", nargs="*", default=SCRATCH, metavar="KEY=VALUE", help="of what begins with a draw")
    args = parser.parse_args()
    config, drawn = str(EXAMPLE / "finetune.toml"), settings_of(args.run)
    drawn += [word for setting in args.scratch for word in ("--set", setting)]
    report = harness.Report("transfer", "What pre-training is worth", args)
    report.head("seed", "scratch, held out", "tuned, held out", "scratch, test", "tuned, test", "points, test")
    found = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once) as pool:
        runs = []
        for seed in range(args.seeds):
            common = ("--set", f"data.dir={args.data}", "--set", f"train.seed={seed}")
            arms = {
                "scratch": ("train", config, *common, *drawn),
                "tuned": ("finetune", str(args.run), "--best", config, *common),
            }
            runs.append(
                [
                    pool.submit(accuracies, Path(folder) / f"{arm}-{seed}", args.ranks, *words)
                    for arm, words in arms.items()
                ]
            )
        for seed, pair in enumerate(runs):
            (scratch, tuned) = (run.result() for run in pair)
            found.append((scratch[0], tuned[0], scratch[1], tuned[1]))
            report.row(seed, *(f"{one:.4f}" for one in found[-1]), f"{100 * (tuned[1] - scratch[1]):+.1f}")
    means = [sum(column) / len(found) for column in zip(*found, strict=True)]
    report.row("mean", *(f"{one:.4f}" for one in means), f"{100 * (means[3] - means[2]):+.1f}")
    report.say()
    report.say(f"From scratch with {' '.join(args.scratch)}.")
    report.save()


if __name__ == "__main__":
    main()
