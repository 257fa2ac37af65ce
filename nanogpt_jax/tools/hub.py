"""`nanogpt-jax import-hf` and `export-hf`: GPT-2 in Hugging Face's files to a run directory, and back; GGUF too."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config, ModelConfig, UserError
from nanogpt_jax.host import terminal

IMPORT_USAGE = """usage: nanogpt-jax import-hf MODEL RUN [--tokenizer DIR] [--no-compare]

Makes the run directory RUN from a GPT-2 in Hugging Face's files, for sample.py, train.py --init-from and eval.

  MODEL            a directory with config.json and model.safetensors, one .safetensors file,
                   or a name on the Hugging Face Hub such as gpt2-medium
  --tokenizer DIR  where tokenizer.json, or vocab.json and merges.txt, are (default: beside the weights; a model of
                   50257 tokens without any has GPT-2's)
  --no-compare     no comparison with transformers where that is installed; it takes the memory of a second model"""

EXPORT_USAGE = """usage: nanogpt-jax export-hf RUN DIR|FILE.gguf [--checkpoint WHICH] [--overwrite] [--no-compare]

Writes a run as transformers reads it (config.json, model.safetensors, tokenizer.json), or as one file for llama.cpp.

  --checkpoint     best, latest or a step (default: best)
  --overwrite      write over the files in DIR, or over FILE.gguf
  --no-compare     no comparison with transformers where that is installed; it takes the memory of a second model"""

DOWNLOADED = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
DOWNLOADED += ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
TOKENS_COMPARED = 256
ARGUMENTS = {  # the two words, the flags with a value, those without
    "import-hf": ("MODEL RUN", ("tokenizer",), ("no_compare",)),
    "export-hf": ("RUN DIR", ("checkpoint",), ("overwrite", "no_compare")),
}


def main_import(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(IMPORT_USAGE)
        return 0
    (name, target), flags = arguments("import-hf", argv)
    run = Path(target)
    _refuse_existing(run)
    path = Path(name)
    if not path.exists():
        path = _download(name)

    from nanogpt_jax.data import tokenizer as tokenizers
    from nanogpt_jax.interop import transformers_files, vocabulary, weights

    model = transformers_files.open_model(path)
    if model.note:
        print(f"note: {model.note}")
    folder = Path(flags.get("tokenizer", model.folder))
    tokenizer = vocabulary.read_tokenizer(folder)
    if tokenizer is None and "tokenizer" in flags:
        raise UserError(f"--tokenizer={folder} has neither tokenizer.json nor vocab.json and merges.txt")
    if tokenizer is None and model.cfg.vocab_size == tokenizers.GPT2_VOCAB_SIZE:
        print(f"note: {folder} has no tokenizer; {model.cfg.vocab_size} tokens are GPT-2's, so GPT-2's is taken")
        tokenizer = tokenizers.make("gpt2", "")
    if tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt), and its {model.cfg.vocab_size} "
            "tokens are not GPT-2's\n       name a directory that has it: --tokenizer DIR"
        )
    if tokenizer.n_vocab > model.cfg.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.n_vocab} tokens, the model only {model.cfg.vocab_size}: they do "
            "not belong together\n       name the right one: --tokenizer DIR"
        )

    from nanogpt_jax.model import gpt2
    from nanogpt_jax.training import run_dir
    from nanogpt_jax.training.checkpoint import save_params

    with _progress("reading", len(weights.their_shapes(model.cfg))) as advance:

        def read(tensor: str) -> Any:
            advance()
            return model.weights.read(tensor)

        params = weights.from_hugging_face(model.cfg, read)
    cfg = Config(model=model.cfg, data=config.DataConfig(tokenizer=target))
    partial = run.resolve().with_name(f".{run.resolve().name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.mkdir(parents=True)
        tokenizer.save(partial / "tokenizer")
        origin = {"from": name, "files": [str(path) for path in model.files], "config": model.config}
        (partial / run_dir.IMPORTED).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        (partial / "config.json").write_text(config.to_json(cfg), encoding="utf-8")
        save_params(partial, params)
        if run.is_dir():
            run.rmdir()  # empty
        os.rename(partial, run)
    except OSError as e:
        raise UserError(f"cannot write {run}: {e.strerror or e}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    m = cfg.model
    print(
        f"{run}: GPT-2 of {gpt2.n_params(m):,} parameters (n_layer={m.n_layer} n_head={m.n_head} n_embd={m.n_embd} "
        f"block_size={m.block_size} vocabulary {m.vocab_size}), tokenizer of {tokenizer.n_vocab}, from {name}"
    )
    ours = _own_logits(m, params, flags)
    del params  # room for theirs
    print(_compared(ours, model.config, model.files))
    shown = config.word(run)
    print(
        f"next: {config.program('sample')} {shown} --prompt 'Once upon a time'\n"
        f"      or train from it: {config.program('train')} --init-from {shown} --data.source=FILE --run-dir NEW"
    )
    return 0


def main_export(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(EXPORT_USAGE)
        return 0
    (name, target), flags = arguments("export-hf", argv)
    run, out = Path(name), Path(target)
    settings = config.read_json(run / "config.json")
    cfg = settings.model
    if out.suffix == ".gguf":
        if out.is_dir() or (out.exists() and "overwrite" not in flags):
            raise UserError(f"{out} exists\n       choose another name, or write over it with --overwrite")
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a new directory, or a name that ends with .gguf")
    elif out.is_dir() and any(out.iterdir()) and "overwrite" not in flags:
        raise UserError(
            f"{out} is not empty\n       choose another directory, or write over its files with --overwrite"
        )
    if (out / "config.json").is_file() and (out / "checkpoints").is_dir():
        raise UserError(f"{out} is a run directory; choose another one for the export")

    from nanogpt_jax.data import tokenizer as tokenizers

    tokenizer = tokenizers.load(run / "tokenizer")
    if tokenizer.n_vocab > cfg.vocab_size:
        raise UserError(f"{run} is damaged: its tokenizer has {tokenizer.n_vocab} tokens, its model {cfg.vocab_size}")

    from nanogpt_jax.interop import gguf_file, transformers_files, vocabulary, weights
    from nanogpt_jax.training.checkpoint import load_params

    params, step = load_params(run, settings, flags.get("checkpoint", "best"))
    tensors = weights.to_hugging_face(cfg, params)
    if not cfg.bias:
        print("note: the model has no biases; GPT-2's files have, so they are written as zeros")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".gguf":
            gguf_file.write_gguf(out, run.resolve().name, cfg, tensors, tokenizer)
            print(f"{out}: step {step} of {run}, {out.stat().st_size:,} bytes, for llama.cpp")
            return 0
        about = transformers_files.config_json(cfg, tokenizer.end_of_text)
        files = vocabulary.tokenizer_files(tokenizer, cfg.block_size)
        files["config.json"] = json.dumps(about, indent=2) + "\n"
        ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
        files["generation_config.json"] = json.dumps(ends, indent=2) + "\n"
        _write(out, files, tensors)
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror or e}") from None
    print(f"{out}: step {step} of {run}, as transformers reads it")
    ours = _own_logits(cfg, params, flags)
    del tensors, params  # room for theirs
    print(_compared(ours, about, [out / "model.safetensors"]))
    return 0


def arguments(command: str, argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The two words of a command line and its flags; UserError where it is not understood."""
    wanted, options, switches = ARGUMENTS[command]

    def check(key: str) -> None:
        if key not in (*options, *switches):
            raise config.unknown_flag(key, (*options, *switches), command)

    words, flags = config.split_arguments(argv, switches, check)
    if len(words) != 2:
        got = " ".join(words) or "nothing"
        raise UserError(f"{command} takes {wanted}, but got {got}\n       see nanogpt-jax {command} --help")
    return words, flags


def _refuse_existing(run: Path) -> None:
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file; give a new directory for the run")
    try:
        if run.is_dir() and any(run.iterdir()):
            raise UserError(f"{run} exists and is not empty\n       choose a new directory for the run")
    except OSError as e:
        raise UserError(f"cannot read {run}: {e.strerror}") from None


def _download(name: str) -> Path:
    """The files of a model on the Hugging Face Hub, in its cache; nothing is asked of the network in offline mode."""
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix:
        raise UserError(f"no file or directory {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except (HFValidationError, RepositoryNotFoundError):
        raise UserError(f"no file or directory {name}, and no such model on the Hugging Face Hub") from None
    except (OSError, ValueError, RuntimeError) as e:  # of which the network's errors are
        raise UserError(
            f"no file or directory {name}, and it cannot be downloaded from the Hugging Face Hub "
            f"({str(e).splitlines()[0][:120]})\n"
            f"       where there is a network: hf download {name} --local-dir DIR; then give DIR here"
        ) from None


def _write(out: Path, texts: dict[str, str], tensors: dict[str, Any]) -> None:
    """All files under temporary names, then each to its own: a file is the old one or the new one, whole."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    out.mkdir(exist_ok=True)
    partial = out / f".export.{secrets.token_hex(4)}.tmp"
    partial.mkdir()
    try:
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        # transformers asks for the format; the prefix is GPT2LMHeadModel's
        named = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
        try:
            save_file(named, partial / "model.safetensors", {"format": "pt"})
        except SafetensorError as e:  # its word for a full disk
            raise OSError(str(e)) from None
        shutil.copymode(partial / "config.json", partial / "model.safetensors")  # it was for the owner alone
        for path in sorted(partial.iterdir(), key=lambda p: p.name != "model.safetensors"):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Any]:
    from rich.progress import Progress

    console = terminal.console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _tokens(n_vocab: int, block_size: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(n_vocab, size=(1, min(block_size, TOKENS_COMPARED)))


def _own_logits(cfg: ModelConfig, params: Any, flags: dict[str, str]) -> Any:
    """Ours [1, T, V] for random tokens; or, as text, why nothing is to be compared."""
    if "no_compare" in flags:
        return "not compared (--no-compare)"
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not compared with transformers: {missing[0]} is not installed (pip install 'nanogpt-jax[compare]')"
    import jax
    import numpy as np

    from nanogpt_jax.model import gpt2

    cfg = dataclasses.replace(cfg, attention="reference", dtype="float32", scan_unroll=1, remat="none")
    forward = jax.jit(gpt2.forward, static_argnums=0)
    with jax.default_matmul_precision("highest"):  # a GPU's own choice is 1e-3 off
        logits = forward(cfg, params, _tokens(cfg.vocab_size, cfg.block_size))
    return np.asarray(logits)[..., : cfg.vocab_size]


def _compared(ours: Any, about: dict[str, Any], files: list[Path]) -> str:
    """What is to be said of `ours` beside the logits of transformers, which reads `files` in its own way."""
    if isinstance(ours, str):
        return ours
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel  # pyright: ignore[reportMissingImports]

    theirs_about = GPT2Config.from_dict({**about, "attn_implementation": "eager"})
    with torch.device("meta"):
        model = GPT2LMHeadModel(theirs_about).train(False)
    state = {}
    for path in files:
        for name, tensor in load_file(path).items():
            name = name if name.startswith("lm_head.") else "transformer." + name.removeprefix("transformer.")
            state[name] = tensor.float()
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
