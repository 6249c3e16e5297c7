"""The training loop, the training step, and one module per task."""
