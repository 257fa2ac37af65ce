"""nanogpt-jax attend: one HTML file that shows what a model looks at in a text, and what it expects next."""

import dataclasses
import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanogpt_jax import cli
from nanogpt_jax.config import ModelConfig, UserError, command_line
from nanogpt_jax.config.command_line import COUNT, CommandLine, flag
from nanogpt_jax.data import text_file
from nanogpt_jax.pages import attention, attention_page, tokens
from nanogpt_jax.pages.attention_page import About, Other, Watched, Word
from nanogpt_jax.run.opened import Run, open_run
from nanogpt_jax.run.run_dir import ATTENTION_PAGE

LONGEST_TEXT = 1 << 24  # characters of --text-file
LIKELIEST = 5  # next tokens that are shown
TEXTS, LEAST, MOST, SEED = 8, 32, 128, 0  # texts that the model writes for --word's baseline, their tokens, their seed


@dataclass(frozen=True)
class Options(command_line.Options):
    text_file: Path | None = flag("FILE", "read TEXT from a file")
    checkpoint: str = flag("WHICH", "best, latest or a step", "best")
    out: str | None = flag("FILE", f"the page; a file there is replaced (default: RUN/{ATTENTION_PAGE})")
    language: Literal["en", "es"] = flag("", "of the page", "en")
    layer: int = flag(
        "N", "the head that is shown first, and drawn by --picture: its layer, the first is 1", 1, must=COUNT
    )
    head: int = flag("N", "and its number in that layer, the first is 1", 1, must=COUNT)
    versus: Path | None = flag(
        "RUN2", "also the difference to this run's losses, token by token; it needs the same tokenizer"
    )
    word: str | None = flag(
        "WORD",
        "the word; of several tokens its last one counts",
        heading="How context changes the meaning of a word, by the cosine of its vectors, layer by layer:",
    )
    in_: tuple[str, ...] = flag(
        "TEXT", "a sentence with the word; give two or more. Without TEXT, the page shows the first", ()
    )
    npz: str | None = flag(
        "FILE",
        "weights and scores [L, H, T, T], value_norms [L, H, T], losses [T-1], tokens [T] for numpy.load",
        heading="Beside the page:",
    )
    picture: str | None = flag(
        "FILE", "the one head as a picture, .svg or .png (needs pip install 'nanogpt-jax[plot]')"
    )


COMMAND = CommandLine(
    "attend",
    Options,
    "Writes one HTML file that shows, for a text, all attention weights of a run, each token's loss, and what the "
    "model would predict after each layer. It opens from the disk, without a network.",
    {"RUN": "a run directory", "[TEXT]": "the text, or --text-file. Beyond the context, its beginning is shown"},
    after="A weight says where a head looks, not what that does: the page shows ‖α·V‖ beside each weight.",
)


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(COMMAND.help())
        return 0
    return run(read(argv))


def read(argv: list[str]) -> Options:
    """The command line; UserError if it is invalid. No jax here, and no file is opened."""
    asked = COMMAND.read(argv)
    for one in fields(asked):
        given = getattr(asked, one.name)
        if given in ("", Path("")) or (one.name == "in_" and "" in given):
            raise UserError(f"{command_line.flag_of(one.name)} is empty")
    if not asked.words:
        raise UserError("which run, and which text?\n       nanogpt-jax attend RUN TEXT")
    if len(asked.words) > 2:
        raise UserError(f"one run and one text, but got {', '.join(asked.words)}\n       put TEXT in quotes")
    if len(asked.words) == 2 and asked.text_file:
        raise UserError(f"TEXT and --text-file={asked.text_file} exclude each other; leave one out")
    if not all(asked.words):
        raise UserError(f"{'TEXT' if asked.words[0] else 'RUN'} is empty: there is nothing to look at")
    if asked.word is None and asked.in_:
        raise UserError("--in gives a sentence with the word of --word, which is missing")
    if asked.word is not None and len(asked.in_) < 2:
        raise UserError(f"--word={asked.word} needs two sentences to compare, or more: --in TEXT --in TEXT")
    if len(asked.words) == 1 and not asked.text_file and not asked.in_:
        raise UserError(
            f"a text is missing: nanogpt-jax attend {command_line.word(asked.words[0])} TEXT, or --text-file"
        )
    if asked.picture and cli.format_of(asked.picture) not in ("svg", "png"):
        raise UserError(f"--picture={asked.picture} must end in .svg or .png")
    return asked


def run(asked: Options) -> int:
    opened = open_run(Path(asked.words[0]))
    other = open_run(asked.versus) if asked.versus else None
    ids, n_all = _tokens(asked, opened)
    sentences = [_sentence(opened, text, asked.word) for text in asked.in_] if asked.word else []
    _check_fit(asked, opened, other, len(ids))
    out = _check_places(asked, opened)
    plt = cli.pyplot("--picture", asked.picture) if asked.picture else None
    if n_all > len(ids):
        sees = f"{opened.path} sees {len(ids)} at once: the page shows the first {len(ids)}"
        print(f"note: the text has {n_all} tokens, and {sees}", file=sys.stderr)

    from nanogpt_jax.distributed.mesh import start  # importing jax takes seconds

    start()
    with ThreadPoolExecutor(1) as beside:  # loading waits for the disk, so compile meanwhile: 2 of 11 s for 124M
        compiled = beside.submit(_compiled, opened, len(ids))
        params, step = opened.load(asked.checkpoint)
        print(f"{opened.path}, step {step}: {len(ids)} tokens", file=sys.stderr, flush=True)
        seen = _watched(opened, params, step, ids, *compiled.result())
    word = _word(asked.word, opened, params, sentences) if asked.word else None
    del params
    versus = _other(other, ids) if other else None

    cfg, tokenizer = opened.cfg.model, opened.tokenizer
    about = About(str(opened.path), step, tokenizer.name, n_all, (asked.layer - 1, asked.head - 1), asked.language)
    made = attention_page.page(about, seen, lambda token: _bytes(opened, token), versus, word).encode()
    cli.write_page(asked.out, out, made)
    size = f"{len(made) / 1e6:.1f} MB" if len(made) >= 1e5 else f"{len(made) / 1e3:.0f} kB"
    print(f"{out}: {size}, {cfg.n_layer} layers of {cfg.n_head} heads over {len(ids)} tokens")
    if asked.npz:
        cli.write_file("--npz", asked.npz, _npz(seen))
        print(asked.npz)
    if plt and asked.picture:
        names = [tokens.shown(_bytes(opened, token)) for token in ids]
        cli.write_file(
            "--picture", asked.picture, _picture(plt, seen.weights[asked.layer - 1, asked.head - 1], names, asked)
        )
        print(asked.picture)
    print("open it in a browser; it needs no network")
    return 0


# ---- what was asked for, checked ------------------------------------------------------------------------------------


def _tokens(asked: Options, opened: Run) -> tuple[list[int], int]:
    """The tokens of the text that fit into the context, and how many it has in all."""
    if asked.text_file:
        name = f"--text-file={asked.text_file}"
        text = text_file.whole(asked.text_file, name, LONGEST_TEXT)
        if not text:
            raise UserError(f"{name} is empty: there is nothing to look at")
    else:
        name, text = ("TEXT", asked.words[1]) if len(asked.words) == 2 else (f"--in={asked.in_[0]}", asked.in_[0])
    ids = _encoded(opened, text, name)
    return ids[: opened.cfg.model.block_size], len(ids)


def _encoded(opened: Run, text: str, name: str) -> list[int]:
    try:
        return opened.tokenizer.encode(text).tolist()
    except UserError as e:
        raise UserError(f"{name}: {e}") from None


def _sentence(opened: Run, text: str, word: str) -> tuple[list[int], int]:
    """The tokens of a sentence, and the position of the word's last one."""
    ids, T = _encoded(opened, text, f"--in={text}"), opened.cfg.model.block_size
    position = tokens.last_piece([_bytes(opened, token) for token in ids], text, word)
    if position < 0:
        near = "\n       capital and small letters count" if word.lower() in text.lower() and word not in text else ""
        raise UserError(f"--word={word} is not a word of --in={text}{near}")
    if position >= T:
        raise UserError(
            f"--word={word} is token {position + 1} of --in={text}, beyond the {T} that {opened.path} sees at once"
        )
    return ids[:T], position


def _check_fit(asked: Options, opened: Run, other: Run | None, n: int) -> None:
    for name, most in (("layer", opened.cfg.model.n_layer), ("head", opened.cfg.model.n_head)):
        if (given := getattr(asked, name)) > most:
            raise UserError(f"--{name}={given}: {opened.path} has {most} of them, 1 to {most}")
    if other and other.tokenizer.fingerprint != opened.tokenizer.fingerprint:
        raise UserError(
            f"--versus={other.path} has another tokenizer than {opened.path}, so their losses are of other tokens\n"
            "       compare them in bits per byte: nanogpt-jax eval"
        )
    if other and other.cfg.model.block_size < n:
        most = other.cfg.model.block_size
        raise UserError(f"--versus={other.path} sees {most} tokens at once, and the text has {n}: give a shorter one")


def _check_places(asked: Options, opened: Run) -> Path:
    """Where the page goes; UserError if it, or what goes beside it, cannot be written."""
    if asked.npz:
        cli.check_file("--npz", asked.npz)
    return cli.check_page(asked.out, opened.path / ATTENTION_PAGE)


def _bytes(opened: Run, token: int) -> bytes:
    return opened.tokenizer.decode_bytes([token])


# ---- what is computed -----------------------------------------------------------------------------------------------


def _for_watching(cfg: ModelConfig) -> ModelConfig:
    """`cfg` for one forward pass: a scan over the layers, as that compiles in a third of the time and runs once."""
    import jax

    from nanogpt_jax.model import execution

    plain = dataclasses.replace(cfg, attention="reference", dropout=0.0, remat="none", scan_unroll=1)
    return execution.resolve(plain, jax.default_backend())


def _compiled(opened: Run, T: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`watching.watch` (params, tokens [T]) and `watching.lens` (params, seen), compiled for the run's model."""
    import jax

    from nanogpt_jax.model import gpt2, watching

    cfg, shapes = _for_watching(opened.cfg.model), gpt2.param_shapes(opened.cfg.model)
    watch = watching.watch.lower(cfg, shapes, jax.ShapeDtypeStruct((T,), np.int32))
    lens = watching.lens.lower(cfg, shapes, watch.out_info, min(LIKELIEST, cfg.vocab_size))
    return watch.compile(), lens.compile()


def _watched(
    opened: Run, params: Any, step: int, ids: list[int], watch: Callable[..., Any], lens: Callable[..., Any]
) -> Watched:
    seen = watch(params, np.array(ids, np.int32))
    logits = _finite(np.asarray(seen.logits)[:, : opened.cfg.model.vocab_size], opened, step)
    read = lens(params, seen)
    return Watched(
        tokens=ids,
        scores=np.asarray(seen.scores),
        weights=np.asarray(seen.weights, np.float32),
        value_norms=np.asarray(seen.value_norms),
        losses=attention.losses(logits, np.array(ids)),
        likeliest=np.asarray(read.likeliest),
        probability=np.asarray(read.probability),
        divergence=np.asarray(read.divergence),
    )


def _finite(logits: np.ndarray, opened: Run, step: int) -> np.ndarray:
    if not np.isfinite(logits).all():
        raise UserError(f"{opened.path} at step {step} gives logits that are not finite: it has diverged")
    return logits


def _other(other: Run, ids: list[int]) -> Other:
    from nanogpt_jax.model import gpt2

    params, step = other.load()
    logits = gpt2.forward(_for_watching(other.cfg.model), params, np.array([ids], np.int32))[0]  # pyright: ignore
    logits = _finite(np.asarray(logits)[:, : other.cfg.model.vocab_size], other, step)
    return Other(str(other.path), step, attention.losses(logits, np.array(ids)))


def _word(word: str, opened: Run, params: Any, sentences: list[tuple[list[int], int]]) -> Word:
    """The word's vectors, and those of all tokens of the sentences and of texts that the model writes.

    Those texts are always to be had, without the data that the run was trained on.
    """
    from nanogpt_jax.inference.generate import Rules
    from nanogpt_jax.inference.sampler import generate_text
    from nanogpt_jax.model import watching

    cfg = _for_watching(opened.cfg.model)
    longest = max(len(ids) for ids, _ in sentences)
    T = min(cfg.block_size, MOST, max(longest, LEAST))
    T = max(T, longest)
    rules, prompts = Rules(), [""] * TEXTS
    written = generate_text(
        opened.cfg.model, params, opened.tokenizer, prompts, rules=rules, max_new_tokens=T, seed=SEED
    )
    texts = [ids for text in written if (ids := opened.tokenizer.encode(text).tolist()[:T])]

    def vectors(ids: list[int]) -> np.ndarray:
        """[L+2, n, C]: the embeddings alone, with their positions, after each layer."""
        padded = np.array(ids + [0] * (T - len(ids)), np.int32)  # one program for all lengths; the model is causal
        hidden = np.asarray(watching.watch(cfg, params, padded).hidden, np.float32)[:, : len(ids)]  # pyright: ignore
        return np.concatenate([np.asarray(params["wte"][padded[: len(ids)]], np.float32)[None], hidden])

    of_sentences = [vectors(ids) for ids, _ in sentences]
    others = np.concatenate([*of_sentences, *map(vectors, texts)], axis=1)
    ids = np.concatenate([*(ids for ids, _ in sentences), *texts])
    mine = np.stack([x[:, position] for x, (_, position) in zip(of_sentences, sentences, strict=True)], axis=1)
    found = attention.cosines(mine, others, ids, SEED)
    pieces = [[_bytes(opened, token) for token in ids] for ids, _ in sentences]
    return Word(word, pieces, [position for _, position in sentences], found, len(ids), len(texts), SEED)


# ---- beside the page ------------------------------------------------------------------------------------------------


def _npz(seen: Watched) -> bytes:
    names = ("weights", "scores", "value_norms", "losses")
    content = io.BytesIO()
    np.savez(content, tokens=np.array(seen.tokens, np.int32), **{name: getattr(seen, name) for name in names})
    return content.getvalue()


def _picture(plt: Any, weights: np.ndarray, names: list[str], asked: Options) -> bytes:
    """weights [T, T] of one head as a picture, with the tokens beside it if they can be read."""
    T = len(weights)
    side = min(12.0, max(4.0, 0.22 * T + 1.5))
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    shade = np.ma.masked_where(~np.tri(T, dtype=bool), np.sqrt(weights))
    axis.set_facecolor("#e4e7ea")  # what is masked is no small weight
    drawn = axis.imshow(shade, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(drawn, ax=axis, shrink=0.6, ticks=np.sqrt([0, 0.01, 0.1, 0.25, 0.5, 1]))
    bar.ax.set_yticklabels(["0", "0.01", "0.1", "0.25", "0.5", "1"])
    if T <= 48:
        names = [name.replace("$", r"\$") for name in names]
        axis.set_xticks(range(T), names, rotation=90, fontfamily="monospace")
        axis.set_yticks(range(T), names, fontfamily="monospace")
    axis.set_title(f"layer {asked.layer}, head {asked.head}: attention weights (gray: masked)", fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format=cli.format_of(asked.picture or ""))
    plt.close(figure)
    return content.getvalue()
