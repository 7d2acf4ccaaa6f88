"""Fixtures of the tests that run inside mpiexec."""

import pytest

from mlm_mpi.comm import launch
from mlm_mpi.comm.group import Group


@pytest.fixture(scope="session")
def world() -> Group:
    """All ranks; a wait that lasts 60 s is a failure, not a hang."""
    return launch.start().with_timeout(60.0)


@pytest.fixture()
def group(world: Group) -> Group:
    """All ranks on a communicator of this test's own."""
    return world.duplicate()
