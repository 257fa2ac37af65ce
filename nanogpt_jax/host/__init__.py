"""The machine, for any room: files, the terminal, signals, memory, JAX's environment, and words for messages.

Nothing here imports jax.
"""
