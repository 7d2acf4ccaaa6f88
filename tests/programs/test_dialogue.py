"""Dialogues as whole programs: answers that are learnt, one hash on any mesh and past a kill, talks in a terminal."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from programs import Place, ended
from terminal import Terminal

CONFIG = """
[model]
kind = "llama"
layers = 2
width = 32
heads = 2
context = 96
init_std = 0.2
[task]
kind = "dialogue"
[data]
dir = "talks"
[train]
steps = 6
micro_batches = 3
rows = 4
[optim]
learning_rate = 1e-2
warmup_steps = 3
[log]
curve = false
"""
LEARNS = ("train.steps=120", "eval.every=0")
ENDLESS = """
import itertools, time
from mlm_mpi import generation
from mlm_mpi.__main__ import entry

def continue_prompt(*words, **more):
    for token in itertools.cycle((72, 65, 1)):  # the first token of a trained tokenizer is its end of text, then "!"
        time.sleep(0.05)
        yield token

generation.continue_prompt = continue_prompt
entry()
"""
CALLS = {"cat": "meow", "dog": "woof", "cow": "moo", "owl": "hoot"}
DIES = """
import signal
def before_step(rank, step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def talks() -> str:
    """Who is asked for says its sound, in dialogues of one to three questions."""
    names, lines = list(CALLS), []
    for number in range(240):
        asked = [names[number // 4**k % 4] for k in range(1 + number % 3)]
        said = [(("user", f"a {name}, {number}"), ("assistant", CALLS[name])) for name in asked]
        messages = [{"role": role, "content": text} for pair in said for role, text in pair]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines) + "\n"


def keys(*words: str) -> list[str]:
    return [part for word in words for part in ("--set", word)]


@pytest.fixture(scope="module")
def place_of_talks(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Place:
    """Dialogues and a configuration in a folder, and a run of one rank."""
    home = Place(tmp_path_factory.mktemp("talks"), corpus)
    (home.folder / "talks.jsonl").write_text(talks())
    (home.folder / "talks.toml").write_text(CONFIG)
    made = home.program("prepare", "talks.jsonl", "--out", "talks", "--chat", "--vocab", "264")
    assert made.code == 0, made.err
    home.weights = home.program("train", "talks.toml", "--run", "alone").weights
    return home


@pytest.fixture(scope="module")
def learns(place_of_talks: Place) -> Place:
    """A longer run beside them."""
    long = place_of_talks.program("train", "talks.toml", "--run", "learns", *keys(*LEARNS))
    assert long.code == 0, long.err
    return place_of_talks


def test_one_hash_on_three_ranks(place_of_talks: Place) -> None:
    three = place_of_talks.program("run", "-n", "3", "--", "train", "talks.toml", "--run", "three")
    assert three.weights == place_of_talks.weights


MESHES = {
    "two": (), "tp": ("mesh.tp=2",), "pp": ("mesh.pp=2", "train.schedule=one_f_one_b"), "zero": ("mesh.zero=3",),
    "sequence": ("mesh.tp=2", "mesh.sequence=true"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_one_hash_on_meshes(place_of_talks: Place, mesh: str) -> None:
    run = ("run", "-n", "2", "--", "train", "talks.toml", "--run", mesh, *keys(*MESHES[mesh]))
    assert place_of_talks.program(*run).weights == place_of_talks.weights


@pytest.mark.slow
def test_gpt_has_one_hash_too(place_of_talks: Place) -> None:
    words = ("train", "talks.toml", *keys("model.kind=gpt"), "--run")
    alone = place_of_talks.program(*words, "gpt")
    assert place_of_talks.program("run", "-n", "2", "--", *words, "gpt-two").weights == alone.weights


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_weights(place_of_talks: Place) -> None:
    script = place_of_talks.faulty_script(DIES)
    words = ["train", "talks.toml", "--run", "killed", *keys("checkpoint.every=2")]
    killed = ended(place_of_talks.popen([sys.executable, "-P", str(script), *words]))
    assert killed.code == -signal.SIGKILL, killed
    again = place_of_talks.program("run", "-n", "2", "--", *words)
    assert again.weights == place_of_talks.weights and "step-00000004" in place_of_talks.checkpoints("killed")


@pytest.mark.slow
def test_a_language_model_goes_on_with_dialogues(place_of_talks: Place) -> None:
    """The bytes of the corpus are the tokenizer's of the dialogues; the weights begin, and the task is another."""
    home = place_of_talks
    plain = CONFIG.replace('"dialogue"', '"language_model"').replace('"talks"', f'"{home.corpus}"')
    (home.folder / "plain.toml").write_text(plain)
    assert home.program("train", "plain.toml", "--run", "plain").code == 0
    assert home.program("prepare", "talks.jsonl", "--out", "bytes", "--chat", "--tokenizer", "bytes").code == 0
    tuned = "[task]" + CONFIG.partition("[task]")[2].replace('"talks"', '"bytes"')
    (home.folder / "tuned.toml").write_text(tuned)
    tuned = home.program("finetune", "plain", "tuned.toml", "--run", "tuned")
    two = home.program("run", "-n", "2", "--", "finetune", "plain", "tuned.toml", "--run", "tuned-two")
    assert tuned.weights == two.weights != home.weights and "start             weights " in tuned.out


@pytest.mark.slow
def test_figures_are_one_on_any_mesh_and_below_those_of_ngrams(learns: Place) -> None:
    words = ("evaluate", "learns", "--split", "test", "--baselines", "--json")
    alone = learns.program(*words)
    told = json.loads(alone.out)
    assert told["bits_per_byte"] < told["trigram_bits_per_byte"] < told["unigram_bits_per_byte"]
    assert learns.program("run", "-n", "2", "--", *words, "--tp", "2").out == alone.out
    lines = learns.program("evaluate", "learns", "--baselines").out
    assert re.search(r"\nbits per byte       \d\.\d{3}\n  unigram tokens    \d\.\d{3}\n  trigram tokens    \d", lines)


@pytest.mark.slow
def test_it_answers_through_a_pipe(learns: Place) -> None:
    asked = "a dog, 7\n\n/reset\na cow, 9\n/wat\n"
    command = [sys.executable, "-P", "-m", "mlm_mpi", "chat", "learns", "--temperature", "0"]
    done = subprocess.run(command, cwd=learns.folder, input=asked, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "woof\nmoo\n"), done
    assert done.stderr == "(forgotten)\nmlm-mpi: line 5 of stdin: no command '/wat'; known: /help, /reset, /save\n"
    learns.program("chat", "learns", "--temperature", "-1").refused("--temperature -1.0")
    learns.program("train", "talks.toml", "--run", "other", *keys("task.kind=language_model")).refused("prepare")


@pytest.mark.slow
def test_it_talks_in_a_terminal(learns: Place) -> None:
    """Ctrl-C at the prompt says how to leave; the oldest turns leave, which is said once."""
    command = [sys.executable, "-P", "-m", "mlm_mpi", "chat", "learns", "--temperature", "0", "--tokens", "30"]
    terminal = Terminal(command, learns.folder)

    def ask(text: bytes, answer: str) -> None:
        before = len(terminal.lines)
        terminal.type(text + b"\r")
        terminal.until(lambda lines: len(lines) > before and lines[-1] == ">", 30)
        assert answer in terminal.lines[-2], terminal.lines

    terminal.until(lambda lines: lines[-1:] == [">"], 60)
    assert "/help lists commands" in terminal.lines[0]
    ask(b"/help", "Ctrl-D  leave")
    terminal.type(b"\x03")
    terminal.until(lambda lines: "(Ctrl-D leaves)" in lines[-2] and lines[-1] == ">", 30)
    for number in range(4):
        ask(b"a cat, %d" % number, "meow")
    assert sum("oldest messages" in line for line in terminal.lines) == 1
    ask(b"/save talk.jsonl", "(8 messages in talk.jsonl)")
    ask(b"/save talk.jsonl", "exists already")
    ask(b"/reset", "(forgotten)")
    ask(b"x" * 100, "shorten it")
    terminal.type(b"\x04")
    assert terminal.end(30) == 0
    (record,) = map(json.loads, (learns.folder / "talk.jsonl").read_text().splitlines())
    assert record["messages"][:2] == [
        {"role": "user", "content": "a cat, 0"}, {"role": "assistant", "content": "meow"}
    ]  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(place_of_talks: Place) -> None:
    command = [sys.executable, "-P", "-c", ENDLESS, "chat", "alone", "--tokens", "1000000"]
    terminal = Terminal(command, place_of_talks.folder)
    terminal.until(lambda lines: lines[-1:] == [">"], 60)
    for number in range(2):
        terminal.type(b"a cat, %d\r" % number)
        terminal.until(lambda lines: lines[-1].startswith("ha!ha!"), 30)
        terminal.type(b"\x03")
        terminal.until(lambda lines: lines[-1] == ">" and lines[-2].endswith(" …"), 30)
    terminal.type(b"/save stopped.jsonl\r")
    terminal.until(lambda lines: "(4 messages in stopped.jsonl)" in lines[-2], 30)
    terminal.type(b"\x04")
    assert terminal.end(30) == 0
    (record,) = map(json.loads, (place_of_talks.folder / "stopped.jsonl").read_text().splitlines())
    assert [message["content"][:5] for message in record["messages"]] == ["a cat", "ha!ha"] * 2
