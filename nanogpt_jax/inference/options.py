"""The command line of `sample.py`: flags, their limits, and the prompt. No jax here: a typo is reported at once."""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from nanogpt_jax import config
from nanogpt_jax.config import UserError, command_line
from nanogpt_jax.data import text_file

LONGEST_PROMPT = 1 << 24  # characters
LIMITS = {  # what a value must be, in words and as a test
    "num_samples": ("be at least 1", lambda n: n >= 1),
    "max_new_tokens": ("be at least 1", lambda n: n >= 1),
    "temperature": ("be 0 (always the likeliest token) or lie in [0.001, 100]", lambda t: t == 0 or 0.001 <= t <= 100),
    "top_k": ("not be negative; 0 allows all tokens", lambda k: k >= 0),
    "top_p": ("lie in (0, 1]; 1 allows all tokens", lambda p: 0 < p <= 1),
    "min_p": ("lie in [0, 1); 0 allows all tokens", lambda p: 0 <= p < 1),
    "repetition_penalty": ("lie in [0.01, 100]; 1 is none", lambda r: 0.01 <= r <= 100),
    "seed": ("lie in [0, 2**32)", lambda s: 0 <= s < 2**32),
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}\n       see {config.program('sample')} --help")


def make_parser() -> Parser:
    parser = Parser(
        prog=config.program("sample", briefly=True),
        description="Writes text with a trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("run", nargs="?", metavar="RUN", help="a run directory (default: the newest in runs/)")
    flag("--prompt", metavar="TEXT", help="what the text begins with (default: a newline)")
    flag("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file with the prompt, taken to the letter")
    flag("--num-samples", type=int, default=1, metavar="N", help="continuations, drawn side by side")
    flag("--max-new-tokens", type=int, default=500, metavar="N", help="longest continuation; the context slides")
    flag("--temperature", type=float, default=0.8, metavar="T", help="lower is safer, higher wilder; 0: the likeliest")
    flag("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0: all")
    flag("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest, until they have probability P")
    flag(
        "--min-p", type=float, default=0.0, metavar="P", help="only tokens P times as likely as the likeliest, or more"
    )
    flag("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: rarer what was there before")
    flag("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")
    flag("--seed", type=int, default=1337, metavar="N", help="the same seed gives the same text")
    flag("--checkpoint", default="best", metavar="WHICH", help="best, latest or a step")
    return parser


def read(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    # dashes and underscores are the same, in the names of flags
    names = [word.partition("=")[0] for word in argv]
    argv = [n.replace("_", "-") + w[len(n) :] if w.startswith("--") else w for n, w in zip(names, argv, strict=True)]
    absent = argparse.Namespace(run=None, prompt=None, prompt_file=None, stop=[])
    options, unknown = parser.parse_known_args(argv, absent)
    for word in sorted(unknown, key=lambda w: not w.startswith("-")):
        if not word.startswith("-"):
            both = f"{options.run} and {config.quoted(word)}"
            raise UserError(f"one run at a time, but got {both}\n       a text to go on from is --prompt TEXT")
        known = [flag.lstrip("-") for action in parser._actions for flag in action.option_strings]
        raise command_line.unknown_flag(word.partition("=")[0].lstrip("-"), known, "sample")
    for name, (must, good) in LIMITS.items():
        if not good(value := getattr(options, name)):
            raise UserError(f"--{name.replace('_', '-')}={value} must {must}")
    if not all(options.stop):
        raise UserError("--stop= needs a text; leave it out, and nothing but the length ends a sample")
    return options


def read_prompt(options: argparse.Namespace) -> str | None:
    """The prompt to the letter; None where none was given."""
    path = options.prompt_file
    if path is None:
        return options.prompt
    if options.prompt is not None:
        raise UserError(f"--prompt and --prompt-file={path} exclude each other; leave one out")
    prompt = text_file.whole(path, f"--prompt-file={path}", LONGEST_PROMPT)
    if not prompt:
        raise UserError(f"--prompt-file={path} is empty; leave it out to begin with a newline")
    return prompt


def existing(name: str) -> Path:
    """The run directory of that name, if it is a directory; config.py says whether it is a run."""
    run = Path(name)
    if os.path.isdir(run):  # Path's own raise errors for a name that no file system takes
        return run
    if os.path.exists(run):
        raise UserError(f"{run} is a file; a run is a directory, like runs/default")
    near = config.suggestion(str(run), [str(p) for p in Path("runs").glob("*/")])
    near = near or config.suggestion(run.name, [p.name for p in Path("runs").glob("*/")])
    raise UserError(f"no run {run}" + (near or f"\n       train one first: {config.program('train')}"))
