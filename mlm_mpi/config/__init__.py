"""The configuration: every key is declared beside the code that reads it, and read, checked and explained here.

keys.py       how a section is declared     entries.py      what a key's declaration says of a value
sections.py   where sections are declared   rules.py        rules that span sections
reader.py     TOML and --set -> Config      environment.py  what BLAS and NumPy read when they load
writer.py     Config -> TOML                reference.py    the manual of all keys

A run is `load(path, overrides)` -> `Config`, which is frozen and complete: no default is decided later,
except those that need the catalog (the vocabulary).
"""

from mlm_mpi.config.environment import prepare_environment
from mlm_mpi.config.reader import from_table, load
from mlm_mpi.config.rules import check_ranks, is_plain, parted
from mlm_mpi.config.sections import Config
from mlm_mpi.config.writer import to_table, to_toml

__all__ = [
    "Config", "check_ranks", "from_table", "is_plain", "load", "parted", "prepare_environment", "to_table", "to_toml",
]  # fmt: skip
