"""Text from a model: prompts of any length in one batch, stop strings, streaming, and generation past the context.

GPT-2's positions are learned: if a window moves by one token, every token gets another position, and the cache becomes
invalid. So when a row has filled its context, it continues from its last block_size // 2 tokens, with one prefill. Rows
of a batch fill up and slide at different times.
"""

import codecs
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from nanogpt_jax.config import ModelConfig, UserError
from nanogpt_jax.data.tokenizer import Tokenizer, check_fit
from nanogpt_jax.inference import generate
from nanogpt_jax.inference.generate import Rules
from nanogpt_jax.model import execution, gpt2

CHUNK = 16  # most tokens in one call to the device; few enough that even a slow model streams


def generate_text(
    cfg: ModelConfig,
    params: gpt2.Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    rules: Rules,
    max_new_tokens: int,
    seed: int,
    stop: tuple[str, ...] = (),
) -> list[str]:
    """A continuation of each prompt, without the prompt, cut before the first stop string."""
    texts = [""] * len(prompts)
    for row, piece in stream_text(
        cfg, params, tokenizer, prompts, rules=rules, max_new_tokens=max_new_tokens, seed=seed, stop=stop
    ):
        texts[row] += piece
    return texts


def stream_text(
    cfg: ModelConfig,
    params: gpt2.Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    rules: Rules,
    max_new_tokens: int,
    seed: int,
    stop: tuple[str, ...] = (),
) -> Iterator[tuple[int, str]]:
    """(row, piece) as text is generated; the pieces of a row join to the continuation of its prompt.

    If a prompt is longer than the context, its last block_size tokens are used. If it is empty, a new text begins.
    """
    assert prompts, "nothing to continue"
    assert max_new_tokens >= 1, f"max_new_tokens={max_new_tokens}"
    assert all(stop), "an empty stop string is in every text"
    check_fit(tokenizer, cfg.vocab_size)
    cfg = dataclasses.replace(execution.resolve(cfg, jax.default_backend()), vocab_size=tokenizer.n_vocab)
    params = generate.for_decoding(cfg, params)
    rows = [_Row(prompt_ids(tokenizer, p)[-cfg.block_size :], max_new_tokens, tokenizer, stop) for p in prompts]
    longest = max(len(row.ids) for row in rows) + max_new_tokens
    S = cache_length(longest, cfg.block_size)
    slides = longest > cfg.block_size
    random, count, state = np.uint32(seed), 0, None
    while active := [row for row in rows if not row.done]:
        room = S - max(row.cached for row in active)
        if state is None or room == 0:
            tokens, lengths, seen = _windows(cfg, rules, rows, S, least=cfg.block_size // 2 if slides else 1)
            tokens, state, finite = generate.prefill(
                cfg, rules, params, tokens, lengths, seen, random, np.int32(count), cache_length=S
            )
            if not finite:
                raise UserError("the model gives logits that are not finite: it has diverged")
            steps = 1
        else:
            steps = min(CHUNK, room, max_new_tokens - count)
            tokens, state = generate.decode(
                cfg, rules, params, state, random, np.int32(count), np.int32(steps), chunk=CHUNK
            )
        count += steps
        for index, (row, new) in enumerate(zip(rows, jax.device_get(tokens)[:, :steps].tolist(), strict=True)):
            if piece := row.add(new):
                yield index, piece


def opening_and_continuation(
    cfg: ModelConfig, params: gpt2.Params, tokenizer: Tokenizer, opening: np.ndarray, seed: int
) -> str:
    """A few tokens of real text [N], up to the end of a document, and a continuation of 300 tokens."""
    ends = np.flatnonzero(opening == tokenizer.end_of_text)
    prompt = tokenizer.decode(opening[: ends[0]] if len(ends) else opening)
    return prompt + generate_text(cfg, params, tokenizer, [prompt], rules=Rules(), max_new_tokens=300, seed=seed)[0]


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids, at least one: an empty prompt becomes end-of-text or, without that token, a newline."""
    ids = tokenizer.encode(prompt).tolist()
    if ids:
        return ids
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode("\n").tolist()
    except UserError:  # a vocabulary without newline
        return [0]


class _Row:
    """One text in progress: tokens in, text out."""

    def __init__(self, ids: list[int], max_new_tokens: int, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self.ids = ids  # prompt and output
        self.start = 0  # where its window in the context begins
        self.text = ""
        self.done = False
        self._settled = 0  # characters that cannot be part of a stop string, whatever follows
        self._left = max_new_tokens
        self._tokenizer = tokenizer
        self._stop = stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # holds half a character until the next token

    @property
    def cached(self) -> int:
        """Number of tokens of its window in the cache: all but the last."""
        return len(self.ids) - 1 - self.start

    def add(self, tokens: list[int]) -> str:
        """Append tokens until the row is done -> the text that has become certain."""
        before = self._settled
        for token in tokens:
            if self.done:
                break
            self._add(token)
        return self.text[before : self._settled]

    def _add(self, token: int) -> None:
        self.ids.append(token)
        self._left -= 1
        ended = token == self._tokenizer.end_of_text
        self.done = ended or self._left == 0
        self.text += self._utf8.decode(b"" if ended else self._tokenizer.decode_bytes([token]), final=self.done)
        found = [at for s in self._stop if (at := self.text.find(s, self._settled)) >= 0]
        if found:
            self.text, self.done = self.text[: min(found)], True
        # hold back the longest suffix that may begin a stop string
        begun = (n for s in self._stop for n in range(1, len(s)) if self.text.endswith(s[:n]))
        self._settled = len(self.text) - (0 if self.done else max(begun, default=0))


def _windows(cfg: ModelConfig, rules: Rules, rows: list[_Row], S: int, least: int):
    """The input of `prefill`: tokens [B, P] padded on the right, lengths [B], seen [B, V] or None.

    P is at least `least`, so that later slides use the same program as the prompt.
    """
    for row in rows:
        if row.cached >= S:  # full: slide. Others keep their windows, so that rows are independent
            row.start = len(row.ids) - max(1, cfg.block_size // 2)
    windows = [row.ids[-1:] if row.done else row.ids[row.start :] for row in rows]
    lengths = np.array([len(window) for window in windows], np.int32)
    tokens = np.zeros((len(rows), bucket(max(least, *lengths.tolist()), S)), np.int32)
    for b, window in enumerate(windows):
        tokens[b, : len(window)] = window
    if rules.repetition_penalty == 1:
        return tokens, lengths, None
    seen = np.zeros((len(rows), cfg.padded_vocab_size), bool)
    for b, row in enumerate(rows):
        seen[b, row.ids] = True
    return tokens, lengths, seen


def cache_length(n: int, most: int) -> int:
    """n positions, rounded up by at most an eighth, as every step reads the whole cache; at most `most`."""
    step = max(16, bucket(n, 2 * most) // 16)
    return min(most, -(-n // step) * step)


def bucket(n: int, most: int) -> int:
    """The next power of two, from 16 to `most`, so that few shapes are compiled, whatever the prompts."""
    return min(most, max(16, 1 << (n - 1).bit_length()))
