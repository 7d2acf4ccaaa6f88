"""Trains language models on whatever `mpiexec` runs on; bit-stable over any number of ranks."""

__version__ = "0.1.0"
