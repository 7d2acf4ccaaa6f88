"""What the shape of the house promises beyond its imports (setup.cfg)."""

from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mlm_mpi"


def test_the_training_loop_reads_as_a_story():
    assert len((PACKAGE / "train" / "trainer.py").read_text().splitlines()) <= 120


def test_nobody_keeps_gradients_in_parameters():
    """They come with the context, so that two micro-batches may be in flight."""
    held = [path for path in PACKAGE.rglob("*.py") if "parameter.grad" in path.read_text()]
    assert not held
