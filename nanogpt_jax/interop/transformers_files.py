"""A GPT-2 in the files of Hugging Face's transformers: config.json and safetensors, checked before a weight is read.

Only safetensors: a pickled file (pytorch_model.bin) runs whatever code its author put into it.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # importing it adds bfloat16 to numpy, and so to safetensors
import numpy as np
from safetensors import SafetensorError, safe_open

from nanogpt_jax.config import ModelConfig, UserError, quoted
from nanogpt_jax.host.messages import cut, first_line
from nanogpt_jax.interop.json_file import is_file, read_object, shown
from nanogpt_jax.interop.weights import expected_tensors, is_tensor, n_tensors, their_shapes
from nanogpt_jax.model.kernels.norm_gelu import EPSILON

WIDE = (np.float32, np.float16, ml_dtypes.bfloat16)
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")

# Settings of theirs for which we support only these values. The first is transformers' default.
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (EPSILON,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
# Other names for four of the sizes, which transformers accepts too.
ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
LARGEST = 1 << 31  # limit for a size in config.json

# Parts that torch.compile, DDP, FSDP and activation checkpointing add to the names of tensors.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def short_name(name: str) -> str:
    """GPT2Model's name of a tensor: without GPT2LMHeadModel's "transformer." and the marks of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix("transformer.")


class Weights:
    """The tensors of some safetensors files, by GPT2Model's names."""

    def __init__(self, files: list[Path]):
        self._places: dict[str, tuple[Any, str]] = {}
        self.file_of: dict[str, Path] = {}
        for path in files:
            if not is_file(path):
                raise UserError(f"{path} is missing\n       its index names it; download the model again")
            try:
                opened = safe_open(path, "numpy")  # pyright: ignore[reportArgumentType]
                names = list(opened.keys())
            except (SafetensorError, OSError, ValueError) as e:
                raise UserError(
                    f"{path} is cut short or not a safetensors file ({first_line(e)})\n"
                    "       download it again; if it is a pointer of Git LFS: git lfs pull"
                ) from None
            for name in names:
                short = short_name(name)
                if short in self._places:
                    raise UserError(
                        f"{path}: {cut(name)} and {cut(self._places[short][1])} in {self.file_of[short]} are both "
                        f"{cut(short)}\n       one of the two must go"
                    )
                self._places[short] = opened, name
                self.file_of[short] = path

    @property
    def wrappers(self) -> list[str]:
        """The marks of wrappers that were removed from the names."""
        found = {part for _, name in self._places.values() for part in name.split(".")}
        return [wrapper for wrapper in WRAPPERS if wrapper in found]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        opened, theirs = self._places[name]
        return tuple(opened.get_slice(theirs).get_shape())

    def read(self, name: str) -> np.ndarray:
        opened, theirs = self._places[name]
        try:
            array = opened.get_tensor(theirs)
        except (SafetensorError, TypeError, OSError) as e:
            raise UserError(f"{self.file_of[name]}: cannot read {name} ({first_line(e)})") from None
        if array.dtype not in WIDE:
            raise UserError(
                f"{self.file_of[name]}: {name} is {array.dtype}; only float32, float16 and bfloat16 are supported\n"
                "       save the model in one of them first"
            )
        if bad := array.size - np.count_nonzero(np.isfinite(array)):
            raise UserError(
                f"{self.file_of[name]}: {name} has {bad:,} of {array.size:,} numbers that are not finite\n"
                "       its training diverged, or the file is damaged: take an earlier one, or download it again"
            )
        return array


@dataclass(frozen=True)
class Model:
    """A model on disk, checked."""

    cfg: ModelConfig
    config: dict[str, Any]  # as transformers reads it
    weights: Weights
    files: list[Path]
    folder: Path  # for its tokenizer
    note: str  # what was guessed, or ""


def open_model(path: Path) -> Model:
    """The GPT-2 in a directory, or in one safetensors file; UserError if there is none, or none that we can compute."""
    is_folder = os.path.isdir(path)
    folder = path if is_folder else path.parent
    files = _files_in(path) if is_folder else [_checked_file(path)]
    if is_folder and is_file(folder / "adapter_config.json"):
        raise _adapter(folder)
    weights = Weights(files)
    if any(re.search(r"\blora_", name) for name in weights.names):
        raise _adapter(folder)
    about, notes = folder / "config.json", []
    if is_file(about):
        config = read_object(about)
    elif is_folder:
        raise UserError(f"{path} has no config.json; to infer the sizes from the weights, name the file {files[0]}")
    else:
        config, about = _inferred(weights, path), path
        notes.append(
            f"{path} has no config.json beside it: the sizes are inferred from its tensors, and "
            f"n_head={config['n_head']} is n_embd={config['n_embd']} / 64, as in all of GPT-2's"
        )
    if weights.wrappers:
        notes.append(f"removed from the names of the tensors: {', '.join(weights.wrappers)} (marks of wrappers)")
    cfg = model_config(config, about)
    _check_tensors(cfg, config, weights, about)
    return Model(cfg, config, weights, files, folder, "\n      ".join(notes))


def _checked_file(path: Path) -> Path:
    if path.suffix.lower() in PICKLED:
        raise _pickled(path)
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file; give one, or a directory with one and its config.json")
    if path.name.startswith("adapter_model"):
        raise _adapter(path.parent)
    is_file(path)
    return path


def _python(code: str) -> str:
    return f"       python -c {quoted(code)}"


def _beside(folder: Path, ending: str) -> tuple[str, str]:
    """The folder, and a new one beside it, as Python literals."""
    full = Path(os.path.abspath(folder))
    return repr(str(full)), repr(str(full.with_name(f"{full.name}-{ending}")))


def _pickled(path: Path) -> UserError:
    folder, new = _beside(path.parent, "safetensors")
    return UserError(
        f"{path} is a pickled file, and reading one runs whatever code is in it: only safetensors is accepted\n"
        "       most models have a model.safetensors beside it; else convert it where you trust it:\n"
        + _python(f"from transformers import GPT2LMHeadModel as M; M.from_pretrained({folder}).save_pretrained({new})")
    )


def _adapter(folder: Path) -> UserError:
    about, of = folder / "adapter_config.json", ""
    if is_file(about) and (base := read_object(about).get("base_model_name_or_path")):
        of = f" of {shown(base)}"
    old, new = _beside(folder, "merged")
    load = f"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({old})"
    return UserError(
        f"{folder} holds an adapter{of} (LoRA or the like): changes to a model, and not a model\n"
        f"       merge it into its model with peft, and import {new}:\n"
        + _python(f"{load}.merge_and_unload().save_pretrained({new})")
        + "\n       if it is merged already, remove its adapter_config.json"
    )


def _files_in(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if is_file(single):
        return [single]
    if is_file(index):
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(_is_name(name) for name in places.values()):
            raise UserError(f"{index} is damaged: it has no weight_map with names of .safetensors files beside it")
        return [folder / name for name in sorted(set(places.values()))]
    if any(folder.glob("adapter_*")):
        raise _adapter(folder)
    for pattern in ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth"):
        for path in sorted(folder.glob(pattern)):
            raise _pickled(path)
    others = sorted(folder.glob("*.safetensors"))
    hint = f"\n       to take one file: {others[0]}" if others else ""
    raise UserError(
        f"{folder} has no model.safetensors and no model.safetensors.index.json; pickled weights are not accepted{hint}"
    )


def _is_name(name: Any) -> bool:
    """Whether `name` is that of a safetensors file in the same folder."""
    return isinstance(name, str) and re.fullmatch(r"[^/\\\0\ud800-\udfff]{1,200}\.safetensors", name) is not None


def _inferred(weights: Weights, path: Path) -> dict[str, Any]:
    """The config.json for weights without one, inferred from their shapes."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in weights or len(weights.shape(name)) != 2:
            raise UserError(f"{path} is not a GPT-2: it has no matrix {name} (nor transformer.{name})")
    (V, C), (T, _) = weights.shape("wte.weight"), weights.shape("wpe.weight")
    if C % 64:
        raise UserError(
            f"{path} has no config.json beside it, and n_embd={C} is not a multiple of 64\n"
            "       put the model's config.json there: n_head cannot be inferred from the weights"
        )
    n_layer = len({name.split(".")[1] for name in weights.names if name.startswith("h.")})
    sizes = {"vocab_size": V, "n_positions": T, "n_embd": C, "n_layer": n_layer, "n_head": C // 64}
    return {"model_type": "gpt2", **sizes}


def model_config(config: dict[str, Any], where: Path) -> ModelConfig:
    """Our settings from theirs. UserError names a setting of theirs that we do not support."""
    kind = config.get("model_type")
    if kind != "gpt2":
        raise UserError(f"{where}: model_type={shown(kind)}; only GPT-2 can be imported")
    if config.get("auto_map"):
        raise UserError(f"{where}: auto_map={shown(config['auto_map'])}; a model with its own code is not a GPT-2")
    if config.get("quantization_config") is not None:
        raise UserError(f"{where}: the weights are quantized; import the model that they were made from")
    sizes = {}
    defaults = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    for name, default in defaults.items():
        alias = ALIASES.get(name, name)
        sizes[name] = config.get(name, config.get(alias, default))
        if type(sizes[name]) is not int or not 1 <= sizes[name] < LARGEST:
            raise UserError(f"{where}: {name}={shown(sizes[name])} must be a whole number, 1 to {LARGEST - 1:,}")
        if config.get(alias, sizes[name]) != sizes[name]:
            raise UserError(f"{where}: {name}={sizes[name]}, but {alias}={shown(config[alias])}, which is the same")
    C, H = sizes["n_embd"], sizes["n_head"]
    if C % H:
        raise UserError(f"{where}: n_embd={C} is not a multiple of n_head={H}")
    for name, good in {**FIXED, "n_inner": (None, 4 * C)}.items():
        value = config.get(name, good[0])
        if value not in good:
            raise UserError(
                f"{where}: {name}={shown(value)}, but this GPT-2 has {name}={good[0]!r} only: its text would differ"
            )
    return ModelConfig(
        block_size=sizes["n_positions"],
        vocab_size=sizes["vocab_size"],
        n_layer=sizes["n_layer"],
        n_head=H,
        n_embd=C,
        bias=True,
    )


def _check_tensors(cfg: ModelConfig, config: dict[str, Any], weights: Weights, about: Path) -> None:
    """UserError unless the tensors are those of a GPT-2 of that size, and others that may be ignored.

    False sizes cost no time: the names are counted, and compared until one is missing.
    """
    n_missing = n_tensors(cfg) - sum(is_tensor(cfg, name) for name in weights.names)
    if n_missing:
        first = next(name for name, _ in expected_tensors(cfg) if name not in weights)
        more = f" and {n_missing - 1:,} more" if n_missing > 1 else ""
        has = f"; it has {shown(weights.names[0])}" if "wte.weight" not in weights and weights.names else ""
        some = f"tensors {first}{more} are" if more else f"tensor {first} is"
        raise UserError(f"{some} missing from {_names(weights)} ({about}: n_layer={cfg.n_layer}){has}")
    expected = their_shapes(cfg)
    for name, shape in expected.items():
        if weights.shape(name) != shape:
            raise UserError(
                f"{weights.file_of[name]}: {name} is {list(weights.shape(name))}, but {about} asks for {list(shape)} "
                f"(vocab_size={cfg.vocab_size} n_positions={cfg.block_size} n_embd={cfg.n_embd})"
            )
    # old files contain the causal mask too
    masks = (".attn.bias", ".attn.masked_bias")
    extra = [n for n in weights.names if n not in expected and n != "lm_head.weight" and not n.endswith(masks)]
    if extra:
        raise UserError(
            f"{weights.file_of[extra[0]]}: {cut(extra[0])} is not a tensor of a GPT-2 of n_layer={cfg.n_layer} "
            f"({about})\n       only GPT2LMHeadModel and GPT2Model can be imported"
        )
    if "lm_head.weight" not in weights and config.get("tie_word_embeddings", True) is False:
        raise UserError(
            f"{about}: tie_word_embeddings=False, but {_names(weights)} has no lm_head.weight\n"
            "       here, as in GPT-2, the output head is the token embedding: if it is, set that to true"
        )
    if "lm_head.weight" in weights:
        head, wte = weights.read("lm_head.weight"), weights.read("wte.weight")
        if head.shape != wte.shape or not np.array_equal(head, wte):
            raise UserError(
                f"{weights.file_of['lm_head.weight']}: lm_head.weight is not wte.weight (an untied head)\n"
                "       here, as in GPT-2, the output head is the token embedding: this model cannot be imported"
            )


def _names(weights: Weights) -> str:
    files = sorted({str(path) for path in weights.file_of.values()})
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more" if files else "the files"


def config_json(cfg: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    """The config.json for transformers, lm-evaluation-harness and llama.cpp."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.block_size,
        "n_ctx": cfg.block_size,
        "n_embd": cfg.n_embd,
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_inner": None,
        **{name: values[0] for name, values in FIXED.items()},
        "attn_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "resid_pdrop": cfg.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
        "torch_dtype": "float32",  # the same, for transformers before 5
    }
