"""The command line of `sample.py`: flags, their limits, and the prompt. No jax here: a typo is reported at once."""

from dataclasses import dataclass
from pathlib import Path

from nanogpt_jax import config
from nanogpt_jax.config import UserError, command_line
from nanogpt_jax.config.command_line import AT_LEAST_1, CommandLine, flag
from nanogpt_jax.data import text_file

LONGEST_PROMPT = 1 << 24  # characters


@dataclass(frozen=True)
class Options(command_line.Options):
    prompt: str | None = flag("TEXT", "the beginning of the text (default: a newline)")
    prompt_file: Path | None = flag("FILE", "a UTF-8 file with the prompt, taken verbatim")
    num_samples: int = flag("N", "number of continuations", 1, must=AT_LEAST_1)
    max_new_tokens: int = flag("N", "longest continuation; the context slides", 500, must=AT_LEAST_1)
    temperature: float = flag(
        "T",
        "lower is safer, higher is wilder; 0: always the likeliest token",
        0.8,
        must=("be 0 (always the likeliest token) or lie in [0.001, 100]", lambda t: t == 0 or 0.001 <= t <= 100),
    )
    top_k: int = flag(
        "K", "only the K likeliest tokens; 0: all", 0, must=("not be negative; 0 allows all tokens", lambda k: k >= 0)
    )
    top_p: float = flag(
        "P",
        "only the likeliest tokens whose probabilities add up to P",
        1.0,
        must=("lie in (0, 1]; 1 allows all tokens", lambda p: 0 < p <= 1),
    )
    min_p: float = flag(
        "P",
        "only tokens at least P times as likely as the likeliest",
        0.0,
        must=("lie in [0, 1); 0 allows all tokens", lambda p: 0 <= p < 1),
    )
    repetition_penalty: float = flag(
        "R",
        "above 1: makes repeated tokens less likely",
        1.0,
        must=("lie in [0.01, 100]; 1 is none", lambda r: 0.01 <= r <= 100),
    )
    stop: tuple[str, ...] = flag("TEXT", "stop before this text; may be given several times", ())
    seed: int = flag(
        "N", "the same seed gives the same text", 1337, must=("lie in [0, 2**32)", lambda s: 0 <= s < 2**32)
    )
    checkpoint: str = flag("WHICH", "best, latest or a step", "best")

    @property
    def run(self) -> str | None:
        return self.words[0] if self.words else None


COMMAND = CommandLine(
    "sample", Options, "Writes text with a trained model.", {"[RUN]": "a run directory (default: the newest in runs/)"}
)


def read(argv: list[str]) -> Options:
    options = COMMAND.read(argv)
    if len(options.words) > 1:
        both = f"{options.run} and {config.quoted(options.words[1])}"
        raise UserError(f"one run at a time, but got {both}\n       a text to go on from is --prompt TEXT")
    if not all(options.stop):
        raise UserError("--stop= needs a text; leave it out, and nothing but the length ends a sample")
    return options


def read_prompt(options: Options) -> str | None:
    """The prompt, verbatim; None if none was given."""
    path = options.prompt_file
    if path is None:
        return options.prompt
    if options.prompt is not None:
        raise UserError(f"--prompt and --prompt-file={path} exclude each other; leave one out")
    prompt = text_file.whole(path, f"--prompt-file={path}", LONGEST_PROMPT)
    if not prompt:
        raise UserError(f"--prompt-file={path} is empty; leave it out to begin with a newline")
    return prompt
