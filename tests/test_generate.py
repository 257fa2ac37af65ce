"""The laws of the inference room: the cache changes nothing, a seed is a text, and no half of anything is shown."""

import concurrent.futures
import gzip
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refused
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config, ModelConfig
from nanogpt_jax.data import tokenizer as tokenizers
from nanogpt_jax.data.tokenizer import CharTokenizer, Tokenizer
from nanogpt_jax.inference import generate, native, sampler
from nanogpt_jax.inference.generate import Rules
from nanogpt_jax.inference.sampler import CHUNK, generate_text, stream_text
from nanogpt_jax.model import decoding, execution, gpt2

quick = settings(max_examples=30, deadline=None)
LETTERS = CharTokenizer.make("\n abcdefghijklmnopqrstuvwxyz")
CFG = ModelConfig(
    block_size=16, vocab_size=LETTERS.n_vocab, n_layer=2, n_head=2, n_embd=16, bias=True, attention="reference"
)
DEFAULTS = {"rules": Rules(), "max_new_tokens": 50, "seed": 7}
PROMPTS = ["a", "hello", "the quick brown"]  # 1, 5 and 15 of 16 positions


def random_params(cfg: ModelConfig) -> gpt2.Params:
    """Weights ten times as large as GPT-2's: a model with preferences, so that a wrong logit shows in the text."""
    shapes = jax.eval_shape(lambda: gpt2.init_params(cfg, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=0.2, size=p.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def params() -> gpt2.Params:
    return random_params(CFG)


@pytest.fixture(scope="module")
def gpt2_tokenizer() -> Tokenizer:
    return tokenizers.make("gpt2", "")


@partial(jax.jit, static_argnums=0)
def full_forward(cfg: ModelConfig, params: gpt2.Params, tokens: jax.Array) -> jax.Array:
    return gpt2.forward(replace(cfg, scan_unroll=1), params, tokens)


def logits_after(params: gpt2.Params, ids: list[int]) -> jax.Array:
    """[1, V]: the full forward on a window, nothing cached."""
    padded = np.zeros((1, CFG.block_size), np.int32)
    padded[0, : len(ids)] = ids
    return full_forward(CFG, params, padded)[:, len(ids) - 1]


def text_of(params: gpt2.Params, prompts: list[str], n: int = 50, **more) -> list[str]:
    return generate_text(CFG, params, LETTERS, prompts, **(DEFAULTS | {"max_new_tokens": n} | more))


def test_a_model_whose_weights_are_finite_and_too_large_is_refused(params):
    with pytest.raises(config.UserError, match="gives logits that are not finite: it has diverged"):
        text_of(jax.tree.map(lambda p: p * 1e37, params), ["hello"], 3)


# ---- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("B", [1, 3])
def test_cached_decode_equals_the_full_forward_at_every_position(params, B):
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (B, CFG.block_size), np.int32)
    expected = full_forward(CFG, params, tokens)[..., : CFG.vocab_size]
    lengths = np.array([1, 5, 11][:B], np.int32)
    apart = generate.for_decoding(CFG, params)
    prompts = np.where(np.arange(12) < lengths[:, None], tokens[:, :12], 3)  # whatever stands in the padding
    prefill = jax.jit(decoding.prefill, static_argnums=0)
    logits, cache = prefill(CFG, apart, prompts, lengths, decoding.init_cache(CFG, B, CFG.block_size))
    step = jax.jit(decoding.decode_step, static_argnums=0)
    for _ in range(CFG.block_size):
        at = np.asarray(cache.length) - 1
        for b in np.flatnonzero(at < CFG.block_size):  # shorter rows go on when the longest is full
            np.testing.assert_allclose(logits[b, : CFG.vocab_size], expected[b, at[b]], atol=1e-4, rtol=0)
        following = tokens[np.arange(B), np.minimum(at + 1, CFG.block_size - 1)]
        logits, cache = step(CFG, apart, following, cache)
    assert (np.asarray(cache.length) > CFG.block_size).all()


def test_python_looks_through_a_layer_once(params, monkeypatch):
    seen = []
    plain = gpt2.attention.cached
    monkeypatch.setattr(gpt2.attention, "cached", lambda q, *rest: seen.append(q.shape) or plain(q, *rest))
    cache = decoding.init_cache(CFG, 7, CFG.block_size)  # 7 texts in no other test: traces are kept
    apart, tokens = generate.for_decoding(CFG, params), np.zeros(7, np.int32)
    jax.jit(decoding.decode_step, static_argnums=0).lower(CFG, apart, tokens, cache)
    assert seen == [(14, 1, 8)]


def oracle(params: gpt2.Params, prompt: str, row: int, n: int, rules: Rules, seed: int) -> str:
    """What the row must say: the full forward on its own window for every token, the window sliding as documented."""
    key = jax.random.fold_in(jax.random.key(seed), row)
    window, text = LETTERS.encode(prompt).tolist(), []
    for count in range(n):
        if len(window) > CFG.block_size:
            window = window[-(CFG.block_size // 2) :]
        logits = logits_after(params, window)
        token = int(generate.choose(rules, logits, None, jax.random.fold_in(key, count)[None])[0])
        window.append(token)
        text.append(token)
    return LETTERS.decode(text)


@given(n=st.integers(1, 5000), most=st.integers(1, 5000))
@quick
def test_a_cache_has_room_and_little_more(n, most):
    S = sampler.cache_length(n, most)
    assert min(n, most) <= S <= min(most, max(1.125 * n, n + 15))


def test_a_long_prompt_in_a_cache_that_is_no_power_of_two(params):
    """70 + 10 positions are a cache of 80, and the prompt's next power of two would be 128."""
    long = replace(CFG, block_size=256)
    wide = {**params, "wpe": jnp.asarray(np.random.default_rng(1).normal(scale=0.2, size=(256, 16)), jnp.float32)}
    prompt = "the quick brown fox jumps over the lazy dog " * 2
    assert sampler.cache_length(70 + 10, 256) == 80
    more = {"rules": Rules(temperature=0), "max_new_tokens": 10, "seed": 7}
    (text,) = generate_text(long, wide, LETTERS, [prompt[:70]], **more)
    for n in range(10):
        logits = full_forward(long, wide, LETTERS.encode(prompt[:70] + text[:n])[None])[0, -1, : long.vocab_size]
        assert LETTERS.decode([int(logits.argmax())]) == text[n]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_ragged_rows_far_past_the_context_say_what_the_full_forward_says(params, temperature):
    rules = Rules(temperature=temperature)
    texts = text_of(params, PROMPTS, 60, rules=rules)
    assert texts == [oracle(params, prompt, row, 60, rules, 7) for row, prompt in enumerate(PROMPTS)]
    assert len(set(texts)) == 3


def test_after_a_slide_the_logits_are_those_of_the_rows_own_window(params, monkeypatch):
    windows, prefill = [], generate.prefill

    def recorded(cfg, rules, apart, tokens, lengths, *rest, **more):
        logits, _ = decoding.prefill(
            cfg, apart, tokens, lengths, decoding.init_cache(cfg, len(tokens), more["cache_length"])
        )
        windows.append([(row[:n].tolist(), np.asarray(x)) for row, n, x in zip(tokens, lengths, logits, strict=True)])
        return prefill(cfg, rules, apart, tokens, lengths, *rest, **more)

    monkeypatch.setattr(generate, "prefill", recorded)
    texts = text_of(params, PROMPTS, 40)
    whole = [LETTERS.encode(p + t).tolist() for p, t in zip(PROMPTS, texts, strict=True)]
    assert len(windows) > 6  # the prompts, then three rows that slide apart
    for b, all_ids in enumerate(whole):
        end = 0
        for window in windows:
            ids, logits = window[b]
            ends = [e for e in range(max(end, len(ids)), len(all_ids) + 1) if all_ids[e - len(ids) : e] == ids]
            assert ends, "a window that is not of the row's own text"
            end = ends[0]
            np.testing.assert_allclose(
                logits[: CFG.vocab_size], logits_after(params, ids)[0, : CFG.vocab_size], atol=1e-4, rtol=0
            )


def test_the_same_seed_gives_the_same_text_alone_and_among_eight(params):
    others = ["b", "some words", "", "x" * 40, "the quick brown", "hello", "z"]
    alone = text_of(params, ["hello"])
    among = text_of(params, ["hello", *others])
    assert among[0] == alone[0] == text_of(params, ["hello"])[0]
    assert among[6] != alone[0], "two rows with one prompt must differ"
    assert text_of(params, ["hello"], seed=8) != alone


def test_greedy_is_the_argmax_of_the_full_forward(params):
    texts = text_of(params, PROMPTS, 10, rules=Rules(temperature=0))
    for prompt, text in list(zip(PROMPTS, texts, strict=True))[:2]:  # these stay within the context
        ids = LETTERS.encode(prompt + text)
        at = np.arange(len(prompt), len(ids))
        predicted = full_forward(CFG, params, np.pad(ids, (0, CFG.block_size - len(ids)))[None])[0].argmax(-1)
        np.testing.assert_array_equal(predicted[at - 1], ids[at])


def test_bfloat16_generates(params):
    cfg = replace(CFG, dtype="bfloat16")
    (text,) = generate_text(cfg, params, LETTERS, ["hello"], rules=Rules(), max_new_tokens=20, seed=1)
    assert len(text) == 20


# ---- the rules ------------------------------------------------------------------------------------------------------


def numpy_filter(rules: Rules, logits: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """One row, float64, by the words of the definition."""
    x = logits.astype(np.float64)
    x = np.where(seen, np.where(x > 0, x / rules.repetition_penalty, x * rules.repetition_penalty), x)
    x /= rules.temperature
    order = np.argsort(-x)
    if rules.top_k:
        x[order[rules.top_k :]] = -np.inf
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    if rules.top_p < 1:
        reached = np.cumsum(p[order])
        assume(np.abs(reached - rules.top_p).min() > 1e-4)  # where float32 may round to the other side
        x[order[np.argmax(reached >= rules.top_p) + 1 :]] = -np.inf
        p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    assume(np.abs(p / p.max() - rules.min_p).min() > 1e-4 or not rules.min_p)
    x[p < rules.min_p * p.max()] = -np.inf
    return x


@quick
@given(
    rules=st.builds(
        Rules,
        temperature=st.floats(0.1, 5),
        top_k=st.integers(0, 25),
        top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
        min_p=st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
        repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 3)),
    ),
    seed=st.integers(0, 1000),
)
def test_the_filters_equal_a_short_numpy_version(rules, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 20), scale=2).astype(np.float32)
    logits[:, -3:] = -np.inf  # the padding of a vocabulary
    seen = rng.random((2, 20)) < 0.4
    seen[:, -3:] = False
    got = np.asarray(generate.filter_logits(rules, jnp.array(logits), jnp.array(seen)))
    expected = np.stack([numpy_filter(rules, x, s) for x, s in zip(logits, seen, strict=True)])
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_draws_follow_the_tempered_softmax():
    logits, rules, n = jnp.array([2.0, 1.0, 0.0, -1.0]), Rules(temperature=0.5), 5000
    tokens = generate.choose(rules, jnp.tile(logits, (n, 1)), None, generate.row_keys(0, n))
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / n, jax.nn.softmax(logits / 0.5), atol=0.02)


def test_a_repetition_penalty_sees_prompt_and_output(params):
    ids = set(LETTERS.encode("hello"))
    new = LETTERS.encode(text_of(params, ["hello"], 15, rules=Rules(temperature=0.01, repetition_penalty=100))[0])
    assert len(set(new) | ids) == len(new) + len(ids), "with so high a price nothing is said twice"


def test_padded_ids_are_never_drawn(params):
    logits = jnp.tile(logits_after(params, [1, 2, 3]), (2000, 1))
    assert logits.shape[1] == 128
    tokens = generate.choose(Rules(temperature=100), logits, None, generate.row_keys(0, 2000))
    assert int(tokens.max()) == CFG.vocab_size - 1


def test_ids_for_which_the_tokenizer_has_no_text_are_never_drawn(params):
    more = jnp.full((384 - 128, CFG.n_embd), 50.0).at[::2].multiply(-1)  # one of them the likeliest, always
    larger = {**params, "wte": jnp.concatenate([params["wte"], more]).at[CFG.vocab_size : 128].set(more[:100])}
    cfg = replace(CFG, vocab_size=300)
    assert generate_text(cfg, larger, LETTERS, ["hello"], **DEFAULTS) == text_of(params, ["hello"])


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 18, 100])
def test_max_new_tokens_is_exact(params, n):
    assert [len(text) for text in text_of(params, PROMPTS, n)] == [n] * 3


def test_prompts_without_end_and_without_beginning(params):
    long = "abcdefghij" * 5
    assert text_of(params, [long]) == text_of(params, [long[-CFG.block_size :]])
    assert text_of(params, [""]) == text_of(params, ["\n"])


def test_an_empty_prompt_begins_as_a_text_begins(gpt2_tokenizer):
    assert sampler.prompt_ids(gpt2_tokenizer, "") == [50256]
    assert sampler.prompt_ids(CharTokenizer.make("xyz"), "") == [0]


def row_of(tokenizer: Tokenizer, n: int, stop: tuple[str, ...] = ()) -> sampler._Row:
    return sampler._Row([0], n, tokenizer, stop)


@quick
@given(
    text=st.text("ab ", min_size=1, max_size=30),
    stop=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
    chunk=st.integers(1, 5),
)
def test_stop_strings_are_never_shown_in_part(text, stop, chunk):
    row, shown = row_of(LETTERS, len(text), tuple(stop)), ""
    ids = LETTERS.encode(text).tolist()
    ends = [text.find(s) + len(s) for s in stop if s in text]
    expected = text[: min(ends, default=len(text))]  # as far as the model comes before it is stopped
    expected = expected[: min((at for s in stop if (at := expected.find(s)) >= 0), default=len(text))]
    for at in range(0, len(ids), chunk):
        shown += row.add(ids[at : at + chunk])
        assert expected.startswith(shown)
    assert row.done
    assert shown == row.text == expected


def test_a_stop_string_ends_the_text_and_the_stream(params):
    whole = text_of(params, PROMPTS, 60)
    stop = (whole[0][30:33], whole[2][10:12])
    texts = text_of(params, PROMPTS, 60, stop=stop)
    for text, full in zip(texts, whole, strict=True):
        assert text == full[: min((full.find(s) for s in stop if s in full), default=60)]
    assert len(texts[0]) <= 30
    assert len(texts[2]) <= 10


def test_half_a_character_waits_for_its_other_half(gpt2_tokenizer):
    text = "naïve 静けさ 🙂🙃 ñandú"
    ids = gpt2_tokenizer.encode(text).tolist()
    row = row_of(gpt2_tokenizer, len(ids))
    pieces = [row.add([token]) for token in ids]
    assert "" in pieces
    assert "".join(pieces) == row.text == text
    cut = row_of(gpt2_tokenizer, 1)  # what never got its other half shows as U+FFFD
    assert cut.add(gpt2_tokenizer.encode("🙂").tolist()) == cut.text == "\ufffd"


def test_text_is_streamed_piece_by_piece_and_pieces_are_whole_characters(gpt2_tokenizer):
    cfg = ModelConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=1, n_embd=8, bias=True)
    arguments = {"rules": Rules(temperature=100), "max_new_tokens": 80, "seed": 3}
    pieces = list(stream_text(cfg, random_params(cfg), gpt2_tokenizer, ["静", "a b c"], **arguments))
    assert {row for row, _ in pieces} == {0, 1}
    assert len(pieces) > 2 * 80 / CHUNK
    assert any(ord(c) > 127 for _, piece in pieces for c in piece)
    texts = generate_text(cfg, random_params(cfg), gpt2_tokenizer, ["静", "a b c"], **arguments)
    assert ["".join(piece for at, piece in pieces if at == row) for row in (0, 1)] == texts


def test_end_of_text_ends_a_row_and_the_last_row_ends_the_work(gpt2_tokenizer, monkeypatch):
    end = gpt2_tokenizer.end_of_text
    row = row_of(gpt2_tokenizer, 9)
    assert row.add([*gpt2_tokenizer.encode("so"), end, *gpt2_tokenizer.encode("more")]) == row.text == "so"
    assert row.done

    cfg = ModelConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=1, n_embd=8, bias=True)
    weights = random_params(cfg)
    weights["ln_f"]["bias"] += 100.0
    weights["wte"] = weights["wte"].at[end].set(10.0)  # the likeliest, whatever was said
    monkeypatch.setattr(generate, "decode", None)  # not needed: the first token is the last
    arguments = {"rules": Rules(temperature=0), "max_new_tokens": 1000, "seed": 0}
    assert generate_text(cfg, weights, gpt2_tokenizer, ["a", "b"], **arguments) == ["", ""]


# ---- the step in C --------------------------------------------------------------------------------------------------

in_c = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: every step is XLA's here")


def cache_of(cfg: ModelConfig, lengths: np.ndarray, S: int) -> decoding.Cache:
    rng = np.random.default_rng(1)
    shape = (len(lengths) * cfg.n_head, S, cfg.head_dim)
    k, v = ([jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(cfg.n_layer)] for _ in "kv")
    return decoding.Cache(k, v, jnp.asarray(lengths))


@in_c
@given(
    data=st.data(),
    heads=st.sampled_from([(1, 1), (2, 3), (3, 8), (4, 16), (5, 21)]),
    S=st.integers(1, 40),
    vocab_size=st.integers(1, 300),
    bias=st.booleans(),
)
@settings(deadline=None, max_examples=8)
@pytest.mark.long
def test_the_step_in_c_is_the_models(data, heads, S, vocab_size, bias):
    H, D = heads
    cfg = ModelConfig(40, vocab_size, n_layer=2, n_head=H, n_embd=H * D, bias=bias, decode="native")
    rows = st.lists(st.integers(0, S - 1), min_size=1, max_size=execution.NATIVE_TEXTS)
    lengths = np.array(data.draw(rows), np.int32)
    assert native.takes(cfg, len(lengths))
    params, cache = generate.for_decoding(cfg, random_params(cfg)), cache_of(cfg, lengths, S)
    token = np.arange(len(lengths), dtype=np.int32) % vocab_size
    expected = jax.jit(decoding.decode_step, static_argnums=0)(cfg, params, token, cache)
    ours = jax.jit(native.decode_step, static_argnums=0)(cfg, params, token, cache)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, H * D / 16), rtol=1e-5)


@in_c
def test_a_row_that_runs_over_writes_nowhere_else():
    cfg = replace(CFG, n_layer=1, decode="native")
    assert native.takes(cfg, 2)
    cache, params = cache_of(cfg, np.array([12, 3], np.int32), 8), generate.for_decoding(cfg, random_params(cfg))
    _, after = jax.jit(native.decode_step, static_argnums=0)(cfg, params, np.zeros(2, np.int32), cache)
    changed = np.argwhere(np.asarray(after.k[0] != cache.k[0]).any(-1)).tolist()
    assert changed == [[0, 7], [1, 7], [2, 3], [3, 3]]


WIDE = replace(
    CFG, n_embd=256, n_head=4, decode="native"
)  # more than a million weights: a share for a second thread, if there is one


@in_c
@pytest.mark.parametrize("B", [1, 3])
def test_threads_share_a_step_after_they_slept_and_beside_a_model_that_needs_one(B):
    lengths = np.arange(1, B + 1, dtype=np.int32)
    assert native.takes(WIDE, B)
    steps = []
    for cfg in (WIDE, CFG, WIDE):
        params, cache = generate.for_decoding(cfg, random_params(cfg)), cache_of(cfg, lengths, 16)
        expected, step = (jax.jit(f.decode_step, static_argnums=0) for f in (decoding, native))
        for _ in range(10):
            time.sleep(0.003)  # a helper falls asleep after one millisecond
            steps.append((step(cfg, params, lengths, cache)[0], expected(cfg, params, lengths, cache)[0]))
    for ours, theirs in steps:
        scale = np.abs(theirs[:, : LETTERS.n_vocab]).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5, rtol=0)


@in_c
def test_two_programs_may_step_at_once():
    params = random_params(WIDE)

    def text(prompt: str) -> list[str]:
        return [generate_text(WIDE, params, LETTERS, [prompt], **(DEFAULTS | {"max_new_tokens": 20}))[0] for _ in "ab"]

    assert native.takes(WIDE, 1)
    alone = [text(prompt) for prompt in PROMPTS[:2]]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert list(threads.map(text, PROMPTS[:2])) == alone


@in_c
def test_the_function_is_built_once_and_again_where_it_was_damaged(tmp_path):
    """Loading a file that was cut off would end the process."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        assert native._library()
        (path,) = tmp_path.iterdir()
        whole, built = path.read_bytes(), path.stat().st_mtime_ns
        assert native._library()
        assert path.stat().st_mtime_ns == built
        for damaged in (b"", whole[: len(whole) // 2], whole[:-1]):
            path.write_bytes(damaged)
            assert native._library()
            assert path.read_bytes() == whole
        path.chmod(0o646)  # what others may write is not loaded, nor what a link of theirs leads to
        assert not native._is_own(path)
        path.chmod(0o644)
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        assert not native._is_own(path)
        assert native._library()
        assert native._is_own(path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("compiler", ["", "no-such-compiler", "false", 'cc "'])
def test_without_a_compiler_a_step_is_xlas(compiler, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    assert native._register.__wrapped__() is False


def test_without_a_place_to_build_a_step_is_xlas(monkeypatch, tmp_path):
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path / "gone"))
    monkeypatch.setattr(native, "COMMON", f"{native.COMMON} -DNOT_BUILT_BEFORE")
    assert native._register.__wrapped__() is False


def test_what_the_c_function_is_not_for(monkeypatch):
    monkeypatch.setattr(native, "_registered", lambda: True)
    cfg = replace(CFG, decode="native")
    assert native.takes(cfg, 1)
    assert not native.takes(cfg, execution.NATIVE_TEXTS + 1)
    assert not native.takes(replace(cfg, dtype="bfloat16"), 1)
    assert not native.takes(replace(cfg, decode="xla"), 1)


@pytest.mark.parametrize(
    ("settings", "platform", "expected"),
    [
        ({}, "cpu", "xla"),  # XLA's step is as fast for a small model, and needs no compiler
        ({"n_embd": 384, "n_layer": 6}, "cpu", "native"),
        ({"n_embd": 384, "n_layer": 6}, "gpu", "xla"),
        ({"n_embd": 384, "n_layer": 6, "dtype": "bfloat16"}, "cpu", "xla"),
        ({"n_embd": 384, "n_layer": 6, "decode": "xla"}, "cpu", "xla"),
        ({"decode": "native"}, "cpu", "native"),
    ],
)
def test_which_models_the_c_function_is_for(settings, platform, expected):
    assert execution.resolve(ModelConfig(vocab_size=65, **settings), platform).decode == expected


# ---- sample.py ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, params) -> Path:
    from nanogpt_jax.run.checkpoint import Checkpointer

    folder = tmp_path_factory.mktemp("runs") / "letters"
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json(Config(model=CFG)))
    LETTERS.save(folder / "tokenizer")
    with Checkpointer(folder, keep=2) as checkpoints:
        opt_state = optax.sgd(0.1).init(params)
        checkpoints.save(3, {"params": params, "opt_state": opt_state}, {"best_val_loss": 2.0}, 2.0)
    return folder


def sample(*argv: object) -> int:
    return cli.guarded(cli.door("sample").main, [str(a) for a in argv])


def test_sample_prints_prompt_and_continuation(run, params, capsys):
    assert sample(run, "--prompt=hello", "--max_new_tokens", 30, "--seed", 7) == 0
    assert capsys.readouterr().out == "hello" + text_of(params, ["hello"], 30)[0] + "\n"
    assert sample(run, "--prompt=hello", "--max-new-tokens=30", "--seed=7", "--num-samples=3") == 0
    texts = text_of(params, ["hello"] * 3, 30)
    assert capsys.readouterr().out == "".join(f"--- sample {i} ---\nhello{t}\n" for i, t in enumerate(texts, start=1))


def test_sample_takes_a_prompt_file_to_the_letter_and_says_what_it_cuts(run, params, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"abcdefghij\nabcdefghij\n")
    assert sample(run, "--prompt-file", file, "--max-new-tokens=5", "--seed=7") == 0
    out, err = capsys.readouterr()
    assert out == file.read_text() + text_of(params, [file.read_text()], 5)[0] + "\n"
    assert err == "note: of the prompt's 22 tokens the model sees the last 16, its context\n"


def test_sample_says_from_which_run_when_it_was_given_none(run, params, monkeypatch, capsys):
    (run.parent / "runs").mkdir(exist_ok=True)
    shutil.copytree(run, run.parent / "runs" / "last")
    monkeypatch.chdir(run.parent)
    assert sample("--prompt=hello", "--max-new-tokens=5", "--seed=7") == 0
    out, err = capsys.readouterr()
    assert out == "hello" + text_of(params, ["hello"], 5)[0] + "\n"
    assert err == "from runs/last, step 3:\n"


def test_sample_says_that_samples_at_temperature_0_are_alike(run, params, capsys):
    assert sample(run, "--prompt=hello", "--max-new-tokens=5", "--temperature=0", "--num-samples=2") == 0
    assert capsys.readouterr().err == "note: at temperature 0 all samples are alike\n"


WRONG = {
    "nowhere": "no run nowhere\n       train one first: nanogpt-jax train",
    "{run} {run}": "one run at a time, but got {run} and {run}\n       a text to go on from is --prompt TEXT",
    "{runs}": "{runs} is a folder of runs; name one: {run}",
    "{run}/config.json": "{run}/config.json is a file",
    "{run}/tokenizer": "{run}/tokenizer is not a run directory: it has no config.json",
    "{run} --temprature 1": "unknown flag --temprature\n       did you mean --temperature?",
    "{run} --temp 1": "unknown flag --temp\n       did you mean --temperature?",
    "{run} --prompt Q": "character 'Q' at position 0 is not among the 28 characters",
    "{run} --top-p 0": "--top-p=0.0 must lie in (0, 1]",
    "{run} --top_p 1.5": "--top-p=1.5 must lie in (0, 1]",
    "{run} --top-p nan": "--top-p=nan must lie in (0, 1]",
    "{run} --min-p 1": "--min-p=1.0 must lie in [0, 1)",
    "{run} --temperature -1": "--temperature=-1.0 must be 0 (always the likeliest token) or lie in [0.001, 100]",
    "{run} --temperature hot": "--temperature=hot must be a number",
    "{run} --repetition-penalty 0": "--repetition-penalty=0.0 must lie in [0.01, 100]",
    "{run} --top-k -1": "--top-k=-1 must not be negative",
    "{run} --num-samples 0": "--num-samples=0 must be at least 1",
    "{run} --max-new-tokens 0": "--max-new-tokens=0 must be at least 1",
    "{run} --seed -1": "--seed=-1 must lie in [0, 2**32)",
    "{run} --stop=": "--stop= needs a text",
    "{run} --prompt": "--prompt needs a value; see --help",
    "{run} --prompt-file nowhere.txt": "cannot read --prompt-file=nowhere.txt: No such file or directory",
    "{run} --prompt-file {run}": "cannot read --prompt-file={run}: Is a directory",
    "{run} --prompt-file empty": "--prompt-file=empty is empty",
    "{run} --prompt-file latin1": "--prompt-file=latin1 is not UTF-8 text",
    "{run} --prompt-file rows.parquet": "--prompt-file=rows.parquet is not text but Parquet\n       give the text",
    "{run} --prompt-file r.PARQUET.gz": "--prompt-file=r.PARQUET.gz is not text but Parquet\n       unpack it first: "
    "gunzip -c < r.PARQUET.gz > r.PARQUET; then give the text",
    "{run} --prompt a --prompt-file empty": "--prompt and --prompt-file=empty exclude each other",
    "{run} --checkpoint 4": "{run} has no checkpoint 4; it has 3, best and latest",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_named_and_exits_with_2(run, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    Path("latin1").write_bytes(b"\xe9t\xe9")
    Path("rows.parquet").write_bytes(b"PAR1\x15\0")
    Path("r.PARQUET.gz").write_bytes(gzip.compress(b"PAR1\x15\0"))
    err = refused(cli.door("sample").main, arguments.format(run=run, runs=run.parent), capsys)
    assert err.startswith("error: " + WRONG[arguments].format(run=run, runs=run.parent))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "config.json is damaged"),
        ("config.json", b'{"model": {"n_layers": 3}}', "unknown setting model.n_layers"),
        ("tokenizer/characters.txt", b"abc", "characters.txt is damaged"),
        ("tokenizer/tokenizer.json", b"[]", "tokenizer.json is damaged"),
        ("tokenizer/tokenizer.json", None, "no tokenizer in"),
        ("checkpoints/3/params/_METADATA", b"{}", "checkpoints/3 is damaged"),
        ("checkpoints/3/params", None, "checkpoints/3 is damaged"),
        ("checkpoints", None, "has no checkpoint yet"),
    ],
)
def test_a_damaged_run_is_named(run, file, content, message, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / file
    assert path.exists()
    if content is not None:
        path.write_bytes(content)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    refused(cli.door("sample").main, [copy, "--max-new-tokens=1"], capsys, message)


def test_a_tokenizer_of_another_run_is_named(params):
    with pytest.raises(config.UserError, match="the tokenizer has 30 tokens, the model only 28"):
        generate_text(CFG, params, CharTokenizer.make(LETTERS.stored.decode() + "äö"), ["a"], **DEFAULTS)


def test_a_typo_is_reported_before_jax_is_imported(run):
    program = (
        "import sys; from nanogpt_jax import cli; print(cli.guarded(cli.door('sample').main), 'jax' in sys.modules)"
    )
    argv = [sys.executable, "-c", program, str(run), "--prompt=Q"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
