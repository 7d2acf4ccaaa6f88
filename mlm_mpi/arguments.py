"""Command lines: help that ends in examples, and a mistake that is one line."""

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from mlm_mpi.errors import ConfigError, nearest

# argparse's words -> ours
_WORDS = (("invalid int value:", "not a whole number:"), ("invalid float value:", "not a number:"))


class Parser(argparse.ArgumentParser):
    """The arguments of one sub-command. `epilog` is printed as it is written."""

    def __init__(self, command: str, description: str = "") -> None:
        super().__init__(
            prog=f"mlm-mpi {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.command = command

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """What the words say. Raises ConfigError where they say nothing that this command knows."""
        found, unknown = self.parse_known_args(words)
        if unknown:
            self.error(f"unknown arguments: {' '.join(unknown)}{self._meant(unknown[0])}")
        return found

    def error(self, message: str) -> NoReturn:
        """argparse's, as the one line that every command line error is; printed once by all ranks of a job."""
        for word, ours in _WORDS:
            message = message.replace(word, ours)
        raise ConfigError(f"{self.command}: {message}: see mlm-mpi {self.command} --help")

    def _meant(self, word: str) -> str:
        options = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        if "--set" in options and re.match(r"\w+\.\w+=", word):
            return "; write --set before each SECTION.KEY=VALUE"
        return nearest(word.partition("=")[0], options, every=False) if word.startswith("--") else ""
