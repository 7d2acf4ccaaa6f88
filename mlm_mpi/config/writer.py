"""A configuration as plain values and as TOML; what is written is complete, and reads back as the same."""

import dataclasses
from typing import Any

from mlm_mpi.config.entries import toml_value
from mlm_mpi.config.sections import Config


def to_table(config: Config) -> dict[str, Any]:
    """Nested dictionaries of plain values; `from_table` gives the same Config back."""
    return {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for section, values in dataclasses.asdict(config).items()
    }


def to_toml(config: Config) -> str:
    """The configuration as TOML text."""
    lines = []
    for section, values in to_table(config).items():
        lines += [f"[{section}]", *(f"{key} = {toml_value(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)
