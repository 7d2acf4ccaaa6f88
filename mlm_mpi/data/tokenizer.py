"""Text to token ids and back: byte-level BPE, plain bytes, whole words, or any Hugging Face tokenizer.json.

One format for all of them: the JSON of the `tokenizers` library. A tokenizer *is* the bytes of its file,
so its hash survives an upgrade of that library.
"""

import builtins
import codecs
import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mlm_mpi.errors import ConfigError, DataError
from mlm_mpi.files import publish, read_whole

T = TypeVar("T")

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
FEWEST_WORDS = 3  # the end of text, the unknown word, a word
LARGEST_VOCABULARY = 1 << 24  # 64 times the largest known; ids may have gaps, rows of the embedding have none
_MOST_GROWTH = 1000.0  # published ones: Llama's puts three bytes for a space
_METASPACE = "\u2581"  # what SentencePiece writes for a space
_FILE_BYTES = 256 << 20  # Gemma's has 33 MiB
# What other makers call it, tried in this order.
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")


MADE = ("bytes", "bpe", "words")  # tokenizers that need no file


class Tokenizer:
    """An immutable mapping between text and ids 0 … vocab_size − 1; `eot` ends a document."""

    def __init__(self, content: builtins.bytes, source: str = "the tokenizer") -> None:
        """Raises DataError if `content` is no tokenizer or has no token that ends a text."""
        self.content = content
        self.hash = hashlib.sha256(content).hexdigest()
        try:
            self._inner = _call(tokenizers.Tokenizer.from_str, content.decode("utf-8"))
            ids = _call(self._inner.get_vocab)
            written = json.loads(_call(self._inner.to_str))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source} is not a tokenizer.json ({error}): give another --tokenizer") from None
        if written["model"].get("dropout"):
            raise DataError(f"{source} encodes a text in another way each time (dropout): give another --tokenizer")
        if (growth := _growth([written[key] for key in ("normalizer", "pre_tokenizer", "decoder")])) > _MOST_GROWTH:
            raise DataError(f"{source} may make a text {growth:.0e} times as long: give another --tokenizer")
        self._inner.encode_special_tokens = True  # a text that *mentions* <|endoftext|> does not end there
        self._inner.no_padding()
        self._inner.no_truncation()
        end = next((name for name in _ENDS if name in ids), None)
        if end is None:
            raise DataError(
                f"{source} has no token that ends a text, none of {', '.join(_ENDS)}: give another --tokenizer"
            )
        self.eot: int = ids[end]
        self.vocab_size: int = max(ids.values()) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            raise DataError(
                f"{source} has a token with id {self.vocab_size - 1}, the largest may be {LARGEST_VOCABULARY - 1}: "
                "give another --tokenizer"
            )
        self.unknown: int | None = ids.get(written["model"].get("unk_token"))  # what has no token of its own
        self._names = {number: name for name, number in ids.items()}
        self.is_byte_level: bool = (written["decoder"] or {}).get("type") == "ByteLevel"
        self._special = {token["id"] for token in written["added_tokens"] if token["special"]}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE of at most `vocab_size` tokens; equal texts give equal bytes.

        Source: Sennrich et al., arXiv:1508.07909; byte level as in GPT-2. Raises ConfigError below 257.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"--vocab {vocab_size} is below {SMALLEST_VOCABULARY}, the 256 bytes and {END_OF_TEXT}: "
                f"set --vocab {SMALLEST_VOCABULARY} or more"
            )
        inner = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner.to_str(pretty=True).encode())

    @classmethod
    def train_words(cls, texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> "Tokenizer":
        """The most frequent words, runs of letters and digits or of other signs; the rest is one unknown word.

        At most `vocab_size` tokens, none of a word that comes up once; equal texts give equal bytes. What stands
        between words is lost. `lowercase`: capitals are no other letters. Raises ConfigError below 3.
        """
        if vocab_size < FEWEST_WORDS:
            raise ConfigError(
                f"--vocab {vocab_size} is below {FEWEST_WORDS}, {END_OF_TEXT}, {UNKNOWN} and a word: "
                f"set --vocab {FEWEST_WORDS} or more"
            )
        inner = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        if lowercase:
            inner.normalizer = normalizers.Lowercase()
        trainer = trainers.WordLevelTrainer(
            vocab_size=vocab_size, min_frequency=2, special_tokens=[END_OF_TEXT, UNKNOWN], show_progress=False
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner.to_str(pretty=True).encode())

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """Token b is byte b; token 256 ends a text."""
        vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
        inner = _byte_level(models.BPE(vocabulary, []))
        inner.add_special_tokens([END_OF_TEXT])
        return cls(inner.to_str(pretty=True).encode())

    @classmethod
    def load(cls, path: str | Path, folder: Path | None = None) -> "Tokenizer":
        """Reads a tokenizer.json, ours or Hugging Face's. `folder`: it must lie inside. Raises DataError."""
        try:
            content = read_whole(Path(path), _FILE_BYTES, folder)
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from None
        return cls(content, str(path))

    def save(self, path: str | Path) -> None:
        """Publishes the same bytes it was made of. Raises DataError."""
        publish(Path(path), self.content)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end. Raises DataError where the tokenizer has none for it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts, on several cores where TOKENIZERS_PARALLELISM allows."""
        try:
            return [e.ids for e in _call(self._inner.encode_batch, list(texts), add_special_tokens=False)]
        except ValueError as error:
            raise DataError(f"the tokenizer cannot encode this text ({error}): give another --tokenizer") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that form no UTF-8 become U+FFFD, ends of text are left out."""
        try:
            return str(_call(self._inner.decode, list(ids), skip_special_tokens=True))
        except ValueError as error:
            raise DataError(f"the tokenizer cannot decode these ids ({error}): give another --tokenizer") from None

    def token_bytes(self, number: int) -> builtins.bytes:
        """The bytes a token stands for, b"" for special and unknown ids; of byte-level tokenizers only."""
        name = "" if number in self._special else self._names.get(number, "")
        return b"".join(_BYTE_OF.get(symbol, symbol.encode()) for symbol in name)

    def parents(self) -> np.ndarray:
        """The two tokens that each token of BPE was merged from, -1 where there are none. Shapes: -> (V, 2) int32."""
        found = np.full((self.vocab_size, 2), -1, np.int32)
        ids = {name: number for number, name in self._names.items()}
        model = json.loads(_call(self._inner.to_str))["model"]
        for merge in model.get("merges") or ():
            first, second = merge.split(" ") if isinstance(merge, str) else merge
            found[ids[first + second]] = ids[first], ids[second]
        return found

    def token_text(self, number: int) -> str:
        """What a token stands for inside a text, "" for special and unknown ids; parts of a character are U+FFFD."""
        if self.is_byte_level:
            return self.token_bytes(number).decode(errors="replace")
        name = "" if number in self._special else self._names.get(number, "")
        return name.replace("\u2581", " ").removeprefix("##")  # a space of SentencePiece; WordPiece's inner tokens

    def word(self, number: int) -> str:
        """The bare word that a token stands for, as files of word vectors have it: without a space before it.

        "" for special and unknown ids, parts of characters, and what has a space elsewhere.
        """
        if number in self._special:
            return ""
        if self.is_byte_level:
            text = self.token_bytes(number).decode(errors="ignore")
            text = text if text.encode() == self.token_bytes(number) else ""
        else:
            text = self._names.get(number, "").replace(_METASPACE, " ")
        text = text.removeprefix(" ")
        return "" if any(symbol.isspace() for symbol in text) else text


def made(choice: str, texts: Iterable[str], vocabulary: int, lowercase: bool) -> Tokenizer:
    """The tokenizer that a choice names: one of MADE, of these texts, or a file. Raises DataError, ConfigError."""
    if choice == "bytes":
        return Tokenizer.bytes()
    if choice not in MADE:
        return Tokenizer.load(choice)
    return (
        Tokenizer.train_words(texts, vocabulary, lowercase) if choice == "words" else Tokenizer.train(texts, vocabulary)
    )


def _growth(steps: Any) -> float:
    """How much longer the Replace and Prepend steps in a tokenizer's JSON can make a text, at most."""
    if isinstance(steps, list):
        return math.prod(map(_growth, steps))
    if not isinstance(steps, dict):
        return 1.0
    own = {"Replace": "content", "Prepend": "prepend", "Metaspace": "replacement"}.get(str(steps.get("type")), "")
    return max(1.0, float(len(steps.get(own) or ""))) * _growth(list(steps.values()))


class StreamDecoder:
    """Ids in, text out, one at a time: holds back what is not yet whole UTF-8.

    The pieces joined are `Tokenizer.decode` of all ids, whatever a half-trained model produces.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # all so far, where tokens are not bytes
        self._shown = 0

    def push(self, number: int) -> str:
        """The text that becomes complete with this id; often one word, sometimes ""."""
        if self._tokenizer.is_byte_level:
            return self._bytes.decode(self._tokenizer.token_bytes(number))
        self._ids.append(number)
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._show(text)

    def flush(self) -> str:
        """What is left at the end, with U+FFFD for an unfinished character."""
        if self._tokenizer.is_byte_level:
            return self._bytes.decode(b"", final=True)
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        new, self._shown = text[self._shown :], len(text)
        return new


def _call(function: Callable[..., T], *args: Any, **named: Any) -> T:
    """Calls the library, whose panics are no Exceptions. Raises ValueError, in one line."""
    with _panics_unprinted():
        try:
            return function(*args, **named)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise ValueError((str(error).splitlines() or [type(error).__name__])[0][:200]) from None


@contextlib.contextmanager
def _panics_unprinted() -> Iterator[None]:
    """The library writes a backtrace to descriptor 2 before it raises; nothing else may write meanwhile."""
    try:
        kept = os.dup(2)
    except OSError:  # this process has no stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _byte_symbols() -> Iterator[str]:
    """The printable character that byte-level BPE writes for byte 0, 1, … 255, as GPT-2 chose them."""
    spare = 256
    for byte in range(256):
        if re.match(r"[!-~¡-¬®-ÿ]", chr(byte)):
            yield chr(byte)
        else:
            yield chr(spare)
            spare += 1


_BYTE_OF = {symbol: bytes([byte]) for byte, symbol in enumerate(_byte_symbols())}
