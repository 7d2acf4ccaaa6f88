"""Conversations of two people as dialogues, JSON lines for `prepare --chat`: train.jsonl, heldout.jsonl, test.jsonl.

    python examples/chat/dialogues.py corpora/chat-lines

Needs chitchat-dataset (`pip install 'mlm-mpi[examples]'`), of which the file of data is read and nothing is run. Who
began is the user, who replied the assistant; what one of them sent in a row is one message, a line each. Conversations
that one person had alone are left out. A long one becomes several dialogues of so many characters as a small model's
context holds, each beginning with the user. All of them stand on one side, where the conversation's name puts it.
"""

import json
import sys
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHARACTERS = 640  # about 200 tokens of a vocabulary of 4,096, those of the roles among them
SIDES = ("heldout", "test", *["train"] * 14)

Message = dict[str, str]


def conversations() -> dict[str, Any]:
    """By their names."""
    spec = find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        sys.exit("chitchat_dataset is not installed: pip install 'mlm-mpi[examples]'")
    return dict(json.loads(Path(spec.origin).with_name("dataset.json").read_bytes()))


def exchanges(turns: list[list[Message]]) -> Iterator[list[Message]]:
    """What the user says, and what the assistant replies, pairs as `prepare --chat` reads them."""
    said = ["\n".join(text for one in turn if (text := " ".join(one["text"].split()))) for turn in turns]
    for question, answer in zip(said[::2], said[1::2], strict=False):
        if question and answer:
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def dialogues(turns: list[list[Message]]) -> Iterator[list[Message]]:
    """Runs of exchanges, each of so many characters as fit, one exchange at least."""
    run: list[Message] = []
    for exchange in exchanges(turns):
        if run and sum(len(message["content"]) for message in run + exchange) > CHARACTERS:
            yield run
            run = []
        run = run + exchange
    if run:
        yield run


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    sides: dict[str, list[str]] = {side: [] for side in SIDES}
    for name, conversation in sorted(conversations().items()):
        side = SIDES[sha256(name.encode()).digest()[0] % len(SIDES)]
        for messages in dialogues(conversation["messages"]):
            sides[side].append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    for side, lines in sides.items():
        (folder / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
