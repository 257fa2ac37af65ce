"""Compares our logits with those of `transformers` from the same files, if torch and transformers are installed."""

# T time, V vocabulary

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nanogpt_jax.config import ModelConfig
from nanogpt_jax.interop.transformers_files import short_name
from nanogpt_jax.model import gpt2

TOKENS_COMPARED = 256


def _tokens(n_vocab: int, block_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(n_vocab, size=(1, min(block_size, TOKENS_COMPARED)))


def own_logits(cfg: ModelConfig, params: gpt2.Params, no_compare: bool) -> np.ndarray | str:
    """Our logits [1, T, V] for random tokens; or, as text, why there is no comparison."""
    if no_compare:
        return "not compared (--no-compare)"
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not compared with transformers: {missing[0]} is not installed (pip install 'nanogpt-jax[compare]')"
    cfg = dataclasses.replace(cfg, attention="reference", dtype="float32", scan_unroll=1, remat="none")
    forward = jax.jit(gpt2.forward, static_argnums=0)
    with jax.default_matmul_precision("highest"):  # a GPU's default is 1e-3 off
        logits = forward(cfg, params, _tokens(cfg.vocab_size, cfg.block_size))
    return np.asarray(logits)[..., : cfg.vocab_size]


def compared(ours: np.ndarray | str, about: dict[str, Any], files: list[Path]) -> str:
    """One line comparing `ours` with the logits that transformers computes from the same `files`."""
    if isinstance(ours, str):
        return ours
    import torch  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel  # pyright: ignore[reportMissingImports]

    theirs_about = GPT2Config.from_dict({**about, "attn_implementation": "eager"})
    with torch.device("meta"):
        model = GPT2LMHeadModel(theirs_about).train(False)
    state = {}
    for path in files:
        for name, tensor in load_file(path).items():
            name = short_name(name)
            state[name if name.startswith("lm_head.") else f"transformer.{name}"] = tensor.float()
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    left = model.load_state_dict(state, strict=False, assign=True)
    assert not left.missing_keys, f"transformers misses {left.missing_keys}"
    with torch.no_grad():
        theirs = model(torch.from_numpy(_tokens(theirs_about.vocab_size, theirs_about.n_positions))).logits.numpy()
    difference, size = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    return (
        f"max |Δlogit| against transformers: {difference:.2e} on {ours.shape[1]} random tokens "
        f"(largest logit {size:.1f})"
    )
