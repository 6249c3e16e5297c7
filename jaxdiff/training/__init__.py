"""Training: one loop, one step, and a file for each thing that can be trained."""
