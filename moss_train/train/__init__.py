"""Training: one step, the loop, optimizer and schedule, checkpoints, metrics."""
