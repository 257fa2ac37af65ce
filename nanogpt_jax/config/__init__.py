"""Settings and command lines, without jax: a typo is reported before XLA starts.

These are the names that other rooms use most; the others are called by their file's name.
"""

from nanogpt_jax.config.command_line import command_again, joined, program, quoted, word
from nanogpt_jax.config.errors import TryAgain, UserError, suggestion
from nanogpt_jax.config.parse import merge, read_json, to_json
from nanogpt_jax.config.settings import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from nanogpt_jax.config.train_command import Command, help_text, load
from nanogpt_jax.config.validate import with_vocabulary

__all__ = [
    "Command",
    "Config",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "TryAgain",
    "UserError",
    "command_again",
    "help_text",
    "joined",
    "load",
    "merge",
    "program",
    "quoted",
    "read_json",
    "suggestion",
    "to_json",
    "with_vocabulary",
    "word",
]
