"""From a batch to a checkpoint: optimizer, step, loop, checkpoints, metrics."""
