"""A step of a run once more, operation by operation: `nanogpt-jax replay`."""
