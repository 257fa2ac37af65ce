"""`nanogpt-jax prepare SOURCE`: text to tokens, ahead of training.

train.py does the same on first use, with the same code and the same folder. This is for texts that take long, and for
machines that have the network or the cores.
"""

import shlex
import time
from dataclasses import dataclass

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config, DataConfig, UserError, command_line
from nanogpt_jax.config.command_line import CommandLine, flag

SOURCE = """python-docs, frases, shakespeare, or
FILE: a UTF-8 text, or .jsonl, .json, .csv, .tsv or .parquet with a text field; each may be packed as .gz
FOLDER: every .txt, .text, .md, .jsonl, .ndjson and .parquet in it
'GLOB': files by a pattern, like 'books/**/*.txt'
hf:NAME[:CONFIG][:FIELD]: a data set of the Hugging Face hub, streamed
-: a text from standard input"""


@dataclass(frozen=True)
class Options(command_line.Options):
    config: str | None = flag("CONFIG", "take settings from a config file, as train.py does")


COMMAND = CommandLine(
    "prepare",
    Options,
    "Turns text into tokens, for train.py to find. The same command again resumes an interrupted preparation.",
    {"[SOURCE]": SOURCE},
    after="Each flag but --config is the setting data.NAME of train.py.",
    kind=Config,
    section="data",
)


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(COMMAND.help())
        return 0
    return run(read(argv))


def run(command: config.Command) -> int:
    from nanogpt_jax.data.dataset import open_data

    cfg, began = command.cfg.data, time.monotonic()
    data = open_data(cfg)
    print(
        f"{cfg.title}: {len(data.train):,} tokens to train on, {len(data.val):,} to validate, "
        f"vocabulary {data.tokenizer.n_vocab:,}, {_bytes_per_token(data.manifest):.2f} bytes a token\n"
        f"in {data.folder}, ready after {time.monotonic() - began:.1f} s\n"
        f"next: {train_command(command)}"
    )
    return 0


def read(argv: list[str]) -> config.Command:
    """The command line, each flag of which is `--data.NAME` for train.py."""
    options = COMMAND.read(argv)
    words, settings = options.words, options.settings
    if len(words) > 1:
        raise UserError(
            f"one source at a time, but got {' and '.join(words)}\n"
            "       for several, give a folder, a pattern in quotes, or --mixture A=3,B=1"
        )
    if words and settings.setdefault("data.source", words[0]) != words[0]:
        raise UserError(f"the source was given twice: {words[0]} and {settings['data.source']}")
    file = [options.config] if options.config is not None else []
    return config.load([*file, *(f"--{key}={value}" for key, value in settings.items())])


def train_command(command: config.Command) -> str:
    """The command that trains on these tokens."""
    default, cfg = DataConfig(), command.cfg.data
    typed = [key for key, where in command.origin.items() if where == "command line" and key != "data.threads"]
    values = {key: getattr(cfg, key.removeprefix("data.")) for key in typed}
    changed = {key: value for key, value in values.items() if value != getattr(default, key.removeprefix("data."))}
    shown = [f"--{key}={_shown(value)}" for key, value in changed.items()]
    named = {where for where in command.origin.values() if where not in ("command line", "default")}
    return config.joined([*shlex.split(config.program("train")), *named, *shown])


def _shown(value: object) -> str:
    return ",".join(f"{name}={weight:g}" for name, weight in value.items()) if isinstance(value, dict) else str(value)


def _bytes_per_token(manifest: dict) -> float:
    count = {of: sum(manifest[split][of] for split in ("train", "val")) for of in ("bytes", "tokens")}
    return count["bytes"] / count["tokens"]
