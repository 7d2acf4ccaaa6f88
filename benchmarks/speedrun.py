"""Time to a quality: how soon our recipe has what PyTorch with nanoGPT's has after 150 seconds.

    python benchmarks/speedrun.py                       # on 1 and on 2 ranks, the built-in corpus: half an hour
    python benchmarks/speedrun.py --seconds 60 --ranks 2 --record

PyTorch trains GPT-2 (`jobs/configs/gpt2-tiny.toml`: nanoGPT's model, AdamW, cosine, clipping) for as many steps as fit
into the time, its schedule stretched over them, on as many threads as ours has ranks; its learning rate is the best of
`--rates`, each tried for all of the time. Ours (`jobs/configs/tiny.toml`) is trained for a growing number of steps, its
schedule stretched over them, until its held-out bits per character are no more than PyTorch's best. Same corpus,
vocabulary, tokens a step, cores; both have no more than 3.72 M parameters. Evaluation and saving are not counted.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
from harness import Report, Worker

from mlm_mpi import config
from mlm_mpi.monitor.runs import told

CONFIGS = harness.HERE.parent / "jobs/configs"
GROWTH = 1.12  # from one number of steps to the next


def mlm_mpi(*words: str) -> str:
    """Runs a sub-command of the package; returns what it printed."""
    done = subprocess.run([sys.executable, "-m", "mlm_mpi", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"mlm-mpi {' '.join(words)} ended with exit code {done.returncode}:\n{done.stdout}")
    return done.stdout


def theirs(args: Any, corpus: str, steps: int, rate: float, threads: int) -> dict[str, Any]:
    """PyTorch after that many steps."""
    changes = [f"data.dir={corpus}", f"train.steps={steps}", f"optim.learning_rate={rate}"]
    c = config.load(str(CONFIGS / "gpt2-tiny.toml"), [*changes, f"optim.warmup_steps={max(1, steps // 10)}"])
    job = {"task": "quality", "config": config.to_table(c), "threads": threads, "keep_freed_memory": True}
    peer = Worker([args.peer_python, str(harness.HERE / "torch_peer.py"), json.dumps(job)], threads)
    answer = peer.ask(train=True)
    peer.close()
    return answer


def ours(corpus: str, folder: Path, steps: int, ranks: int) -> tuple[float, float]:
    """(bits per character, seconds in steps) after that many steps."""
    run = folder / f"{ranks}-{steps}"
    changes = (f"data.dir={corpus}", f"train.steps={steps}", "eval.every=0", "checkpoint.every=0")
    settings = [word for change in changes for word in ("--set", change)]
    train = ["train", str(CONFIGS / "tiny.toml"), "--run", str(run), "--quiet"]
    mlm_mpi("run", "-n", str(ranks), "--", *train, *settings)
    return json.loads(mlm_mpi("evaluate", str(run), "--json"))["bits_per_character"], told(run).seconds


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=150.0, help="PyTorch's time")
    parser.add_argument("--ranks", default="1,2", help="ours; PyTorch has as many threads")
    parser.add_argument("--rates", default="2e-3,4e-3", help="PyTorch's learning rates")
    parser.add_argument("--first", type=int, default=20, help="our first number of steps")
    parser.add_argument("--peer-python", default=harness.PEER_PYTHON)
    args = parser.parse_args()
    report = Report("speedrun", "Time to a quality, against PyTorch", args)
    with tempfile.TemporaryDirectory(prefix="mlm-speedrun-") as folder:
        corpus = f"{folder}/corpus"
        mlm_mpi("prepare", "--builtin", "--out", corpus)
        report.head("ranks", "who", "steps", "seconds", "bits per character")
        for ranks in map(int, args.ranks.split(",")):
            one = min(theirs(args, corpus, steps, 1e-3, ranks)["seconds"] / steps for steps in (8, 12))
            steps, found = math.floor(args.seconds / one), []
            for rate in map(float, args.rates.split(",")):
                answer = theirs(args, corpus, steps, rate, ranks)
                found.append((answer["bits_per_character"], answer["seconds"]))
                report.row(ranks, f"PyTorch, {rate:g}", steps, f"{answer['seconds']:.1f}", f"{found[-1][0]:.3f}")
            wanted, peer_seconds = min(found)
            mine = float(args.first)
            while True:
                bits, seconds = ours(corpus, Path(folder), round(mine), ranks)
                report.row(ranks, "ours", round(mine), f"{seconds:.1f}", f"{bits:.3f}")
                if bits <= wanted:
                    break
                mine *= GROWTH
            report.say()
            report.say(f"{ranks} ranks: {peer_seconds / seconds:.2f} × as fast to {wanted:.3f} bits per character")
            report.say()
    report.save()


if __name__ == "__main__":
    main()
