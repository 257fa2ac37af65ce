"""The Python interface: a run that is opened, training, and the model as a pure function.

    run = nanogpt_jax.load("runs/default")
    print(run.generate("The ", max_new_tokens=50))
    run.attention("The list")                                     # [L, H, T, T]
    nanogpt_jax.train("shakespeare_quick", {"train.steps": 100})  # as `python train.py` does

A text may be given as token ids instead. What is wrong is a UserError, with the words of the command line.
"""

# T tokens of a text, V vocabulary, C channels, L layers, H heads

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config, MeshConfig, ModelConfig, UserError, settings
from nanogpt_jax.data.tokenizer import Tokenizer
from nanogpt_jax.distributed.mesh import make_mesh, start
from nanogpt_jax.distributed.sharding import shard
from nanogpt_jax.evaluation import loss
from nanogpt_jax.evaluation.likelihood import Model
from nanogpt_jax.inference import options
from nanogpt_jax.inference.generate import Rules
from nanogpt_jax.inference.sampler import stream_text
from nanogpt_jax.model import gpt2, watching
from nanogpt_jax.run import opened

Text = str | Sequence[int] | np.ndarray  # or token ids


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A trained run, opened by `load`."""

    config: Config  # its settings
    params: gpt2.Params  # nested dict of float32 arrays: see nanogpt_jax/model/gpt2.py
    tokenizer: Tokenizer  # .encode(text) -> ids [T] int32, .decode(ids) -> text

    def __repr__(self) -> str:
        m = self.config.model
        sizes = f"{m.n_layer} layers of {m.n_head} heads, {m.n_embd} channels, context {m.block_size}"
        return f"<Run: GPT-2 of {sizes}, trained on {self.config.data.title}>"

    def generate(self, prompt: str = "", **how: Any) -> str:
        """A continuation of `prompt`, without it.

        `how`: the flags of sample.py, with their defaults and limits: max_new_tokens, temperature, top_k, top_p, min_p,
        repetition_penalty, stop (a text, or several), seed.
        """
        return "".join(self.stream(prompt, **how))

    def stream(self, prompt: str = "", **how: Any) -> Iterator[str]:
        """The pieces of `generate`, as soon as each is certain."""
        asked = _asked(how)
        rules = Rules(asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.repetition_penalty)
        pieces = stream_text(
            self.config.model,
            self.params,
            self.tokenizer,
            [prompt],
            rules=rules,
            max_new_tokens=asked.max_new_tokens,
            seed=asked.seed,
            stop=asked.stop,
        )
        return (piece for _, piece in pieces)

    def logits(self, text: Text) -> np.ndarray:
        """[T, V] float32: after each token, log p of the next one up to a constant. At most block_size tokens."""
        return np.asarray(_compiled_forward(self.params, _plain(self.config), self._ids(text)))

    def loss(self, text: Text) -> np.ndarray:
        """[T-1] float32: -log p of each token after the first, in nats. A long text is read in windows of block_size,
        side by side, as `eval` does."""
        ids = self._ids(text, least=2, fits=False)
        mesh, T = make_mesh(MeshConfig()), self.config.model.block_size
        return loss.token_nats(loss.make_score(_plain(self.config), mesh), self.params, ids, mesh, block_size=T)

    def attention(self, text: Text) -> np.ndarray:
        """[L, H, T, T] float32: how much position t (third axis) looks at position s (last axis).

        In [0, 1], 0 for s > t; each row sums to 1.
        """
        return np.asarray(self._seen(text).weights)

    def hidden(self, text: Text) -> np.ndarray:
        """[L+1, T, C]: each token's vector, first the embeddings, then what each layer makes of it, before ln_f."""
        return np.asarray(self._seen(text).hidden, np.float32)

    def _seen(self, text: Text) -> watching.Seen:
        return watching.watch(_plain(self.config), self.params, jnp.asarray(self._ids(text)))

    def _ids(self, text: Text, least: int = 1, fits: bool = True) -> np.ndarray:
        """[T] int32. UserError if there are fewer than `least`, too many to fit the context, or unknown ones."""
        ids = self.tokenizer.encode(text) if isinstance(text, str) else np.asarray(text)
        V, T = self.config.model.vocab_size, self.config.model.block_size
        if ids.ndim != 1 or not (len(ids) == 0 or np.issubdtype(ids.dtype, np.integer)):
            raise UserError(f"tokens must be whole numbers in one row, but are {ids.dtype} of shape {ids.shape}")
        if len(ids) < least:
            raise UserError(f"the text has {len(ids)} tokens; at least {least} {'is' if least == 1 else 'are'} needed")
        if fits and len(ids) > T:
            raise UserError(f"the text has {len(ids)} tokens, more than the model's context of {T}")
        if ids.min() < 0 or ids.max() >= V:
            raise UserError(f"tokens must lie in 0 to {V - 1}, but are {ids.min()} to {ids.max()}")
        return ids.astype(np.int32)


def load(run: str | PathLike[str], checkpoint: str = "best") -> Run:
    """Open a trained run. `checkpoint`: best (by validation loss), latest or a step. Takes seconds."""
    found = opened.open_run(Path(run))
    start()
    params, _ = found.load(str(checkpoint))
    return Run(found.cfg, params, found.tokenizer)


def for_scoring(run: opened.Run, checkpoint: str = "best") -> tuple[Model, int]:
    """An opened run for `evaluation/`, on all devices that are visible, and the checkpoint's step."""
    params, step = run.load(checkpoint)
    mesh = make_mesh(MeshConfig(data=-1))
    return Model(_plain(run.cfg), jax.device_put(params, shard(mesh)), run.tokenizer, mesh), step


def train(
    cfg: str | PathLike[str] | Config | None = None,
    more: Mapping[str, Any] | None = None,
    *,
    run_dir: str | PathLike[str] | None = None,
    resume: str = "auto",
    overwrite: bool = False,
) -> Run:
    """Train as `python train.py` does, and open the run. The same call again resumes it.

    `cfg`: a TOML file, the name of a shipped one, or a Config; None: the defaults. `more`: settings by their names:
    {"train.steps": 100}. Ctrl-C (in a notebook: interrupt) saves a checkpoint and returns.
    """
    more = dict(more or {})
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0") < "2":  # JAX was imported before us, and XLA would warn endlessly
        more.setdefault("train.recompile", "off")
    argv = _command(cfg, more, {"run-dir": run_dir, "resume": resume}) + ["--overwrite"] * overwrite
    command = config.load(argv)
    cli.door("train").main(argv)
    return load(command.run_dir)


def forward(params: gpt2.Params, config: Config | ModelConfig, tokens: jax.typing.ArrayLike) -> jax.Array:
    """tokens [..., T] int32, T <= block_size -> logits [..., T, V] float32, without dropout.

    Pure: `jax.jit`, `jax.grad` and `jax.vmap` take it over `params` and `tokens`.
    """
    cfg, tokens = _plain(config), jnp.asarray(tokens)
    logits = gpt2.forward(cfg, params, tokens.reshape(-1, tokens.shape[-1]))
    return logits[..., : cfg.vocab_size].reshape(*tokens.shape, cfg.vocab_size)


_compiled_forward = jax.jit(forward, static_argnums=1)


def _plain(cfg: Config | ModelConfig) -> ModelConfig:
    """The model's settings for this machine, without those of training."""
    return loss.for_scoring(cfg.model if isinstance(cfg, Config) else cfg, jax.default_backend())


def _asked(how: Mapping[str, Any]) -> options.Options:
    """The flags of sample.py. UserError if one is unknown or its value invalid."""
    words = []
    if alone := {"num_samples", "prompt", "prompt_file", "checkpoint"} & how.keys():
        raise UserError(f"{alone.pop()} is a flag of sample.py that has no meaning here")
    for name, value in how.items():
        several = value if isinstance(value, tuple | list) else [value]
        words += [f"--{name.replace('_', '-')}={each}" for each in several]
    return options.read(words)


def _command(cfg: Any, more: Mapping[str, Any], flags: Mapping[str, Any]) -> list[str]:
    """The command line of train.py that says the same."""
    words = [] if cfg is None else [str(cfg)]
    if isinstance(cfg, Config):
        default = dict(settings.items(Config()))
        words, more = [], {key: v for key, v in settings.items(cfg) if v != default[key]} | dict(more)
    words += [f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in more.items()]
    return [*words, *(f"--{name}={value}" for name, value in flags.items() if value is not None)]
