"""`mlm-mpi chat RUN`: a conversation with a model of dialogues, in a terminal or through a pipe."""

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from mlm_mpi.commands import drawing, sharing
from mlm_mpi.errors import ConfigError, DataError, MlmError, agreed, nearest
from mlm_mpi.files import publish
from mlm_mpi.plug import named

if TYPE_CHECKING:  # --help and completion need no NumPy
    from mlm_mpi.comm.group import Group
    from mlm_mpi.conversation import Conversation
    from mlm_mpi.generation import Sampling
    from mlm_mpi.train.trained import Trained

_COMMANDS = {
    "/help": "this list",
    "/reset": "forget what was said",
    "/save": "FILE: write what was said, as prepare --chat reads it",
}
_PROMPT = "> "
_EXAMPLES = """examples:
  mlm-mpi chat runs/talks
  mlm-mpi chat runs/talks --system "Be brief." --temperature 0.5 --top-p 0.9

In a terminal /help lists what else can be typed; Ctrl-C stops an answer, Ctrl-D leaves. Through a pipe each line is
answered in a line: echo "How are you?" | mlm-mpi chat runs/talks"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi chat`."""
    parser.epilog = _EXAMPLES
    drawing.configure(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told before all else")


def main(args: argparse.Namespace, group: "Group") -> int:
    """Runs the command. Collective."""
    if group.size > 1:
        ranks = group.size
        raise agreed(ConfigError(f"chat has one keyboard, and the launcher gave {ranks} ranks: leave mlm-mpi run out"))
    sampling = drawing.sampling(args)
    trained = _loaded(args, group)
    conversation = _conversation(trained, args, sampling)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is cleaned like the text of any corpus
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        _through_pipe(conversation)
        return 0
    print(f"{args.run}, step {trained.step}; /help lists commands, Ctrl-D leaves", flush=True)
    _in_terminal(conversation)
    return 0


def _loaded(args: argparse.Namespace, group: "Group") -> "Trained":
    """The model. Raises ConfigError for one of another task."""
    from mlm_mpi.train.trained import load, note

    trained = load(sharing.checkpoint_of(args, group), named(args.plugins), args.device)
    kind = trained.config.task.kind
    if not getattr(trained.plugins.find("tasks", kind, "task.kind"), "CHATS", False):
        raise ConfigError(
            f'{args.run} was trained for task.kind = "{kind}", which answers nobody: train it on dialogues (prepare '
            "--chat, then finetune), or give another run"
        )
    if trained.averaged:
        note(f"note: checkpoint of step {trained.step}, moving average of its weights")
    return trained


def _conversation(trained: "Trained", args: argparse.Namespace, sampling: "Sampling") -> "Conversation":
    from mlm_mpi.conversation import Conversation
    from mlm_mpi.generation import continue_prompt

    context = trained.config.model.context

    def continued(prompt: list[int], number: int) -> Iterator[int]:
        """Each answer has draws of its own."""
        own = replace(sampling, seed=sampling.seed + number)
        return continue_prompt(trained.chain, context, prompt, own, place=trained.place)

    return Conversation(continued, trained.tokenizer, context, args.tokens, args.system)


def _in_terminal(conversation: "Conversation") -> None:
    """Until Ctrl-D. What cannot be done is said in a line, and the conversation goes on."""
    with contextlib.suppress(ImportError):  # some Pythons are built without it
        import readline  # noqa: F401  (from now on `input` edits lines and recalls earlier ones)
    is_told = False
    while True:
        try:
            line = input(_PROMPT).strip()
        except EOFError:
            print(flush=True)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)", flush=True)
            continue
        try:
            if line.startswith("/"):
                is_told = is_told and line != "/reset"
                print(_obeyed(conversation, line), flush=True)
            elif line:
                is_told = _stream(conversation, line, is_told)
        except MlmError as error:
            print(f"mlm-mpi: {error}", flush=True)


def _stream(conversation: "Conversation", line: str, is_told: bool) -> bool:
    """Shows an answer while it is made, up to Ctrl-C. -> whether it was told, now or before, that messages are no
    longer read."""
    with _Stop() as stop, contextlib.closing(conversation.answer(line)) as pieces:  # type: ignore[type-var]
        if conversation.left and not is_told:
            print("(the oldest messages no longer fit into the context and are not read)")
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
            if stop.is_wished:
                sys.stdout.write(" …")
                break
    print(flush=True)
    return is_told or conversation.left > 0


class _Stop:
    """Ctrl-C as a wish, for `with`: no exception in the middle of a calculation."""

    def __init__(self) -> None:
        self.is_wished = False

    def __enter__(self) -> "_Stop":
        self._before = signal.signal(signal.SIGINT, self._wish)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self.is_wished = True


def _through_pipe(conversation: "Conversation") -> None:
    """An answer in a line for each line that is not empty; line breaks in it become blanks. Raises DataError."""
    is_told = False
    for number, line in enumerate(sys.stdin, 1):
        text = line.strip()
        try:
            if text.startswith("/"):
                print(_obeyed(conversation, text), file=sys.stderr, flush=True)
            elif text:
                answer = "".join(conversation.answer(text))
                print(" ".join(answer.split()), flush=True)
        except MlmError as error:
            raise type(error)(f"line {number} of stdin: {error}") from None
        if conversation.left and not is_told:
            is_told = True
            print("note: the oldest messages no longer fit into the context and are not read", file=sys.stderr)


def _obeyed(conversation: "Conversation", line: str) -> str:
    """Does what a line with a command says; gives what is to be told of it. Raises DataError."""
    name, _, rest = line.partition(" ")
    if name == "/help":
        told = [f"{command:<8}{text}" for command, text in _COMMANDS.items()]
        return "\n".join([*told, "Ctrl-C  stop an answer", "Ctrl-D  leave"])
    if name == "/reset":
        conversation.reset()
        return "(forgotten)"
    if name == "/save":
        return _saved(conversation, rest.strip())
    raise DataError(f"no command {name!r}{nearest(name, list(_COMMANDS))}")


def _saved(conversation: "Conversation", name: str) -> str:
    """Writes what was said into a new file. Raises DataError."""
    if not name.endswith(".jsonl") or "\0" in name:
        raise DataError(f"/save {name}: give a name without NUL that ends in .jsonl, as prepare --chat reads it")
    if os.path.lexists(name):
        raise DataError(f"/save {name}: that exists already, give another name")
    messages = [message._asdict() for message in conversation.said]
    if not conversation.has_answers:
        raise DataError("/save: nothing was answered so far, say something first")
    publish(Path(name), json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n")
    return f"({len(messages)} messages in {name})"
