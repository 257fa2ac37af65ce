"""`nanogpt-jax import-hf` and `export-hf`: GPT-2 in Hugging Face's files to a run directory, and back; GGUF too."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config, UserError, command_line, program
from nanogpt_jax.config.command_line import CommandLine, Read, flag
from nanogpt_jax.host import files, messages
from nanogpt_jax.host.progress import Progress
from nanogpt_jax.model import sizes

NO_COMPARE = "do not compare with transformers, which takes the memory of a second model"


@dataclass(frozen=True)
class ImportOptions(command_line.Options):
    tokenizer: str | None = flag(
        "DIR",
        "the folder of tokenizer.json, or of vocab.json and merges.txt (default: that of the weights; without any, a "
        "model of 50257 tokens gets GPT-2's)",
    )
    no_compare: bool = flag("", NO_COMPARE, False)


@dataclass(frozen=True)
class ExportOptions(command_line.Options):
    checkpoint: str = flag("WHICH", "best, latest or a step", "best")
    overwrite: bool = flag("", "overwrite the files in DIR, or FILE.gguf", False)
    no_compare: bool = flag("", NO_COMPARE, False)


IMPORT = CommandLine(
    "import-hf",
    ImportOptions,
    "Makes a run directory from a GPT-2 in Hugging Face's files, for sample.py, train.py --init-from and eval.",
    {
        "MODEL": "a directory with config.json and model.safetensors, one .safetensors file, or a name on the Hugging "
        "Face Hub such as gpt2-medium",
        "RUN": "the new run directory",
    },
)
EXPORT = CommandLine(
    "export-hf",
    ExportOptions,
    "Writes a run as transformers reads it (config.json, model.safetensors, tokenizer.json), or as one file for "
    "llama.cpp.",
    {"RUN": "a run directory", "DIR": "the target: a directory, or one FILE.gguf"},
)

DOWNLOADED = ["config.json", "model*.safetensors", "model.safetensors.index.json", "adapter_config.json"]
DOWNLOADED += ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
DOWNLOADED += ["added_tokens.json", "special_tokens_map.json"]
# what an export writes into DIR
WEIGHTS = "model.safetensors"
EXPORTED = (WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
EXPORTED += ("vocab.json", "merges.txt", "special_tokens_map.json")
BEGUN, OVER = "export", "overwrite"  # the temporary folder in DIR: if none of these existed, and if some did


def main_import(argv: list[str]) -> int:
    return _main(IMPORT, run_import, argv)


def main_export(argv: list[str]) -> int:
    return _main(EXPORT, run_export, argv)


def _main(command: CommandLine[Read], run: Callable[[Read], int], argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(command.help())
        return 0
    return run(_two_words(command, argv))


def read(name: str, argv: list[str]) -> ImportOptions | ExportOptions:
    """The two words of a command line and its flags; UserError if they are invalid. No jax here."""
    return _two_words(IMPORT, argv) if name == "import-hf" else _two_words(EXPORT, argv)


def _two_words(command: CommandLine[Read], argv: list[str]) -> Read:
    asked = command.read(argv)
    if len(asked.words) != 2:
        wanted, got = " ".join(command.words), " ".join(asked.words) or "nothing"
        raise UserError(f"{command.name} takes {wanted}, but got {got}\n       see {program(command.name)} --help")
    return asked


def run_import(asked: ImportOptions) -> int:
    name, target = asked.words
    run = Path(target)
    _refuse_existing(run)
    path = Path(name) if os.path.exists(name) else _download(name)

    from nanogpt_jax.data import tokenizer as tokenizers
    from nanogpt_jax.interop import check, transformers_files, vocabulary, weights

    model = transformers_files.open_model(path)
    if model.note:
        print(f"note: {model.note}")
    folder = Path(asked.tokenizer or model.folder)
    tokenizer = vocabulary.read_tokenizer(folder, lambda left_out: print(f"note: {left_out}"))
    if tokenizer is None and asked.tokenizer:
        raise UserError(f"--tokenizer={folder} has neither tokenizer.json nor vocab.json and merges.txt")
    if tokenizer is None and model.cfg.vocab_size == tokenizers.GPT2_VOCAB_SIZE:
        print(f"note: {folder} has no tokenizer; {model.cfg.vocab_size} tokens are GPT-2's, so GPT-2's is taken")
        tokenizer = tokenizers.make("gpt2", "")
    if tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt), and its {model.cfg.vocab_size} "
            "tokens are not GPT-2's\n       name a directory that has it: --tokenizer DIR"
        )
    hint = "name the right one: --tokenizer DIR"
    tokenizers.check_fit(tokenizer, model.cfg.vocab_size, f"the tokenizer in {folder}", hint)

    from nanogpt_jax.run import run_dir
    from nanogpt_jax.run.checkpoint import save_params

    with Progress("reading", len(weights.their_shapes(model.cfg))) as progress:
        taken = itertools.count(1)

        def read(tensor: str) -> Any:
            progress.update(next(taken))
            return model.weights.read(tensor)

        params = weights.from_hugging_face(model.cfg, read)
    cfg = Config(model=model.cfg, data=config.DataConfig(tokenizer=target))
    origin = {"from": name, "files": [str(path) for path in model.files], "config": model.config}
    place = files.target(run)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with files.folder_beside(place) as partial:
            tokenizer.save(partial / "tokenizer")
            files.write(partial / run_dir.IMPORTED, json.dumps(origin, indent=2, allow_nan=False) + "\n")
            files.write(partial / "config.json", config.to_json(cfg))
            try:
                save_params(partial, params)
            except UserError as e:  # it names the temporary folder
                raise UserError(str(e).replace(str(partial), str(run))) from None
            if place.is_dir():
                place.rmdir()  # it is empty
            os.rename(partial, place)
    except OSError as e:
        raise UserError(f"cannot write {run}: {e.strerror or e}") from None
    m = cfg.model
    print(
        f"{run}: GPT-2 of {sizes.n_params(m):,} parameters (n_layer={m.n_layer} n_head={m.n_head} n_embd={m.n_embd} "
        f"block_size={m.block_size} vocabulary {m.vocab_size}), tokenizer of {tokenizer.n_vocab}, from {name}"
    )
    ours = check.own_logits(m, params, asked.no_compare)
    del params  # room for theirs
    print(check.compared(ours, model.config, model.files))
    shown = config.word(run)
    print(
        f"next: {config.program('sample')} {shown} --prompt 'Once upon a time'\n"
        f"      or train from it: {config.program('train')} --init-from {shown} --data.source=FILE --run-dir NEW"
    )
    return 0


def run_export(asked: ExportOptions) -> int:
    from nanogpt_jax.run.opened import open_run

    run, out = map(Path, asked.words)
    opened = open_run(run)
    cfg, tokenizer = opened.cfg.model, opened.tokenizer
    _refuse_target(out, asked.overwrite)

    from nanogpt_jax.interop import check, gguf_file, transformers_files, vocabulary, weights

    params, step = opened.load(asked.checkpoint)
    tensors = weights.to_hugging_face(cfg, params)
    if bad := weights.not_finite(tensors):
        raise UserError(
            f"step {step} of {run} is not finite: {bad[0]} and {len(bad) - 1} other tensors hold such numbers\n"
            "       export an earlier one: --checkpoint STEP"
        )
    if not cfg.bias:
        print("note: the model has no biases; GPT-2's files do, so they are written as zeros")
    if tokenizer.n_vocab < cfg.vocab_size:
        first, last = tokenizer.n_vocab, cfg.vocab_size - 1
        print(
            f"note: the model has {cfg.vocab_size} tokens, its tokenizer {first}: no text for the ids {first} to {last}"
        )
    try:
        files.target(out).parent.mkdir(parents=True, exist_ok=True)
        if out.suffix.lower() == ".gguf":
            gguf_file.write_gguf(out, run.resolve().name, cfg, tensors, tokenizer)
            print(f"{out}: step {step} of {run}, {out.stat().st_size:,} bytes, for llama.cpp")
            return 0
        about = transformers_files.config_json(cfg, tokenizer.end_of_text)
        texts = vocabulary.tokenizer_files(tokenizer, cfg.block_size)
        texts["config.json"] = json.dumps(about, indent=2) + "\n"
        ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
        texts["generation_config.json"] = json.dumps(ends, indent=2) + "\n"
        _write(files.target(out), texts, tensors)
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror or e}") from None
    print(f"{out}: step {step} of {run}, as transformers reads it")
    ours = check.own_logits(cfg, params, asked.no_compare)
    del tensors, params  # room for theirs
    print(check.compared(ours, about, [out / "model.safetensors"]))
    return 0


def _refuse_existing(run: Path) -> None:
    if os.path.exists(run) and not run.is_dir():
        raise UserError(f"{run} is not a directory; give a new one for the run")
    if _names_in(run):
        raise UserError(f"{run} exists and is not empty\n       choose a new directory for the run")
    place = files.target(run)
    if place == Path.cwd():
        raise UserError(f"{run} is the directory that you are in\n       choose a new directory for the run")
    _check_writable(place, run)


def _names_in(folder: Path) -> set[str]:
    try:
        return {p.name for p in folder.iterdir()} if os.path.isdir(folder) else set()
    except OSError as e:
        raise UserError(f"cannot read {folder}: {e.strerror}") from None


def _check_writable(place: Path, shown: Path) -> None:
    """UserError, before the work, if nothing can be written at `place`."""
    try:
        there = next(folder for folder in place.parents if os.path.lexists(folder))
        with files.folder_beside(there / place.name):
            pass
    except OSError as e:
        raise UserError(f"cannot write {shown}: {e.strerror}") from None


def _refuse_target(out: Path, overwrite: bool) -> None:
    """UserError if an export to `out` would overwrite something else, or could not be written."""
    place = files.target(out)
    if out.suffix.lower() == ".gguf":
        if files.is_special(out):
            raise UserError(f"{out} is a device or a pipe, and a GGUF needs a file\n       choose another name")
        if os.path.isdir(out) or (os.path.exists(out) and not overwrite):
            raise UserError(f"{out} exists\n       choose another name, or overwrite it with --overwrite")
        _check_writable(place, out)
    elif os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"{out} is not a directory; give a new one, or a name that ends with .gguf")
    elif os.path.isdir(out):
        names = _names_in(out)
        begun = {name: found[1] for name in names if (found := files.LEFTOVER.fullmatch(name))}
        others = {name for name in names if begun.get(name) not in (BEGUN, OVER)}
        # an export into an empty directory that was killed is repeated: files that it had moved are its own
        if others and not overwrite and not (BEGUN in begun.values() and others <= set(EXPORTED)):
            raise UserError(
                f"{out} is not empty\n       choose another directory, or overwrite its files with --overwrite"
            )
        for name in EXPORTED:
            if files.kind_of(out / name) not in ("file", ""):
                raise UserError(f"{out / name} is not a file, and is not overwritten\n       choose another directory")
        _check_writable(place / OVER, out)
    else:
        _check_writable(place, out)
    for run in (place, *place.parents):
        inside = place.relative_to(run).parts[:1]
        if (run / "config.json").is_file() and (run / "checkpoints").is_dir():
            if not inside and out.suffix.lower() != ".gguf":
                raise UserError(f"{out} is a run directory; choose another one for the export")
            if inside and inside[0] in ("checkpoints", "tokenizer"):
                raise UserError(f"{out} is inside a run directory; choose another one for the export")


def _download(name: str) -> Path:
    """The files of a model of the Hugging Face Hub, in its cache. Uses no network in offline mode."""
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix:
        raise UserError(f"no file or directory {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except (HFValidationError, RepositoryNotFoundError):
        raise UserError(f"no file or directory {name}, and no such model on the Hugging Face Hub") from None
    except (OSError, ValueError, RuntimeError) as e:  # which include the network's errors
        raise UserError(
            f"no file or directory {name}, and it cannot be downloaded from the Hugging Face Hub "
            f"({messages.first_line(e)})\n"
            f"       on a machine with a network: hf download {config.quoted(name)} --local-dir DIR; then give DIR here"
        ) from None


def _write(out: Path, texts: dict[str, str], tensors: dict[str, Any]) -> None:
    """Write all files under temporary names, then rename each, so that every file is the complete old or new one.

    A new directory is renamed as a whole. Links in an old one are refused before, by `_refuse_target`.
    """
    if not out.is_dir():
        with files.folder_beside(out) as partial:
            _write_into(partial, texts, tensors)
            os.rename(partial, out)
        return
    with files.folder_beside(out / (OVER if set(EXPORTED) & _names_in(out) else BEGUN)) as partial:
        _write_into(partial, texts, tensors)
        for path in sorted(partial.iterdir(), key=lambda p: p.name != WEIGHTS):
            os.replace(path, out / path.name)
    for name in (BEGUN, OVER):
        files.remove_leftovers(out / name)


def _write_into(folder: Path, texts: dict[str, str], tensors: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    for name, text in texts.items():
        files.write(folder / name, text)
    # transformers asks for the format; the prefix is GPT2LMHeadModel's
    named = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    try:
        save_file(named, folder / WEIGHTS, {"format": "pt"})
    except SafetensorError as e:  # raised for a full disk
        raise OSError(str(e)) from None
    shutil.copymode(folder / "config.json", folder / WEIGHTS)  # it was readable by the owner alone
