"""What pre-training is worth: the classifier of examples/sentiment, fine-tuned and from scratch, by seeds.

    make example-sentiment            # texts, corpora, the pre-trained encoder in runs/sentiment-texts
    python benchmarks/transfer.py --seeds 3 --record

Both see the same labelled texts for the same number of steps with the same settings but `start.checkpoint` and, because
a drawn encoder learns faster with it, `--scratch-rate` as learning rate; the model of one has the sizes of the other.
Accuracy on the test side, which nothing was chosen by.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

EXAMPLE = harness.HERE.parent / "examples" / "sentiment"
MODEL = ("layers", "width", "heads", "context", "norm", "kind")


def ran(*words: str) -> str:
    """What `mlm-mpi` says."""
    return subprocess.run(
        [sys.executable, "-m", "mlm_mpi", *words], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip


def accuracy(run: Path, ranks: int, *words: str) -> float:
    """Trains on some ranks, then measures."""
    ran("run", "-n", str(ranks), "--", *words, "--run", str(run), "--quiet")
    return float(json.loads(ran("evaluate", str(run), "--split", "test", "--json"))["accuracy"])


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--run", default="runs/sentiment-texts", help="the pre-trained encoder")
    parser.add_argument("--data", default="corpora/sentiment", help="the labelled texts")
    parser.add_argument("--scratch-rate", default="2e-3", help="learning rate of what begins with drawn weights")
    args = parser.parse_args()
    settings = json.loads(next(Path(args.run).glob("checkpoints/*/manifest.json")).read_text())["manifest"]["config"]
    model = [word for key in MODEL for word in ("--set", f"model.{key}={settings['model'][key]}")]
    report = harness.Report("transfer", "What pre-training is worth", args)
    report.head("seed", "from scratch", "pre-trained, fine-tuned", "points")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            common = ("--set", f"data.dir={args.data}", "--set", f"train.seed={seed}")
            config = str(EXAMPLE / "finetune.toml")
            rate = ("--set", f"optim.learning_rate={args.scratch_rate}")
            runs = Path(folder) / f"scratch-{seed}", Path(folder) / f"tuned-{seed}"
            scratch = accuracy(runs[0], args.ranks, "train", config, *common, *model, *rate)
            tuned = accuracy(runs[1], args.ranks, "finetune", args.run, config, *common)
            found.append((scratch, tuned))
            report.row(seed, f"{scratch:.4f}", f"{tuned:.4f}", f"{100 * (tuned - scratch):+.1f}")
            for run in runs:
                shutil.rmtree(run)
    means = [sum(column) / len(found) for column in zip(*found, strict=True)]
    report.say()
    report.say(f"Means {means[0]:.4f} and {means[1]:.4f}: {100 * (means[1] - means[0]):+.1f} points.")
    report.save()


if __name__ == "__main__":
    main()
