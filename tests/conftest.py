"""What all tests share: property tests draw the same examples each time, without a deadline on a noisy machine."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # tiny.py, whole.py

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")
