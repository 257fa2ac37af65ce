"""Train, stop, resume and sample a GPT-2 in JAX."""

__version__ = "0.1.0"
