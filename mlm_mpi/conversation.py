"""Talking with a model: what was said so far, as much of it as the context holds, and the answer, piece by piece."""

from collections.abc import Callable, Iterator
from itertools import islice

from mlm_mpi.data.template import ANSWERS, Message, Template
from mlm_mpi.data.text import clean
from mlm_mpi.data.tokenizer import StreamDecoder, Tokenizer
from mlm_mpi.errors import ConfigError, DataError

Continued = Callable[[list[int], int], Iterator[int]]  # a prompt and the number of the answer -> endless tokens
_SYSTEM, _USER = "system", "user"


class Conversation:
    """What was said. The oldest questions leave first, each with its answer; what `system` says stays.

    `said`: all messages, also those that have left. `left`: how many the model no longer reads.
    """

    def __init__(
        self, continued: Continued, tokenizer: Tokenizer, context: int, most: int, system: str = ""
    ) -> None:  # fmt: skip
        """`most`: tokens of an answer; room for so many, or for half a context, is kept free.

        Raises ConfigError for a `system` that leaves no room, DataError for a tokenizer without the template.
        """
        self._continued, self._tokenizer, self._context, self._most = continued, tokenizer, context, most
        self._template, self._room = Template(tokenizer), context - min(most, context // 2)
        self._system = [Message(_SYSTEM, told)] if (told := clean(system).text.strip()) else []
        if (needed := self._needed(self._system)) >= self._room:
            raise ConfigError(
                f"--system needs {needed} tokens, and {self._room - 1} of a context of {context} are the most: shorten "
                "it, or lower --tokens"
            )
        self.reset()

    @property
    def has_answers(self) -> bool:
        """Whether something was answered."""
        return len(self.said) > len(self._system)

    def reset(self) -> None:
        """Forgets all but what `system` says."""
        self.said, self.left = list(self._system), 0

    def answer(self, text: str) -> Iterator[str]:
        """Asks, and gives the answer in pieces. Who takes no more of them has stopped it, and what came is kept.

        Nothing is kept where the answer is nothing. Raises DataError for a text that is empty or leaves no room.
        """
        question = Message(_USER, clean(text).text.strip())
        prompt = self._prompt(question)
        return self._answered(question, prompt)

    def _answered(self, question: Message, prompt: list[int]) -> Iterator[str]:
        decoder, pieces = StreamDecoder(self._tokenizer), []
        most = min(self._most, self._context - len(prompt))
        try:
            for token in islice(self._continued(prompt, len(self.said)), most):
                if token == self._tokenizer.eot:
                    break
                pieces.append(decoder.push(token))
                yield clean(pieces[-1]).text  # no control character reaches a terminal
            pieces.append(decoder.flush())
            yield clean(pieces[-1]).text
        finally:
            if found := clean("".join(pieces)).text.strip():
                self.said += [question, Message(ANSWERS, found)]

    def _prompt(self, question: Message) -> list[int]:
        """The tokens of what is still read and of the question; `left` grows where they would not fit."""
        if not question.content:
            raise DataError("the message is empty: write something")
        read = self.said[len(self._system) + self.left :]
        while read and self._needed([*self._system, *read, question]) > self._room:
            read = read[2:]
        needed = self._needed([*self._system, question])
        if needed > self._room:
            own = needed - self._needed(self._system)
            raise DataError(
                f"the message has {own} tokens, and there is room for {own - needed + self._room} in a context of "
                f"{self._context}: shorten it"
            )
        self.left = len(self.said) - len(self._system) - len(read)
        return self._tokens([*self._system, *read, question])

    def _tokens(self, messages: list[Message]) -> list[int]:
        return [token for part in self._template.prompt(messages) for token in part]

    def _needed(self, messages: list[Message]) -> int:
        return len(self._tokens(messages))
