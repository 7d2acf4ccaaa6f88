"""The command line as a stranger meets it: what is listed, what is completed, and one line for each mistake."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_mpi.__main__ import COMMANDS, command, main

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

FILES = {
    "ok.toml": "[train]\nsteps = 5\n",
    "steps.toml": '[train]\nsteps = "300"\n',
    "bound.toml": "[train]\nrows = 0\n",
    "enum.toml": '[train]\ndtype = "float16"\n',
    "kind.toml": '[optim]\nname = "adam"\n',
    "key.toml": "[train]\nstpes = 5\n",
    "other.toml": "[train]\nlayers = 5\n",
    "old.toml": '[optim]\nname = "adamw"\nmomentum = 0.9\n',
    "section.toml": "[trian]\nsteps = 5\n",
    "top.toml": "steps = 3\n",
    "word.toml": "qqq = 3\n",
    "twice.toml": "[[train]]\nsteps = 3\n",
    "syntax.toml": "[train]\nsteps = 4\nrows 5\n",
    "latin.toml": '[data]\n# é\ndir = "x"\n',
    "run/config.toml": "[train]\nsteps = 5\n",
    "old/config.toml": '[optim]\nname = "adamw"\nmomentum = 0.9\n',
    "old/environment.json": '{"fingerprint": {"mlm_mpi": "0.0.9"}}',
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with configurations of every fault."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="latin-1" if "latin" in name else "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlm_mpi.config.prepare_environment", lambda numerics: None)  # other tests need theirs
    return tmp_path


TRAIN = "train ok.toml --run r "
MISTAKES = {
    # the words of the command line
    "trian ok.toml": "no command 'trian'; did you mean 'train'?",
    "help trian": "no command 'trian'; did you mean 'train'?",
    "wat": "no command 'wat'; known: chaos, chat, compare, completion, config, doctor, evaluate, explain, finetune, ",
    "train": "train: the following arguments are required: CONFIG, --run: see mlm-mpi train --help",
    "train ok.toml --run": "train: argument --run: expected one argument: see mlm-mpi train --help",
    TRAIN + "--resum_e must": "unknown arguments: --resum_e must; did you mean '--resume'?: see mlm-mpi train --help",
    TRAIN + "train.steps=5": "unknown arguments: train.steps=5; write --set before each SECTION.KEY=VALUE: see",
    TRAIN + "--max-steps many": "train: argument --max-steps: not a whole number: 'many': see mlm-mpi train --help",
    TRAIN + "--device tpu": "train: argument --device: invalid choice: 'tpu' (choose from ",
    "generate r --temperature hot": "generate: argument --temperature: not a number: 'hot': see mlm-mpi generate",
    "run -n two -- train ok.toml --run r": "run: argument -n/-np/--ranks: not a whole number: 'two': see mlm-mpi run",
    "run -n 2 -- train ok.toml": "train: the following arguments are required: --run: see mlm-mpi train --help",
    "run -n 2 -- train ok.toml --run r --nonsense": "train: unknown arguments: --nonsense: see mlm-mpi train --help",
    "completion ksh": "completion: argument shell: invalid choice: 'ksh' (choose from ",
    # a configuration that cannot be read
    "train '' --run r": "CONFIG is empty: give a TOML file such as jobs/configs/tiny.toml; `mlm-mpi config` explains",
    "train ok.tml --run r": "cannot read the configuration ok.tml: No such file or directory; did you mean ok.toml?",
    "train no/ok.toml --run r": "no/ok.toml: No such file or directory: give a TOML file such as",
    "train run --run r": "configuration run: it is a folder, not a regular file; did you mean run/config.toml?",
    "train syntax.toml --run r": "syntax.toml is not TOML: Expected '=' after a key in a key/value pair (at line 3, "
    "column 6): rows 5",
    "train latin.toml --run r": "latin.toml is not TOML: line 2 is not UTF-8 text: save it as UTF-8",
    # what stands in a file
    "train steps.toml --run r": 'steps.toml: train.steps = "300" must be a whole number (in [1, 4294967296]), not a '
    "string: write 300",
    "train bound.toml --run r": "bound.toml: train.rows = 0 must be at least 1",
    "train enum.toml --run r": 'enum.toml: train.dtype = "float16" must be "float32" or "float64"',
    "train kind.toml --run r": 'kind.toml: optim.name = "adam" is none of adamw, lion, muon, sgd; did you '
    "mean 'adamw'?",
    "train key.toml --run r": "key.toml: unknown key train.stpes; did you mean 'steps'?",
    "train other.toml --run r": "other.toml: unknown key train.layers; did you mean model.layers?",
    "train old.toml --run r": 'old.toml: unknown key optim.momentum of optim.name = "adamw"; "muon" and "sgd" know it: '
    'take it out, or set optim.name = "muon"',
    "train old/config.toml --run r": "(old/config.toml was written by mlm-mpi 0.0.9, this is ",
    "train section.toml --run r": "section.toml: unknown section [trian]; did you mean 'train'?",
    "train top.toml --run r": "top.toml: steps = 3 stands outside of all sections: write it below [train]",
    "train word.toml --run r": "word.toml: qqq = 3 stands outside of all sections: sections are model, task, ",
    "train twice.toml --run r": 'twice.toml: train = [{"steps": 3}], but train is a section: write [train] on a line',
    # what --set gives, also where a file has the same key
    "train bound.toml --run r --set train.rows=-1": "--set: train.rows = -1 must be at least 1",
    TRAIN + "--set train.steps=1e3": "--set: train.steps = 1000.0 must be a whole number (in [1, 4294967296]), not a "
    "number: write 1000",
    TRAIN + "--set train.rows=1,000": '"1,000" must be a whole number (at least 1), not a string: write 1000',
    TRAIN + "--set train.steps=8589934592": "must be in [1, 4294967296]: random numbers count steps in 32 bits",
    TRAIN
    + "--set train.dtype=Float32": '--set: train.dtype = "Float32" must be "float32" or "float64": write "float32"',
    TRAIN + "--set log.curve=yes": '--set: log.curve = "yes" must be true or false, not a string: write true',
    TRAIN + "--set log.curve=0": "--set: log.curve = 0 must be true or false, not a whole number: write false",
    TRAIN + "--set optim.clip=high": '--set: optim.clip = "high" must be a number (not negative), not a string',
    TRAIN + "--set data.dir=7": "--set: data.dir = 7 must be a string, not a whole number: write '\"7\"'",
    TRAIN + "--set optim.lr=1": "--set: unknown key optim.lr; known: average, beta1, beta2, clip, decay_fraction, ",
    TRAIN + "--set trian.steps=5": "--set: unknown section [trian]; did you mean 'train'?",
    TRAIN + "--set model.kind=rnn": '--set: model.kind = "rnn" is none of bert, encoder_decoder, gpt, gru',
    TRAIN
    + "--set comm.reduction=nccl": 'comm.reduction = "nccl" needs backend.device = "gpu", not "cpu": set that, or ',
    "sweep ok.toml --out s --over optim.lr=1,2": "unknown key optim.lr; known: average, beta1, beta2, clip, ",
    "vectors r": "vectors has nothing to do: give words, --analogies FILE or --export FILE",
    "vectors r king --top 0": "--top 0 must be at least 1",
    "vectors no.vec king": "cannot read no.vec (No such file or directory): mend it or leave it out",
    "prepare x --out o --lowercase": "--lowercase is of --tokenizer words, not bpe: leave it out",
    "prepare x --out o --tokenizer words --vocab 2": "--vocab 2 must be in [3, 1048576]",
    "sweep ok.toml --out s": "nothing to try: give --over section.key=value,value",
    "sweep ok.toml --out s --over train.seed=1,2 --eta 1": "--eta 1 must be at least 2",
    "sweep ok.toml --out s --over train.steps=1,2": "would compare runs of other lengths: leave it out",
    "sweep ok.toml --out '' --over train.seed=1,2": "--out '' is empty",
    "chaos ok.toml --faults kill,fire": "--faults names 'fire'; ",
    "chaos ok.toml -n 1": "-n 1 must be at least 2: somebody has to be left",
    "chaos ok.toml --trials 0": "--trials 0 must be at least 1",
    "chaos ok.toml --set train.steps=1": "train.steps = 1 must be at least 2: something has to follow a fault",
    "compare one": "one run alone compares with nothing: name two or more",
    "verify": "verify: the following arguments are required: RUN: see mlm-mpi verify --help",
    "verify one": "one is no run folder: give the --run folder of a training",
    "compare one two": "one is no run folder: give the --run folder of a training",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(place: Path, capfd: pytest.CaptureFixture[str], line: str) -> None:
    assert main(shlex.split(line)) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("mlm-mpi: "), err
    assert MISTAKES[line] in err, err
    assert not (place / "r").exists()


def test_the_commands_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    """For whoever asks; a script whose variable was empty gets the list and an exit code that is not 0."""
    for words, code in (([], 2), (["help"], 0), (["--help"], 0), (["-h"], 0)):
        assert main(words) == code
        out, err = capfd.readouterr()
        assert err == "" and all(f"\n  {name} " in out for name in COMMANDS) and "mlm-mpi help COMMAND" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_in_examples_that_work(capfd: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["help", name]) == 0
    asked = capfd.readouterr().out
    assert main([name, "--help"]) == 0
    assert capfd.readouterr().out == asked
    examples = asked.partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    assert examples, asked
    for example in examples:
        for line in example.replace('eval "$(', "").replace(')"', "").split("|")[:1]:
            program, first, *rest = shlex.split(line, comments=True)
            assert program == "mlm-mpi"
            command(first)[0].parse([word for word in rest if word != "…"])
            if first == "run":
                inner = rest[rest.index("--") + 1 :]
                if inner[1:] != ["…"]:
                    command(inner[0])[0].parse(inner[1:])


COMPLETED = {
    "mlm-mpi tr": "train",
    "mlm-mpi train jobs/configs/t": "jobs/configs/tiny.toml",
    "mlm-mpi train x --resume n": "never",
    "mlm-mpi train x --set checkpoint.k": "checkpoint.keep=",
    "mlm-mpi run -n 4 -- train x --run r --set backend.gr": "backend.graphs=",
    "mlm-mpi run -n 4 -- train x --set backend.device=g": "gpu",  # bash: what follows the =
    "mlm-mpi evaluate x --data jobs/conf": "jobs/configs/",
}


@pytest.mark.skipif(shutil.which("bash") is None or not (BIN / "mlm-mpi").exists(), reason="no bash, or not installed")
def test_bash_completes_commands_options_files_and_keys() -> None:
    script = 'eval "$(mlm-mpi completion bash)"\n'
    for line in COMPLETED:
        script += f"COMP_LINE={shlex.quote(line)}; COMP_POINT={len(line)}; COMPREPLY=(); COMP_TYPE=9\n"
        script += '_python_argcomplete mlm-mpi; echo "${COMPREPLY[@]}"\n'
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line.strip() for line in done.stdout.splitlines()] == list(COMPLETED.values()), done
