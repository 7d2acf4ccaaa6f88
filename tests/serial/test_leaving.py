"""How long a rank waits for MPI to let go of its messages after a death: as long as somebody has not come there."""

from types import SimpleNamespace

import pytest

from mlm_mpi.comm import recovery


class Held:
    """A mailbox whose messages end at the given time of asking."""

    def __init__(self, ends_at: int) -> None:
        self.asked, self.ends_at = 0, ends_at

    def drain(self, patience_s: float) -> bool:
        self.asked += 1
        return self.asked >= self.ends_at


def group(come_at: int, mailbox: Held, timeout_s: float = 60.0):
    """A group whose last rank has come when the mailbox has been asked so often."""
    company = SimpleNamespace(all_here=lambda text: text == recovery._LEAVING and mailbox.asked >= come_at)
    return SimpleNamespace(company=company, timeout_s=timeout_s)


@pytest.fixture
def gone(monkeypatch):
    """Instead of the end of this process."""
    said: list[str] = []

    def give_up(text: str) -> None:
        said.append(text)
        raise SystemExit

    monkeypatch.setattr(recovery, "_give_up", give_up)
    return said


def test_messages_to_a_rank_in_a_long_backward_are_waited_for(gone):
    mailbox = Held(ends_at=5)
    recovery._drain(mailbox, group(5, mailbox))
    assert mailbox.asked == 5 and not gone


def test_mpi_has_one_more_patience_when_all_have_come(gone):
    mailbox = Held(ends_at=9)
    with pytest.raises(SystemExit):
        recovery._drain(mailbox, group(3, mailbox))
    assert mailbox.asked == 4 and "MPI has not let go of its messages" in gone[0]


def test_there_is_an_end_to_it(gone):
    mailbox = Held(ends_at=9)
    with pytest.raises(SystemExit):
        recovery._drain(mailbox, group(99, mailbox, timeout_s=0.0))
    assert mailbox.asked == 1 and gone
