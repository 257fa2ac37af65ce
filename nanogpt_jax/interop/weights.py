"""Converts weights between Hugging Face's names and ours.

Their Conv1D kernels are [in, out] like ours, and the out axis of c_attn is queries, keys, values, each head by head. So
a tensor only needs a reshape; our layers are stacked, and our vocabulary is padded with zeros.
"""

# C channels, T positions, V vocabulary, L layers

import functools
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nanogpt_jax.config import ModelConfig
from nanogpt_jax.model import gpt2

Read = Callable[[str], np.ndarray]


def table(cfg: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our path -> their name, with {} for the layer, and their shape, for all tensors of a GPT-2, biases included."""
    C = cfg.n_embd
    return {
        "wte": ("wte.weight", (cfg.vocab_size, C)),
        "wpe": ("wpe.weight", (cfg.block_size, C)),
        "h/ln_1/scale": ("h.{}.ln_1.weight", (C,)),
        "h/ln_1/bias": ("h.{}.ln_1.bias", (C,)),
        "h/attn/c_attn/kernel": ("h.{}.attn.c_attn.weight", (C, 3 * C)),
        "h/attn/c_attn/bias": ("h.{}.attn.c_attn.bias", (3 * C,)),
        "h/attn/c_proj/kernel": ("h.{}.attn.c_proj.weight", (C, C)),
        "h/attn/c_proj/bias": ("h.{}.attn.c_proj.bias", (C,)),
        "h/ln_2/scale": ("h.{}.ln_2.weight", (C,)),
        "h/ln_2/bias": ("h.{}.ln_2.bias", (C,)),
        "h/mlp/c_fc/kernel": ("h.{}.mlp.c_fc.weight", (C, 4 * C)),
        "h/mlp/c_fc/bias": ("h.{}.mlp.c_fc.bias", (4 * C,)),
        "h/mlp/c_proj/kernel": ("h.{}.mlp.c_proj.weight", (4 * C, C)),
        "h/mlp/c_proj/bias": ("h.{}.mlp.c_proj.bias", (C,)),
        "ln_f/scale": ("ln_f.weight", (C,)),
        "ln_f/bias": ("ln_f.bias", (C,)),
    }


def their_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Each tensor of a GPT2Model of this size: {"h.0.attn.c_attn.weight": (C, 3C)}."""
    return dict(expected_tensors(cfg))


def expected_tensors(cfg: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The items of `their_shapes`, without building a dict."""
    for path, (name, shape) in table(cfg).items():
        for layer in range(cfg.n_layer if path.startswith("h/") else 1):
            yield name.format(layer), shape


def n_tensors(cfg: ModelConfig) -> int:
    return sum(cfg.n_layer if path.startswith("h/") else 1 for path in table(cfg))


def is_tensor(cfg: ModelConfig, name: str) -> bool:
    """Whether `name` is an expected tensor. Does not list them all, as a false config.json may claim very many."""
    layer = re.match(r"h\.(0|[1-9][0-9]{0,9})\.", name)
    if layer and int(layer[1]) < cfg.n_layer:
        name = "h.{}." + name[layer.end() :]
    return name in {theirs for theirs, _ in table(cfg).values()} and bool(layer) == name.startswith("h.")


def from_hugging_face(cfg: ModelConfig, read: Read) -> gpt2.Params:
    """Our parameters, float32 numpy arrays, from `read("h.0.ln_1.weight")`, called once for each tensor.

    16-bit numbers are widened exactly. A tensor is copied straight into its place, without a second copy of the model.
    """
    shapes = gpt2.param_shapes(cfg)
    params: gpt2.Params = {}
    for path, (name, _) in table(cfg).items():
        *folders, leaf = path.split("/")
        if not cfg.bias and leaf == "bias":
            continue
        ours = np.zeros(_at(shapes, path).shape, np.float32)
        if path.startswith("h/"):
            for layer in range(cfg.n_layer):
                ours[layer] = read(name.format(layer)).reshape(ours.shape[1:])
        else:
            theirs = read(name)
            ours[: len(theirs)] = theirs
        place = params
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = ours
    return params


def to_hugging_face(cfg: ModelConfig, params: gpt2.Params) -> dict[str, np.ndarray]:
    """Their tensors from our parameters, as views if possible; zeros for the biases of a model without."""
    found = {}
    for path, (name, shape) in table(cfg).items():
        absent = path.endswith("bias") and not cfg.bias
        ours = None if absent else np.asarray(_at(params, path))
        for layer in range(cfg.n_layer if path.startswith("h/") else 1):
            if ours is None:
                theirs = np.zeros(shape, np.float32)
            elif path.startswith("h/"):
                theirs = ours[layer].reshape(shape)
            else:
                theirs = ours[: shape[0]]  # without the padding of the vocabulary
            found[name.format(layer)] = theirs
    return found


def not_finite(tensors: dict[str, np.ndarray]) -> list[str]:
    """The names of the tensors with numbers that are not finite."""
    return [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]


def _at(tree: gpt2.Params, path: str) -> Any:
    return functools.reduce(operator.getitem, path.split("/"), tree)
