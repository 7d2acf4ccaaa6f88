"""Ranks that share a model: a death ends the run, any mesh goes on from it; what does not fit is refused."""

import time

from programs import EVERY_TWO, SOON_S

KILL = """
def before_step(rank, step):
    if os.environ["OMPI_COMM_WORLD_RANK"] == "2" and step == 3:
        os.kill(os.getpid(), 9)
"""


def test_a_death_ends_a_pipeline_which_goes_on_as_another_mesh(place, home, straight):
    began = time.monotonic()
    killed = place.faulty(KILL, "run", 4, "mesh.pp=2", "mesh.zero=1", "train.schedule=one_f_one_b", *EVERY_TWO)
    assert killed.code != 0 and time.monotonic() - began < SOON_S
    assert "rank 2 died by signal 9" in killed.err and "start again to go on" in killed.err
    assert "Traceback" not in killed.err
    again = place.train("run", 3, "mesh.pp=3", "train.schedule=zero_bubble", *EVERY_TWO)
    assert again.weights == straight.weights
    assert place.losses("run") == home.losses("straight")
    assert place.proven("run").steps == 6


def test_what_does_not_fit_is_one_line(place):
    """Before a rank starts where the launcher can know; of all ranks where the model has to be built."""
    place.train("run", 3, "mesh.tp=2").refused("need 2 ranks, the launcher gave 3")
    place.train("run", 4, "mesh.pp=4").refused("mesh.pp = 4", "the model has 3 (embedding, head, blocks: 1)")
    place.train("run", 2, "mesh.tp=2").refused(
        "mesh.tp = 2 does not divide the 257 heads, features or tokens of embed.tokens", "set mesh.tp = 1"
    )
    assert not (place.folder / "run").exists()
