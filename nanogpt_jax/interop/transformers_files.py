"""A GPT-2 in the files of Hugging Face's transformers: config.json and safetensors, checked before a weight is read.

Only safetensors: a pickled file (pytorch_model.bin) runs whatever code its author put into it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # its import teaches numpy, and so safetensors, bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from nanogpt_jax.config import ModelConfig, UserError
from nanogpt_jax.interop.weights import their_shapes
from nanogpt_jax.model.layers import EPSILON

WIDE = (np.float32, np.float16, ml_dtypes.bfloat16)
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")

# Settings of theirs that we have in one way only. The first value is what transformers takes where the file is silent.
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (EPSILON,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


class Weights:
    """The tensors of some safetensors files, by GPT2Model's names: without the "transformer." of GPT2LMHeadModel."""

    def __init__(self, files: list[Path]):
        self._places: dict[str, tuple[Any, str]] = {}
        self.file_of: dict[str, Path] = {}
        for path in files:
            try:
                opened = safe_open(path, "numpy")  # pyright: ignore[reportArgumentType]
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    short = name.removeprefix("transformer.")
                    self._places[short] = opened, name
                    self.file_of[short] = path
            except FileNotFoundError:
                raise UserError(f"{path} is missing\n       its index names it; download the model again") from None
            except (SafetensorError, OSError) as e:
                raise UserError(f"{path} is cut short or no safetensors file ({e})\n       download it again") from None

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
            raise UserError(f"{self.file_of[name]}: cannot read {name} ({e})") from None
        if array.dtype not in WIDE:
            raise UserError(
                f"{self.file_of[name]}: {name} is {array.dtype}; only float32, float16 and bfloat16 are taken\n"
                "       save the model in one of them first"
            )
        return array


@dataclass(frozen=True)
class Model:
    """A model found on disk and understood."""

    cfg: ModelConfig
    config: dict[str, Any]  # as transformers reads it
    weights: Weights
    files: list[Path]
    folder: Path  # where its tokenizer would be
    note: str  # what had to be guessed; or ""


def open_model(path: Path) -> Model:
    """The GPT-2 in a directory, or in one safetensors file; UserError if it is none, or not one that we compute."""
    folder = path if path.is_dir() else path.parent
    files = _files_in(path) if path.is_dir() else [_checked_file(path)]
    weights = Weights(files)
    about, note = folder / "config.json", ""
    if about.is_file():
        config = _read_json(about)
    elif path.is_dir():
        raise UserError(f"{path} has no config.json; to have the sizes read off the weights, name the file {files[0]}")
    else:
        config, about = _inferred(weights, path), path
        note = (
            f"{path} has no config.json beside it: its tensors tell the sizes, and n_head={config['n_head']} is "
            f"n_embd={config['n_embd']} / 64, as in all of GPT-2's"
        )
    cfg = model_config(config, about)
    _check_tensors(cfg, weights, about)
    return Model(cfg, config, weights, files, folder, note)


def _checked_file(path: Path) -> Path:
    if path.suffix in PICKLED:
        raise _pickled(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors file; give one, or a directory with one and its config.json")
    return path


def _pickled(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickled file, and reading one runs whatever code is in it: only safetensors is taken\n"
        "       most models have a model.safetensors beside it; else convert it where you trust it:\n"
        '       python -c "from transformers import GPT2LMHeadModel as M; '
        "M.from_pretrained('DIR').save_pretrained('NEW')\""
    )


def _files_in(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(n, str) and Path(n).name == n for n in places.values()):
            raise UserError(f"{index} is damaged: it has no weight_map with names of files")
        return [folder / name for name in sorted(set(places.values()))]
    for pattern in ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth"):
        for path in sorted(folder.glob(pattern)):
            raise _pickled(path)
    others = sorted(folder.glob("*.safetensors"))
    hint = f"\n       to take one file: {others[0]}" if others else ""
    raise UserError(
        f"{folder} has no model.safetensors and no model.safetensors.index.json; pickled weights are not taken{hint}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path} is no JSON: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no settings")
    return found


def _inferred(weights: Weights, path: Path) -> dict[str, Any]:
    """The config.json that a file without one would have."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in weights or len(weights.shape(name)) != 2:
            raise UserError(f"{path} is no GPT-2: it has no matrix {name} (nor transformer.{name})")
    (V, C), (T, _) = weights.shape("wte.weight"), weights.shape("wpe.weight")
    if C % 64:
        raise UserError(
            f"{path} has no config.json beside it, and n_embd={C} is no multiple of 64\n"
            "       put the model's config.json there: n_head cannot be read off the weights"
        )
    n_layer = len({name.split(".")[1] for name in weights.names if name.startswith("h.")})
    sizes = {"vocab_size": V, "n_positions": T, "n_embd": C, "n_layer": n_layer, "n_head": C // 64}
    return {"model_type": "gpt2", **sizes}


def model_config(config: dict[str, Any], where: Path) -> ModelConfig:
    """Our settings from theirs; UserError that names the setting of theirs that we cannot compute."""
    kind = config.get("model_type")
    if kind != "gpt2":
        raise UserError(f"{where}: model_type={kind!r}; this is no GPT-2, and only GPT-2 can be imported")
    if "quantization_config" in config:
        raise UserError(f"{where}: the weights are quantized; import the model that they were made from")
    sizes = {}
    defaults = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    for name, default in defaults.items():
        sizes[name] = config.get(name, default)
        if type(sizes[name]) is not int or sizes[name] < 1:
            raise UserError(f"{where}: {name}={sizes[name]!r} must be a whole number, at least 1")
    C, H = sizes["n_embd"], sizes["n_head"]
    if C % H:
        raise UserError(f"{where}: n_embd={C} is no multiple of n_head={H}")
    for name, good in {**FIXED, "n_inner": (None, 4 * C)}.items():
        value = config.get(name, good[0])
        if value not in good:
            raise UserError(
                f"{where}: {name}={value!r}, but this GPT-2 has {name}={good[0]!r} only: its text would be another one"
            )
    return ModelConfig(
        block_size=sizes["n_positions"],
        vocab_size=sizes["vocab_size"],
        n_layer=sizes["n_layer"],
        n_head=H,
        n_embd=C,
        bias=True,
    )


def _check_tensors(cfg: ModelConfig, weights: Weights, about: Path) -> None:
    """Every tensor of a GPT-2 of that size is there in that shape, and nothing else but what may be left out."""
    expected = their_shapes(cfg)
    missing = [name for name in expected if name not in weights]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        layers = f"n_layer={cfg.n_layer}"
        raise UserError(f"tensor {missing[0]}{more} is missing from {_names(weights)} ({about}: {layers})")
    for name, shape in expected.items():
        if weights.shape(name) != shape:
            raise UserError(
                f"{weights.file_of[name]}: {name} is {list(weights.shape(name))}, but {about} asks for {list(shape)} "
                f"(vocab_size={cfg.vocab_size} n_positions={cfg.block_size} n_embd={cfg.n_embd})"
            )
    # old files hold the causal mask too
    masks = (".attn.bias", ".attn.masked_bias")
    extra = [n for n in weights.names if n not in expected and n != "lm_head.weight" and not n.endswith(masks)]
    if extra:
        raise UserError(
            f"{weights.file_of[extra[0]]}: {extra[0]} is no tensor of a GPT-2 of n_layer={cfg.n_layer} ({about})\n"
            "       only GPT2LMHeadModel and GPT2Model can be imported"
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
    """What transformers, lm-evaluation-harness and llama.cpp read as config.json."""
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
