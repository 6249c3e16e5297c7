"""What the training loop can train."""
