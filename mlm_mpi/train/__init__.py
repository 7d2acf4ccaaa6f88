"""Training: who runs which micro-batch, one step, checkpoints, the loop."""
