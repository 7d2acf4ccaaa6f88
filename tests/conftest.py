"""What all tests share: property tests draw the same examples each time, without a deadline on a noisy machine."""

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")
