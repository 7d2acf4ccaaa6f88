"""What all tests share: property tests draw the same examples each time, without a deadline on a noisy machine; the
kernels of this CPU serve, as in every command, until a test chooses others.
"""

import sys
from pathlib import Path

from hypothesis import settings

from mlm_mpi.backend import choice

sys.path.insert(0, str(Path(__file__).parent))  # terminal.py, tiny.py, whole.py

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")
choice.select()
