"""GPT-2's weights in and out: bit for bit, with their tokenizers; training that starts from them; errors."""

import contextlib
import functools
import itertools
import json
import math
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from helpers import load, make_state, refusal, refused
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as TheirTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanogpt_jax import cli, config
from nanogpt_jax.cli import door
from nanogpt_jax.commands import huggingface
from nanogpt_jax.config import DataConfig, ModelConfig, OptimConfig
from nanogpt_jax.data import tokenizer as tokenizers
from nanogpt_jax.data.dataset import open_data
from nanogpt_jax.distributed.mesh import make_mesh
from nanogpt_jax.interop import check, transformers_files, vocabulary, weights
from nanogpt_jax.model import execution, gpt2
from nanogpt_jax.training.optim import OPTIMIZERS, make_optimizer, with_frozen

FIXTURE = Path(__file__).parent / "fixtures" / "gpt2_odd.safetensors"
TEXT = "El gato negro persigue al ratón gris; el ratón huye del gato. " * 40
V = 300  # 256 bytes, 43 merges, the end of the text
ABOUT = {"model_type": "gpt2", "n_positions": 19, "vocab_size": V, "n_layer": 3, "n_head": 5, "n_embd": 20}
CFG = ModelConfig(block_size=19, vocab_size=V, n_layer=3, n_head=5, n_embd=20, bias=True)


def arrays() -> dict[str, np.ndarray]:
    """The tensors of a GPT2LMHeadModel that PyTorch made, with more rows in its vocabulary."""
    found = {n.removeprefix("weight."): a for n, a in load_file(FIXTURE).items() if n.startswith("weight.")}
    more = np.random.default_rng(0).normal(0, 0.2, (V - len(found["wte.weight"]), 20)).astype(np.float32)
    found["wte.weight"] = np.concatenate([found["wte.weight"], more])
    found["wte.weight"][-1, 0] = -0.0
    return found


def trained_tokenizer(text: str, size: int) -> TheirTokenizer:
    """As `train_new_from_iterator` makes them: the end of the text is token 0."""
    made = TheirTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    made.train_from_iterator(
        [text],
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),  # pyright: ignore
    )
    return made


def own_tokenizer(size: int = V) -> tokenizers.GPT2Tokenizer:
    """Byte pairs of TEXT in GPT-2's order: bytes, merges, the end of the text."""
    numbers = " ".join(str(n) for n in range(200))
    theirs = json.loads(trained_tokenizer(TEXT + numbers, size).to_str())["model"]["merges"]
    assert len(theirs) == size - 257
    byte_of = {symbol: byte for byte, symbol in tokenizers.byte_symbols().items()}
    tokens = [bytes([b]) for b in tokenizers.byte_symbols()]
    tokens += [bytes(byte_of[c] for c in "".join(pair)) for pair in theirs]
    return tokenizers.GPT2Tokenizer(vocabulary._rank_file({token: rank for rank, token in enumerate(tokens)}))


def write_model(folder: Path, tensors: dict[str, np.ndarray] | None = None, **about: object) -> Path:
    """A model's directory with a tokenizer, as transformers would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**ABOUT, **about}))
    save_file(arrays() if tensors is None else tensors, folder / "model.safetensors")
    for name, text in vocabulary.tokenizer_files(own_tokenizer(), 19).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def assert_bits_equal(a: Any, b: Any) -> None:
    def same(x, y):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())

    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(same, a, b)


def command_of(words: list[str]) -> int:
    """`nanogpt-jax WORDS`, in this process."""
    name, *rest = words
    return {"import-hf": huggingface.main_import, "export-hf": huggingface.main_export}[name]([*rest, "--no-compare"])


def command(*words: str | Path) -> int:
    return cli.guarded(command_of, [str(word) for word in words])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """hf/ a model in transformers' files, run/ made of it by import-hf, out/ by export-hf from that."""
    folder = tmp_path_factory.mktemp("interop")
    write_model(folder / "hf")
    assert command("import-hf", folder / "hf", folder / "run") == 0
    assert command("export-hf", folder / "run", folder / "out") == 0
    return folder


# ---- weights --------------------------------------------------------------------------------------------------------


def test_an_imported_model_has_transformers_logits(place):
    cfg = config.read_json(place / "run" / "config.json")
    params, step = load(place / "run")
    expected = load_file(FIXTURE)
    cfg = execution.resolve(cfg.model, "cpu")
    logits = jax.jit(gpt2.forward, static_argnums=0)(cfg, params, expected["tokens"][:, :-1])
    np.testing.assert_allclose(logits[..., :131], expected["logits"], rtol=0, atol=1e-4)
    assert step == 0


def test_import_then_export_and_export_then_import_are_bit_for_bit(place):
    written = load_file(place / "out" / "model.safetensors")
    assert_bits_equal({n.removeprefix("transformer."): a for n, a in written.items()}, arrays())
    assert command("import-hf", place / "out", place / "again") == 0
    runs = [load(place / r)[0] for r in ("run", "again")]
    assert_bits_equal(*runs)
    assert config.read_json(place / "again" / "config.json").model == CFG
    assert (place / "again/tokenizer/ranks.tiktoken").read_bytes() == own_tokenizer().stored


def prefixed(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    masks = {f"transformer.h.{i}.attn.bias": np.ones((1, 1, 19, 19), np.float32) for i in range(3)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": np.full((), -1e4, np.float32) for i in range(3)}
    head = {"lm_head.weight": tensors["wte.weight"]}
    save_file({**{f"transformer.{n}": a for n, a in tensors.items()}, **masks, **head}, folder / "model.safetensors")


def in_shards(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(places.values()):
        save_file({n: a for n, a in tensors.items() if places[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def wrapped(mark: str) -> Callable:
    """With the names that torch.compile, DDP and others leave, around the model or inside it."""
    return lambda folder, tensors: save_file(
        {mark.replace("*", n) if "*" in mark else n.replace(".", f".{mark}.", 1): a for n, a in tensors.items()},
        folder / "model.safetensors",
    )


def narrow(dtype: Any) -> Callable:
    return lambda folder, tensors: save_file(
        {n: a.astype(dtype) for n, a in tensors.items()}, folder / "model.safetensors"
    )


@pytest.mark.parametrize(
    ("write", "dtype"),
    [
        (prefixed, np.float32),
        (in_shards, np.float32),
        (narrow(np.float16), np.float16),
        (narrow(ml_dtypes.bfloat16), ml_dtypes.bfloat16),
        (wrapped("_orig_mod.transformer.*"), np.float32),
        (wrapped("module._orig_mod.transformer.*"), np.float32),
        (wrapped("transformer.module.*"), np.float32),
        (wrapped("_fsdp_wrapped_module"), np.float32),
    ],
    ids=["prefix, head and masks", "shards", "float16", "bfloat16", "compiled", "DDP of it", "in it", "FSDP"],
)
def test_every_way_of_writing_a_gpt2_is_read(tmp_path, write, dtype):
    folder = write_model(tmp_path / "hf")
    write(folder, arrays())
    model = transformers_files.open_model(folder)
    assert model.cfg == CFG
    said = model.note.replace(",", "").split()
    assert [mark for mark in transformers_files.WRAPPERS if mark in said] == model.weights.wrappers
    params = weights.from_hugging_face(model.cfg, model.weights.read)
    expected = {n: a.astype(dtype).astype(np.float32) for n, a in arrays().items()}
    assert_bits_equal(weights.to_hugging_face(CFG, params), expected)
    assert not params["wte"][V:].any()


def test_a_file_without_config_json_has_its_sizes_read_off(tmp_path, capsys):
    cfg = ModelConfig(block_size=8, vocab_size=V, n_layer=2, n_head=2, n_embd=128, bias=True)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in weights.their_shapes(cfg).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = transformers_files.open_model(tmp_path / "model.safetensors")
    assert model.cfg == cfg
    assert "n_head=2 is n_embd=128 / 64" in model.note


def test_a_model_without_biases_is_written_with_zeros(tmp_path):
    cfg = ModelConfig(block_size=8, vocab_size=V, n_layer=2, n_head=2, n_embd=12)
    shapes = jax.eval_shape(lambda: gpt2.init_params(cfg, jax.random.key(0)))
    params = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), shapes)
    params["wte"][V:] = 0
    written = weights.to_hugging_face(cfg, params)
    assert {n: a.shape for n, a in written.items()} == weights.their_shapes(cfg)
    assert all(not a.any() for n, a in written.items() if n.endswith("bias"))
    assert_bits_equal(params, weights.from_hugging_face(cfg, written.__getitem__))


def test_gguf_holds_the_same_weights_and_the_tokenizer(place):
    import gguf

    assert command("export-hf", place / "run", place / "model.gguf") == 0
    found = gguf.GGUFReader(place / "model.gguf")
    value = {name: field.contents() for name, field in found.fields.items()}
    assert value["general.architecture"] == "gpt2"
    sizes = ("block_count", "context_length", "embedding_length", "attention.head_count", "feed_forward_length")
    assert [value[f"gpt2.{name}"] for name in sizes] == [3, 19, 20, 5, 80]
    assert len(value["tokenizer.ggml.tokens"]) == V
    assert value["tokenizer.ggml.tokens"][-1] == "<|endoftext|>"
    assert value["tokenizer.ggml.merges"][0] == " ".join(vocabulary.tokens_and_merges(own_tokenizer())[1][0])
    tensors = {t.name: np.asarray(t.data) for t in found.tensors}
    ours = arrays()
    assert len(tensors) == len(ours)
    np.testing.assert_array_equal(tensors["blk.2.ffn_down.weight"], ours["h.2.mlp.c_proj.weight"].T)
    np.testing.assert_array_equal(tensors["blk.1.attn_qkv.weight"], ours["h.1.attn.c_attn.weight"].T)
    np.testing.assert_array_equal(tensors["position_embd.weight"], ours["wpe.weight"])
    np.testing.assert_array_equal(tensors["token_embd.weight"], ours["wte.weight"])


# ---- tokenizers -----------------------------------------------------------------------------------------------------


@functools.cache
def files_of(tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
    return vocabulary.tokenizer_files(tokenizer, 64)


def theirs(tokenizer: tokenizers.Tokenizer) -> TheirTokenizer:
    return TheirTokenizer.from_str(files_of(tokenizer)["tokenizer.json"])


GPT2 = tokenizers.make("gpt2", "")
LEARNED = tokenizers.make("bpe:400", TEXT + " ".join(f"{n * n} aaa{'ab' * (n % 7)} 北京\u0301" for n in range(300)))
PAIRS = {name: (t, theirs(t)) for name, t in {"gpt2": GPT2, "own": own_tokenizer(), "bpe": LEARNED}.items()}
ODD = "".join(sorted({*'a\n\r\0 \t"\\\x1b\x7f\x85\u0301\u200d\u2028\ufeff\ufffd\uffff👩🏽\U0010ffff', *"<|endoftext>"}))
CHARACTERS = {f"char {end}": tokenizers.make("char", ODD, end) for end in (False, True)}
PAIRS |= {name: (t, theirs(t)) for name, t in CHARACTERS.items()}
words = st.text(st.characters(exclude_categories=["Cs"])) | st.text("aeglnorti \n'd", max_size=60)


@pytest.mark.parametrize("kind", PAIRS)
@given(data=st.data())
def test_an_exported_tokenizer_gives_the_same_ids(kind, data):
    """Of the letters <|endoftext|>, too, which are the token for them, and text for us."""
    ours, exported = PAIRS[kind]
    texts = data.draw(st.lists(st.text(ODD) if kind.startswith("char") else words, min_size=1, max_size=3))
    texts = [part for text in texts for part in text.split("<|endoftext|>")]
    for text in texts:
        ids = exported.encode(text).ids
        assert ids == ours.encode(text).tolist()
        assert exported.decode(ids) == text
    assert exported.token_to_id("<|endoftext|>") == ours.end_of_text
    joined = "<|endoftext|>".join(texts)
    exported.encode_special_tokens = True
    assert exported.encode(joined).ids == ours.encode(joined).tolist()
    exported.encode_special_tokens = False
    if ours.end_of_text is not None:
        expected = [i for text in texts for i in [*ours.encode(text).tolist(), ours.end_of_text]][:-1]
        assert exported.encode(joined).ids == expected


@pytest.mark.parametrize("kind", PAIRS)
def test_no_token_is_lost_in_an_export(kind):
    """Each id has the same bytes there, and bytes that are text have the same id."""
    ours, exported = PAIRS[kind]
    byte_of = {symbol: byte for byte, symbol in tokenizers.byte_symbols().items()}
    assert exported.get_vocab_size() == ours.n_vocab
    for rank in range(ours.n_vocab):
        name = exported.id_to_token(rank)
        assert exported.token_to_id(name) == rank
        if rank == ours.end_of_text:
            assert name == "<|endoftext|>"
        elif kind.startswith("char"):
            assert name.encode() == ours.decode_bytes([rank])
        else:
            assert bytes(byte_of[symbol] for symbol in name) == ours.decode_bytes([rank])


def test_a_token_that_an_export_would_lose_is_named(tmp_path):
    ranks = {bytes([b]): b for b in range(256)}
    for at in range(2, 14):
        ranks[b"<|endoftext|>"[:at]] = len(ranks)
    with pytest.raises(config.UserError, match=r"token 267 is the text <\|endoftext\|>.* name of token 268"):
        vocabulary.tokenizer_files(tokenizers.GPT2Tokenizer(vocabulary._rank_file(ranks)), 64)


def plainly(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What the two quick ways must find: the pair of the lowest rank merges, again and again."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        found = [ranks.get(left + right, ranks[token]) for left, right in itertools.pairwise(parts)]
        i = found.index(min(found))
        if found[i] == ranks[token]:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@given(seed=st.integers(0, 10**6), letters=st.integers(1, 3))
def test_quick_merges_are_the_plain_ones(seed, letters):
    """Of tokens that are good in a vocabulary, and of those that are not."""
    draw = random.Random(seed)
    ranks: dict[bytes, int] = {bytes([97 + i]): i for i in range(letters)}
    pairs: dict[bytes, vocabulary.Pair] = {}
    for rank in range(letters, 60):
        left, right = draw.choice(list(ranks)), draw.choice(list(ranks))
        if left + right in ranks:
            continue
        ranks[left + right] = rank
        parts = plainly(left + right, ranks)
        assert vocabulary._merge_of(left + right, ranks) == tuple(parts)
        assert vocabulary._made_of(left, right, rank, ranks, pairs) == (parts == [left, right])
        if parts == [left, right]:
            pairs[left + right] = left, right
        else:
            del ranks[left + right]


def test_long_tokens_are_read_and_written_in_time(tmp_path):
    """Quadratic in their length, this took hours: a, aa, aaaa and so on, to 65,536 of them."""
    ranks = {bytes([b]): b for b in range(256)}
    for doubled in range(1, 17):
        ranks[b"a" * 2**doubled] = len(ranks)
    ours = tokenizers.GPT2Tokenizer(vocabulary._rank_file(ranks))
    start = time.monotonic()
    text = vocabulary.tokenizer_files(ours, 64)["tokenizer.json"]
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    back = vocabulary.read_tokenizer(tmp_path)
    assert time.monotonic() - start < 20
    assert back is not None
    assert back.stored == ours.stored


def in_json(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    return lambda folder: tokenizer_json(change)(folder)


def as_published(folder: Path) -> None:
    """GPT-2's own files: the post-processor's prefix space changes no id, and little is said beside."""
    tokenizer_json(lambda t: (t["post_processor"].update(add_prefix_space=True), t["model"].pop("byte_fallback")))(
        folder
    )
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')


def as_saved_by_transformers_4(folder: Path) -> None:
    end = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    about = {"added_tokens_decoder": {"299": end}, "bos_token": {"__type": "AddedToken", **end}, "pad_token": None}
    about |= {
        "add_prefix_space": False,
        "add_bos_token": False,
        "tokenizer_class": "GPT2TokenizerFast",
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": end, "additional_special_tokens": []}))


def end_beside(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": vocab.pop("<|endoftext|>")}))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_bytes((folder / "merges.txt").read_bytes().replace(b"\n", b"\r\n"))


TEXT_ALONE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
SAME_TOKENIZER = {
    "as published": as_published,
    "as transformers 4 saves it": as_saved_by_transformers_4,
    "end of the text beside": end_beside,
    "whole words first": in_json(lambda t: t["model"].update(ignore_merges=True)),
    "a sequence of one": in_json(lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [t["pre_tokenizer"]]})),
    "a sequence of none": in_json(lambda t: t.update(normalizer={"type": "Sequence", "normalizers": []})),
    "a template of the text": in_json(lambda t: t.update(post_processor=TEXT_ALONE)),
    "truncation": in_json(lambda t: t.update(truncation={"max_length": 4})),
    "merges in one text": in_json(lambda t: t["model"].update(merges=[" ".join(pair) for pair in t["model"]["merges"]])),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME_TOKENIZER)
def test_the_same_tokenizer_in_other_words(tmp_path, name):
    for file, text in files_of(PAIRS["own"][0]).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    SAME_TOKENIZER[name](tmp_path)
    notes: list[str] = []
    back = vocabulary.read_tokenizer(tmp_path, notes.append)
    assert back is not None
    assert back.stored == PAIRS["own"][0].stored
    assert ["truncation" in note for note in notes] == [True] * (name == "truncation")


@given(text=st.text("ab\n .ñ北👩", max_size=30))
def test_an_exported_char_tokenizer_gives_the_same_ids(text):
    ours = tokenizers.make("char", "ab\n .ñ北👩", end_of_text=len(text) % 2 == 0)
    exported = theirs(ours)
    assert exported.encode(text).ids == ours.encode(text).tolist()
    assert exported.decode(ours.encode(text).tolist()) == text
    with pytest.raises(Exception, match="UNK"):  # like ours, it does not invent a token
        exported.encode("x")


@given(text=words)
def test_a_tokenizer_trained_elsewhere_is_read(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "trained"
    if not folder.exists():
        folder.mkdir()
        trained_tokenizer(TEXT + "áéíóú don't 12 ", 290).save(str(folder / "tokenizer.json"))
    original = TheirTokenizer.from_file(str(folder / "tokenizer.json"))
    ours = vocabulary.read_tokenizer(folder)
    assert ours is not None
    assert ours.end_of_text == 0
    assert ours.encode(text).tolist() == original.encode(text).ids
    assert theirs(ours).encode(text).ids == original.encode(text).ids


@pytest.mark.parametrize("kept", ["tokenizer.json", "vocab.json merges.txt"])
@pytest.mark.parametrize("kind", ["gpt2", "own", "bpe"])
def test_a_tokenizer_comes_back_from_either_form(tmp_path, kind, kept):
    ours = PAIRS[kind][0]
    for name, text in files_of(ours).items():
        if name in kept.split():
            (tmp_path / name).write_text(text, encoding="utf-8")
    back = vocabulary.read_tokenizer(tmp_path)
    assert back is not None
    assert back.stored == ours.stored


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), end_of_text=st.booleans())
def test_a_char_tokenizer_comes_back(tmp_path_factory, text, end_of_text):
    folder = tmp_path_factory.getbasetemp() / "characters"
    folder.mkdir(exist_ok=True)
    ours = tokenizers.make("char", text, end_of_text)
    for name, content in vocabulary.tokenizer_files(ours, 64).items():
        (folder / name).write_text(content, encoding="utf-8")
    back = vocabulary.read_tokenizer(folder)
    assert back is not None
    assert (back.name, back.stored) == ("char", ours.stored)
    TheirTokenizer.from_file(str(folder / "tokenizer.json")).save(str(folder / "tokenizer.json"))
    again = vocabulary.read_tokenizer(folder)
    assert again is not None
    assert again.stored == ours.stored


def test_merges_of_gpt2_are_openais():
    """Known answers: the first and the last line of vocab.bpe."""
    vocab, merges = vocabulary.tokens_and_merges(GPT2)
    assert (len(vocab), len(merges)) == (50256, 50000)
    assert merges[0] == ("Ġ", "t")
    assert "".join(merges[-1]) == "Ġgazed"


# ---- what is refused ------------------------------------------------------------------------------------------------


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        about = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**about, **changes}))

    return spoil


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        found = arrays()
        change(found)
        save_file(found, folder / "model.safetensors")

    return spoil


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(9000)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shard_missing(folder: Path) -> None:
    in_shards(folder, arrays())
    (folder / "model-00002-of-00002.safetensors").unlink()


def tokenizer_json(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        about = json.loads((folder / "tokenizer.json").read_text())
        change(about)
        (folder / "tokenizer.json").write_text(json.dumps(about))

    return spoil


def characters(changed: dict[str, int]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        about = json.loads(vocabulary.tokenizer_files(tokenizers.make("char", TEXT), 19)["tokenizer.json"])
        about["model"]["vocab"] |= changed
        (folder / "tokenizer.json").write_text(json.dumps(about))

    return spoil


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def deep(name: str, inside: str = "") -> Callable[[Path], None]:
    """Nested 900 deep, which Python still parses, and can then neither show nor write."""
    return written(name, f'{{{inside}"a": {"[" * 900}{"]" * 900}}}')


def index(weight_map: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        written("model.safetensors.index.json", f'{{"weight_map": {weight_map}}}')(folder)

    return spoil


def header(text: str, claimed: int | None = None) -> Callable[[Path], None]:
    return written("model.safetensors", struct.pack("<Q", len(text) if claimed is None else claimed) + text.encode())


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def adapter(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        lora = {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": np.zeros((2, 20), np.float32)}
        save_file(lora, folder / name)
        written("adapter_config.json", '{"base_model_name_or_path": "gpt2"}')(folder)

    return spoil


def pair_of_files(change: Callable[[dict[str, Any]], Any], merges: bytes | None = None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        vocab = json.loads((folder / "vocab.json").read_text())
        change(vocab)
        (folder / "vocab.json").write_text(json.dumps(vocab))
        if merges is not None:
            (folder / "merges.txt").write_bytes(merges)

    return spoil


def spoilt(name: str, number: float) -> Callable[[Path], None]:
    return tensors(lambda t: t[name].reshape(-1).__setitem__(3, number))


def added(token: dict[str, Any]) -> Callable[[Path], None]:
    return tokenizer_json(lambda t: t["added_tokens"].append(token))


LONG = "x" * 10**6
END = {"content": "<|endoftext|>"}
BEGINS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": END["content"], "type_id": 0}}, *TEXT_ALONE["single"]],
}
NO_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
# (what is wrong, how the directory is spoiled, words of the message)
WRONG_MODELS = [
    ("pickled", pickled, ["pytorch_model.bin is a pickled file", "runs whatever code", "save_pretrained"]),
    ("nothing in it", without("model.safetensors"), ["has no model.safetensors"]),
    ("no config.json", without("config.json"), ["has no config.json"]),
    ("config.json is no JSON", lambda f: (f / "config.json").write_text("{"), ["config.json is not JSON"]),
    ("a llama", edit("config.json", model_type="llama"), ["model_type='llama'", "only GPT-2"]),
    ("quantized", edit("config.json", quantization_config={}), ["quantized"]),
    ("erf GELU", edit("config.json", activation_function="gelu"), ["activation_function='gelu'", "gelu_new"]),
    ("scaled by layer", edit("config.json", scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx=True"]),
    ("another epsilon", edit("config.json", layer_norm_epsilon=1e-6), ["layer_norm_epsilon=1e-06"]),
    ("another width", edit("config.json", n_inner=99), ["n_inner=99"]),
    ("heads", edit("config.json", n_head=3), ["n_embd=20 is not a multiple of n_head=3"]),
    ("no number", edit("config.json", n_layer="three"), ["n_layer='three' must be a whole number"]),
    ("cut short", cut, ["model.safetensors is cut short"]),
    ("a shard is missing", shard_missing, ["model-00002-of-00002.safetensors is missing"]),
    ("index leads out", lambda f: (f / "model.safetensors").unlink() or (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'), ["no weight_map"]),
    ("tensor missing", tensors(lambda t: t.pop("h.1.mlp.c_fc.bias")), ["tensor h.1.mlp.c_fc.bias is missing"]),
    ("more layers", edit("config.json", n_layer=5), ["tensors h.3.ln_1.weight and 23 more are missing", "n_layer=5"]),
    ("fewer layers", edit("config.json", n_layer=2), ["h.2.", "is not a tensor of a GPT-2 of n_layer=2"]),
    ("classifier", tensors(lambda t: t.update({"score.weight": t["wpe.weight"]})), ["score.weight is not a tensor"]),
    ("shape", edit("config.json", n_positions=20), ["wpe.weight is [19, 20]", "asks for [20, 20]", "n_positions=20"]),
    ("untied head", tensors(lambda t: t.update({"lm_head.weight": t["wte.weight"] * 2})), ["untied head"]),
    ("whole numbers", tensors(lambda t: t.update({"wpe.weight": t["wpe.weight"].astype(np.int32)})), ["wpe.weight is int32", "only float32"]),
    ("no tokenizer", without(*NO_TOKENIZER), ["has no tokenizer", "300 tokens are not GPT-2's", "--tokenizer DIR"]),
    ("not BPE", tokenizer_json(lambda t: t["model"].update(type="Unigram")), ["its model is 'Unigram', not BPE"]),
    ("another pattern", tokenizer_json(lambda t: t.update(pre_tokenizer={"type": "Whitespace"})), ["its pre_tokenizer is"]),
    ("a prefix space", tokenizer_json(lambda t: t["pre_tokenizer"].update(add_prefix_space=True)), ["its pre_tokenizer is"]),
    ("a prefix space, set beside", edit("tokenizer_config.json", add_prefix_space=True), ["add_prefix_space is true"]),
    ("normalized", tokenizer_json(lambda t: t.update(normalizer={"type": "NFC"})), ["it normalizes text"]),
    ("a byte is missing", tokenizer_json(lambda t: t["model"]["vocab"].pop("!")), ["1 of the 256 bytes have no token"]),
    ("merges in another order", tokenizer_json(lambda t: t["model"]["merges"].reverse()), ["in the order of their ids"]),
    ("no end of text", tokenizer_json(lambda t: t.update(added_tokens=[])), ["it has no <|endoftext|>"]),
    ("half a character", characters({"\ud800": 99}), ["it is not a tokenizer of characters"]),
    ("characters out of order", characters({" ": 1, ".": 0}), ["in the order of their code points"]),
    ("too deep", lambda f: (f / "tokenizer.json").write_text("[" * 200_000), ["tokenizer.json is damaged"]),
    ("damaged tokenizer", lambda f: (f / "tokenizer.json").write_text("{"), ["tokenizer.json is damaged"]),
    # sizes that the files do not bear out
    ("a billion layers", edit("config.json", n_layer=10**9), ["tensors h.3.ln_1.weight and 11,999,999,963 more are missing"]),
    ("layers without end", edit("config.json", n_layer=10**400), ["n_layer=1000", "must be a whole number"]),
    ("a billion positions", edit("config.json", n_positions=10**9), ["wpe.weight is [19, 20]", "n_positions=1000000000"]),
    ("a billion tokens", edit("config.json", vocab_size=10**9), ["wte.weight is [300, 20]", "vocab_size=1000000000"]),
    ("a billion wide", edit("config.json", n_embd=10**9), ["asks for [300, 1000000000]"]),
    ("half a layer", edit("config.json", n_layer=2.5), ["n_layer=2.5 must be a whole number"]),
    ("a number of no size", edit("config.json", n_embd=math.inf), ["n_embd=None must be a whole number"]),
    ("a huge header", header("{}", 2**62), ["model.safetensors is cut short"]),
    ("huge shapes", header(f'{{"wte.weight": {{"dtype": "F32", "shape": [{10**15}, {10**15}], "data_offsets": [0, 0]}}}}'), ["is cut short or not a safetensors file"]),
    ("a deep header", header('{"a":' * 9000), ["is cut short or not a safetensors file"]),
    ("an empty file", written("model.safetensors", ""), ["is cut short or not a safetensors file"]),
    # settings
    ("another name for heads", edit("config.json", num_attention_heads=4), ["n_head=5, but num_attention_heads=4"]),
    ("code of its own", edit("config.json", auto_map={"AutoModel": "m.M"}), ["auto_map"]),
    ("no head", edit("config.json", tie_word_embeddings=False), ["tie_word_embeddings=False", "has no lm_head.weight"]),
    ("a long setting", edit("config.json", activation_function=LONG), ["activation_function='xxx"]),
    ("deep settings", deep("config.json", '"model_type": "gpt2", '), ["config.json is damaged", "more than 100 deep"]),
    ("open lists", written("config.json", "[" * 100_000), ["config.json is damaged"]),
    ("no UTF-8", written("config.json", b"\xff\xfe\xfd{"), ["config.json is not JSON"]),
    ("a folder of that name", instead("config.json", Path.mkdir), ["config.json is a directory"]),
    # where the weights are
    ("a deep index", index('{"a":' * 3000), ["index.json is damaged"]),
    ("index leads up", index('{"a": ".."}'), ["no weight_map with names of .safetensors files beside it"]),
    ("index leads away", index('{"a": "/etc/x.safetensors"}'), ["no weight_map"]),
    ("index with a zero byte", index('{"a": "a\\u0000.safetensors"}'), ["no weight_map"]),
    ("index of half a character", index('{"a": "\\ud800.safetensors"}'), ["no weight_map"]),
    ("a pipe", instead("model.safetensors", os.mkfifo), ["model.safetensors is not a file"]),
    ("a link to nothing", instead("tokenizer.json", lambda path: path.symlink_to("gone")), ["tokenizer.json leads nowhere"]),
    ("an adapter", adapter("adapter_model.safetensors"), ["holds an adapter of 'gpt2'", "merge_and_unload", "python -c '"]),
    ("an adapter by another name", adapter("model.safetensors"), ["holds an adapter"]),
    # the tensors
    ("not a number", spoilt("h.1.ln_1.weight", math.nan), ["model.safetensors: h.1.ln_1.weight has 1 of 20 numbers that are not finite"]),
    ("infinite", spoilt("wte.weight", -math.inf), ["wte.weight has 1 of 6,000 numbers"]),
    ("twice", tensors(lambda t: t.update({"module.wpe.weight": t["wpe.weight"]})), ["wpe.weight", "module.wpe.weight", "are both wpe.weight"]),
    ("another prefix", tensors(lambda t: [t.__setitem__("model." + n, t.pop(n)) for n in list(t)]), ["tensors wte.weight and 39 more are missing", "it has 'model.h."]),
    ("a layer of no number", tensors(lambda t: t.__setitem__(f"h.{'9' * 5000}.ln_1.bias", t.pop("h.1.ln_1.bias"))), ["tensor h.1.ln_1.bias is missing"]),
    ("a long name", tensors(lambda t: t.update({LONG: t["wpe.weight"]})), ["xxx... is not a tensor"]),
    # tokens that are looked for in a text before all else
    ("padding", added({"id": 300, "content": "[PAD]", "special": True}), ["added_tokens has the added token '[PAD]'"]),
    ("a long word", added({"id": 300, "content": LONG, "special": False}), ["has the added token 'xxx"]),
    ("two ends", added({**END, "id": 5}), ["the id of <|endoftext|> is not one and the same"]),
    ("an id in letters", tokenizer_json(lambda t: t["added_tokens"][0].update(id="299")), ["a token has the id '299'"]),
    ("no tokens", tokenizer_json(lambda t: t.update(added_tokens=[None])), ["its added_tokens are [None]"]),
    ("takes spaces", tokenizer_json(lambda t: t["added_tokens"][0].update(lstrip=True)), ["<|endoftext|> with lstrip"]),
    ("added beside", written("added_tokens.json", '{"<sep>": 300}'), ["added_tokens.json: it has the added token '<sep>'"]),
    ("mapped beside", written("special_tokens_map.json", '{"pad_token": {"content": "[PAD]"}}'), ["special_tokens_map.json: pad_token has"]),
    ("more beside", written("special_tokens_map.json", '{"additional_special_tokens": ["<a>"]}'), ["additional_special_tokens has"]),
    ("decoded beside", edit("tokenizer_config.json", added_tokens_decoder={"299": END, "300": {"content": "<b>"}}), ["added_tokens_decoder has the added token '<b>'"]),
    ("another id beside", edit("tokenizer_config.json", added_tokens_decoder={"7": END}), ["not one and the same"]),
    ("a list beside", edit("tokenizer_config.json", added_tokens_decoder=[7]), ["added_tokens_decoder is not an object"]),
    ("a beginning of text", edit("tokenizer_config.json", add_bos_token=True), ["add_bos_token is true"]),
    ("another kind", edit("tokenizer_config.json", tokenizer_class="RobertaTokenizerFast"), ["tokenizer_class is 'RobertaTokenizerFast'"]),
    ("deep beside", deep("tokenizer_config.json"), ["tokenizer_config.json is damaged"]),
    # steps before and after
    ("a template", tokenizer_json(lambda t: t.update(post_processor=BEGINS)), ["post_processor", "adds tokens to each text"]),
    ("RoBERTa's", tokenizer_json(lambda t: t.update(post_processor={"type": "RobertaProcessing"})), ["adds tokens"]),
    ("normalized inside", tokenizer_json(lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]})), ["it normalizes text"]),
    ("digits first", tokenizer_json(lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits"}, t["pre_tokenizer"]]})), ["its pre_tokenizer is"]),
    ("no pattern", tokenizer_json(lambda t: t["pre_tokenizer"].update(use_regex=False)), ["its pre_tokenizer is"]),
    ("another decoder", tokenizer_json(lambda t: t.update(decoder={"type": "WordPiece"})), ["its decoder is {'type': 'WordPiece'}"]),
    # the vocabulary
    ("three in a merge", tokenizer_json(lambda t: t["model"]["merges"].insert(3, ["a", "b", "c"])), ["merge 3, ['a', 'b', 'c'], is not of two tokens"]),
    ("numbers in a merge", tokenizer_json(lambda t: t["model"]["merges"].insert(3, [1, 2])), ["merge 3, [1, 2]"]),
    ("a long merge", tokenizer_json(lambda t: t["model"]["merges"].insert(3, LONG)), ["merge 3, 'xxx"]),
    ("no list of merges", tokenizer_json(lambda t: t["model"].update(merges="a b")), ["no list of merges"]),
    ("an id twice", tokenizer_json(lambda t: t["model"]["vocab"].update(a=5)), ["are not 0 to 299"]),
    ("an id that is none", tokenizer_json(lambda t: t["model"]["vocab"].update(a={})), ["a token has the id {}"]),
    ("a long token", tokenizer_json(lambda t: t["model"]["vocab"].update({LONG: 300})), ["1 have none"]),
    ("no end beside", pair_of_files(lambda v: v.pop("<|endoftext|>")), ["vocab.json: it has no <|endoftext|>"]),
    ("three in a line", pair_of_files(lambda v: None, b"#version: 0.2\na b c\n"), ["merges.txt: merge 0, 'a b c'"]),
    ("merges of no text", pair_of_files(lambda v: None, b"\xff\xfe"), ["merges.txt is damaged: it is not UTF-8 text"]),
    ("a deep vocabulary", lambda f: (without("tokenizer.json")(f), deep("vocab.json")(f)), ["vocab.json is damaged"]),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), [w[1:] for w in WRONG_MODELS], ids=[w[0] for w in WRONG_MODELS])
def test_wrong_models(place, tmp_path, capsys, spoil, message):
    folder = shutil.copytree(place / "hf", tmp_path / "hf")
    spoil(folder)
    start = time.monotonic()
    shown = refused(command_of, ["import-hf", folder, tmp_path / "run"], capsys, *message)
    assert time.monotonic() - start < 20, "no matter what it says, it is found soon"
    assert len(shown) < 1200
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".*"))


WRONG_COMMANDS = [
    ("no such directory", "import-hf ./gone new", ["no file or directory ./gone"]),
    ("hub without network", "import-hf gpt2 new", ["no file or directory gpt2", "cannot be downloaded"]),
    ("pickled file", "import-hf model.bin new", ["model.bin is a pickled file"]),
    ("another file", "import-hf text.txt new", ["text.txt is not a .safetensors file"]),
    ("one word", "import-hf hf", ["import-hf takes MODEL RUN, but got hf"]),
    ("misspelt flag", "import-hf hf new --tokeniser x", ["unknown flag --tokeniser", "did you mean --tokenizer?"]),
    ("run exists", "import-hf hf run", ["run exists and is not empty"]),
    ("run is a file", "import-hf hf text.txt", ["text.txt is not a directory"]),
    ("no such tokenizer", "import-hf hf new --tokenizer home", ["--tokenizer=home has neither tokenizer.json"]),
    ("tokenizer too large", "import-hf hf new --tokenizer gpt2", ["has 50257 tokens, the model only 300"]),
    ("no run", "export-hf gone new", ["no run gone"]),
    ("a directory with files", "export-hf run home", ["home is not empty", "--overwrite"]),
    ("onto a run", "export-hf run run --overwrite", ["run is a run directory"]),
    ("onto its tokenizer", "export-hf run run/tokenizer --overwrite", ["run/tokenizer is inside a run directory"]),
    ("among its checkpoints", "export-hf run run/checkpoints/x.gguf", ["is inside a run directory"]),
    ("below a file", "export-hf run text.txt/new", ["cannot write text.txt/new: Not a directory"]),
    ("gguf below a file", "export-hf run text.txt/new.gguf", ["cannot write text.txt/new.gguf: Not a directory"]),
    ("a run below a file", "import-hf hf text.txt/new", ["cannot write text.txt/new: Not a directory"]),
    ("a pipe", "export-hf run pipe.gguf --overwrite", ["pipe.gguf is a device or a pipe"]),
    ("a device", "export-hf run null.gguf --overwrite", ["null.gguf is a device or a pipe"]),
    ("a name without end", f"import-hf {'x' * 300} new", ["no file or directory xxx"]),
    ("a file of an adapter", "import-hf adapter_model.safetensors new", ["holds an adapter"]),
    ("a file", "export-hf run text.txt", ["text.txt is not a directory"]),
    ("gguf exists", "export-hf run old.gguf", ["old.gguf exists", "--overwrite"]),
    ("no checkpoint", "export-hf run new --checkpoint 7", ["run has no checkpoint 7; it has 0"]),
]


@pytest.mark.parametrize(("line", "message"), [w[1:] for w in WRONG_COMMANDS], ids=[w[0] for w in WRONG_COMMANDS])
def test_wrong_commands(place, monkeypatch, capsys, line, message):
    monkeypatch.chdir(place)
    (place / "home").mkdir(exist_ok=True)
    (place / "home" / "thesis.txt").write_text("mine")
    (place / "gpt2").mkdir(exist_ok=True)
    for name in ("model.bin", "text.txt", "old.gguf", "adapter_model.safetensors"):
        (place / name).write_text("x")
    if not (place / "pipe.gguf").exists():
        os.mkfifo("pipe.gguf")
        (place / "null.gguf").symlink_to("/dev/null")
    if "tokenizer gpt2" in line:
        for name, text in files_of(GPT2).items():
            (place / "gpt2" / name).write_text(text, encoding="utf-8")
    else:
        shutil.rmtree(place / "gpt2")
    refused(command_of, line, capsys, *message)
    assert not (place / "new").exists()
    assert not list(place.glob(".*"))
    assert (place / "pipe.gguf").is_fifo()
    assert (place / "home" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("end_of_text", [False, True])
def test_a_character_model_does_not_go_into_gguf(place, tmp_path, capsys, end_of_text):
    shutil.copytree(place / "run", tmp_path / "run", ignore=shutil.ignore_patterns("tokenizer"))
    tokenizers.make("char", TEXT, end_of_text).save(tmp_path / "run" / "tokenizer")
    assert command("export-hf", tmp_path / "run", tmp_path / "model.gguf") == 2
    assert "llama.cpp has no tokenizer of characters" in capsys.readouterr().err
    assert not (tmp_path / "model.gguf").exists()


def test_a_word_model_is_not_exported(place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "run", ignore=shutil.ignore_patterns("tokenizer"))
    tokenizers.make("word", "El gato").save(tmp_path / "run" / "tokenizer")
    for out, message in (
        ("model.gguf", "llama.cpp has no tokenizer of words"),
        ("out", "the run's tokenizer is of words"),
    ):
        assert command("export-hf", tmp_path / "run", tmp_path / out) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / out).exists()


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A limit on the size of files stands in for it: small ones can be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [500, 13_000])
@pytest.mark.parametrize("line", ["import-hf hf new", "export-hf run new", "export-hf run new.gguf"])
def test_a_full_disk_is_told_and_leaves_nothing(place, tmp_path, monkeypatch, capsys, line, size):
    """The same command goes on to the end when there is room."""
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "run"):
        (tmp_path / name).symlink_to(place / name)
    with full_disk(size):
        assert command(*line.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "File too large" in said or "OUT_OF_RANGE" in said  # tensorstore's word for it
    assert not {p.name for p in tmp_path.iterdir()} - {"hf", "run"}
    assert command(*line.split()) == 0


def test_a_full_disk_leaves_the_files_of_before(place, tmp_path, capsys):
    shutil.copytree(place / "out", tmp_path / "out")
    with full_disk(40_000):
        assert command("export-hf", place / "run", tmp_path / "out", "--overwrite") == 2
    assert f"error: cannot write {tmp_path / 'out'}: " in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in (place / "out").iterdir())
    for path in (place / "out").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


KILLS = """
import os
import safetensors.numpy
from nanogpt_jax import cli
from nanogpt_jax.interop import gguf_file, transformers_files, vocabulary
from nanogpt_jax.commands import huggingface
from nanogpt_jax.run import checkpoint

def kill_after(module, name, calls=1):
    original, left = getattr(module, name), [calls]
    def call(*args, **options):
        original(*args, **options)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), 9)
    setattr(module, name, call)

for line, module, name, calls in (
    ("import-hf hf new", checkpoint, "save_params", 1),
    ("export-hf run out", safetensors.numpy, "save_file", 1),
    ("export-hf run empty", os, "replace", 9),  # 8 for the texts in the temporary folder, 1 to its place
    ("export-hf run old --overwrite", os, "replace", 10),
):
    if not (child := os.fork()):
        kill_after(module, name, calls)
        command, *words = line.split()
        os._exit(cli.guarded({"import-hf": huggingface.main_import, "export-hf": huggingface.main_export}[command], [*words, "--no-compare"]))
    print(line, os.waitpid(child, 0)[1])
"""


def test_after_a_kill_the_same_command_goes_to_the_end(place, tmp_path, monkeypatch, clean_env):
    """Whatever it had begun, beside its target or inside, is cleared away by the next start, and nothing else is."""
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "run"):
        (tmp_path / name).symlink_to(place / name)
    for name in ("empty", "old"):
        (tmp_path / name).mkdir()
    (tmp_path / "old/config.json").write_text("old")
    (tmp_path / "old/thesis.txt").write_text("mine")
    before = {p.name for p in tmp_path.iterdir()}
    script = [sys.executable, "-W", "ignore", "-c", KILLS]
    said = subprocess.run(script, env=clean_env, capture_output=True, text=True).stdout
    ends = dict(line.rsplit(" ", 1) for line in said.splitlines() if line[-2:] == " 9")
    assert len(ends) == 4, said
    left = [p.name for p in tmp_path.rglob(".*.tmp")]
    assert sorted(name.split(".")[1] for name in left) == ["export", "new", "out", "overwrite"]
    assert (tmp_path / "empty/model.safetensors").exists()
    for line in ends:
        assert command(*line.split()) == 0, line
    assert not list(tmp_path.rglob(".*"))
    assert {p.name for p in tmp_path.iterdir()} == before | {"new", "out"}
    assert (tmp_path / "old/thesis.txt").read_text() == "mine"
    for name in ("out", "empty", "old"):
        for path in (place / "out").iterdir():
            assert (tmp_path / name / path.name).read_bytes() == path.read_bytes()


def test_overwrite_replaces_the_files_and_leaves_others(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    (tmp_path / "out" / "README.md").write_text("mine")
    assert command("export-hf", place / "run", tmp_path / "out", "--overwrite") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_layer"] == 3
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert not list((tmp_path / "out").glob(".*"))


def test_overwrite_neither_follows_nor_replaces_a_link_in_a_directory(place, tmp_path, capsys):
    shutil.copytree(place / "out", tmp_path / "out")
    (tmp_path / "out/config.json").unlink()
    (tmp_path / "out/config.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "elsewhere.json").write_text("mine")
    refused(
        command_of, ["export-hf", place / "run", tmp_path / "out", "--overwrite"], capsys, "out/config.json is not a"
    )
    assert (tmp_path / "elsewhere.json").read_text() == "mine"
    assert (tmp_path / "out/config.json").is_symlink()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_overwrite_leaves_what_is_no_file(place, tmp_path, capsys, make):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out/merges.txt")
    assert command("export-hf", place / "run", tmp_path / "out", "--overwrite") == 2
    assert "out/merges.txt is not a file" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["merges.txt"]


def test_a_link_stays_one_and_leads_to_the_export(place, tmp_path):
    (tmp_path / "far").mkdir()
    for name in ("model.gguf", "run", "out"):
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
    (tmp_path / "far/model.gguf").write_text("old")
    assert command("export-hf", place / "run", tmp_path / "model.gguf", "--overwrite") == 0
    assert command("export-hf", place / "run", tmp_path / "out") == 0
    assert command("import-hf", place / "hf", tmp_path / "run") == 0
    assert all((tmp_path / name).is_symlink() for name in ("model.gguf", "run", "out"))
    assert (tmp_path / "far/model.gguf").read_bytes()[:4] == b"GGUF"
    assert sorted(p.name for p in (tmp_path / "far").iterdir()) == ["model.gguf", "out", "run"]


def test_an_import_is_not_made_of_the_directory_one_is_in(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("import-hf", place / "hf", ".") == 2
    assert ". is the directory that you are in" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_exported(place, tmp_path, monkeypatch, capsys):
    def spoilt_params(*_):
        params, step = load(place / "run")
        return {**params, "wpe": params["wpe"].at[3, 3].set(math.nan)}, step

    monkeypatch.setattr("nanogpt_jax.run.checkpoint.load_params", spoilt_params)
    assert command("export-hf", place / "run", tmp_path / "out") == 2
    assert "step 0 of" in (said := capsys.readouterr().err)
    assert "is not finite: wpe.weight" in said
    assert not list(tmp_path.iterdir())


def test_more_tokens_than_the_tokenizer_has_are_said(place, tmp_path, capsys):
    """And what else their config.json holds is kept as JSON, whatever it is."""
    folder = write_model(tmp_path / "hf", vocab_size=V, task={"threshold": math.nan, "most": math.inf})
    about = (folder / "config.json").read_text()
    assert "NaN" in about
    (folder / "config.json").write_text(about.replace("Infinity", "1e999"))
    for name, text in vocabulary.tokenizer_files(own_tokenizer(290), 19).items():
        (folder / name).write_text(text, encoding="utf-8")
    assert command("import-hf", folder, tmp_path / "run") == 0

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    kept = json.loads((tmp_path / "run/import.json").read_text(), parse_constant=refuse)
    assert kept["config"]["task"] == {"threshold": None, "most": None}
    assert command("export-hf", tmp_path / "run", tmp_path / "out") == 0
    assert "the model has 300 tokens, its tokenizer 290: no text for the ids 290 to 299" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == V


def test_without_transformers_it_says_that_nothing_was_compared(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert cli.guarded(huggingface.main_export, [str(place / "run"), str(tmp_path / "out")]) == 0
    assert "not compared with transformers: torch is not installed" in capsys.readouterr().out


# ---- training from a run --------------------------------------------------------------------------------------------

SMALL = (
    "--data.source text.txt --optim.name adamw --optim.learning-rate 1e-3 --optim.warmup-steps 2 "
    "--train.batch-size 2 --train.log-every 1 --train.save-every 3 --train.steps-per-dispatch 1"
).split()


@pytest.fixture
def train(place, monkeypatch, capsys):
    """`train(*flags)` is train.py in a place with text.txt and the imported run -> (code, what it said)."""
    monkeypatch.chdir(place)
    (place / "text.txt").write_text(TEXT * 2, encoding="utf-8")

    def go(*flags: str, steps: int = 6) -> tuple[int, str]:
        code = cli.guarded(door("train").main, [*SMALL, *flags, f"--train.steps={steps}"])
        said = capsys.readouterr()
        return code, said.out + said.err

    return go


def params_of(run: str, which: str = "latest") -> gpt2.Params:
    return load(run, which)[0]


@pytest.mark.long
def test_training_starts_from_a_run_keeps_what_is_frozen_and_goes_on_without_it(train, place):
    shutil.copytree("run", "first")
    frozen = ["--optim.freeze-layers", "2", "--optim.freeze-embeddings", "true", "--optim.weight-decay", "0.5"]
    flags = ["--init-from", "first", "--run-dir", "tuned", "--model.block-size", "11", *frozen]
    code, said = train(*flags)
    assert code == 0, said
    cfg = config.read_json(Path("tuned/config.json"))
    assert cfg.model == config.merge(config.Config(model=CFG), {"model.block_size": 11}, "").model
    assert cfg.train.init_from == "first"
    before, after = params_of("run"), params_of("tuned")
    assert_bits_equal(after["wte"], before["wte"])
    assert_bits_equal(after["wpe"], before["wpe"][:11])
    assert_bits_equal(jax.tree.map(lambda x: x[:2], after["h"]), jax.tree.map(lambda x: x[:2], before["h"]))
    moved = jax.tree.map(lambda x, y: bool((np.asarray(x[2]) != np.asarray(y[2])).any()), after["h"], before["h"])
    assert all(jax.tree.leaves(moved))
    # the initial run has gone: the run knows its model and its tokenizer itself
    shutil.rmtree("first")
    shutil.move("tuned", "moved")
    code, said = train(*[f if f != "tuned" else "moved" for f in flags], steps=8)
    assert code == 0, said
    assert "going on in moved from step 6" in said


def test_weights_to_start_from_are_laid_out_on_the_mesh(place):
    cfg = config.read_json(place / "run/config.json")
    tuned = config.merge(cfg, {"mesh.fsdp": 4, "mesh.data": 2, "train.batch_size": 8, "model.block_size": 7}, "test")
    mesh = make_mesh(tuned.mesh)
    alone, _ = load(place / "run")
    params, _ = load(place / "run", mesh=mesh)
    state = make_state(tuned, params)
    assert state.params["wte"].addressable_shards[0].data.shape == (384, 5)
    assert_bits_equal(state.params, {**alone, "wpe": alone["wpe"][:7]})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_frozen_stays_to_the_bit_whatever_the_optimizer(name):
    """Weight decay and all, and -0.0 among the weights stays -0.0; its moments stay zero."""
    settings = OptimConfig(name=name, freeze_layers=2, freeze_embeddings=True, weight_decay=0.5, warmup_steps=0)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: gpt2.init_params(CFG, jax.random.key(0)))
    params, grads = (jax.tree.map(lambda x: random.normal(size=x.shape).astype("f"), shapes) for _ in range(2))
    params["wpe"][0] = params["h"]["mlp"]["c_fc"]["bias"][0] = -0.0
    tx = make_optimizer(settings, 10)
    state, after = tx.init(params), params

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(with_frozen(settings, grads, 0.0), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        after, state = step(after, state, grads)

    def frozen(tree):
        return {"wte": tree["wte"], "wpe": tree["wpe"], "h": jax.tree.map(lambda x: x[:2], tree["h"])}

    assert_bits_equal(frozen(after), frozen(params))
    for x, y in zip(jax.tree.leaves(after["h"]), jax.tree.leaves(params["h"]), strict=True):
        assert (x[2] != y[2]).all()
    assert (after["ln_f"]["scale"] != params["ln_f"]["scale"]).all()
    moments = [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert all(not np.any(x) for path, x in moments if "wte" in path)
    assert all(not np.any(x[:2]) and np.any(x[2]) for path, x in moments if "c_fc']['kernel" in path and x.ndim == 3)


WRONG_STARTS = [
    ("no run", "--init-from gone", ["train.init_from=gone is not a run directory (command line)", "import-hf"]),
    ("misspelt run", "--init-from rum", ["did you mean run?"]),
    ("another width", "--init-from run --model.n-embd 32 --model.n-head 4", ["model.n_head=4 (command line)", "train.init_from=run (command line) has model.n_head=5"]),
    ("without biases", "--init-from run --model.bias false", ["model.bias=False (command line)", "has model.bias=True"]),
    ("longer context", "--init-from run --model.block-size 64", ["model.block_size=64", "has model.block_size=19"]),
    ("another tokenizer", "--init-from run --data.tokenizer char", ["data.tokenizer=char (command line) is another tokenizer than that of train.init_from=run"]),
    ("given twice", "--init-from run --train.init-from hf", ["exclude each other"]),
    ("no such tokenizer", "--data.tokenizer chars", ["data.tokenizer=chars is none of char, word, gpt2, bpe:8192 or a folder", "did you mean char?"]),
    ("no tokenizer there", "--data.tokenizer home", ["data.tokenizer=home holds no tokenizer"]),
    ("more frozen layers than layers", "--init-from run --optim.freeze-layers 4", ["optim.freeze_layers=4 exceeds model.n_layer=3"]),
    ("in place", "--init-from run --run-dir run", ["run holds an imported model", "--init-from run --run-dir NEW"]),
    ("in place, overwrite", "--run-dir run --overwrite", ["run holds an imported model"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), [w[1:] for w in WRONG_STARTS], ids=[w[0] for w in WRONG_STARTS])
def test_wrong_starts(train, place, flags, message):
    (place / "home").mkdir(exist_ok=True)
    flags = flags if "run-dir" in flags else f"{flags} --run-dir never"
    code, said = train(*flags.split())
    refusal(code, "", said, *message)
    assert not (place / "never").exists()
    assert (place / "run/checkpoints/0").is_dir()


def test_the_tokenizer_of_a_directory_or_a_run_prepares_data_once(place, monkeypatch):
    monkeypatch.chdir(place)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    found = [open_data(DataConfig(source="text.txt", tokenizer=name)) for name in ("run", "run/tokenizer")]
    assert found[0].folder == found[1].folder
    assert found[0].tokenizer.stored == own_tokenizer().stored
    assert found[0].tokenizer.decode(found[0].train[:20]) == TEXT[: len(found[0].tokenizer.decode(found[0].train[:20]))]


# ---- beside transformers --------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["char", "own", "gpt2"])
def test_transformers_loads_what_we_write(tmp_path, capsys, kind):
    """A pipeline's greedy text is ours, and a model that transformers saved comes in and goes out bit for bit."""
    import make_fixtures
    from transformers import AutoTokenizer, pipeline

    made = {"char": lambda: tokenizers.make("char", TEXT), "own": own_tokenizer, "gpt2": lambda: GPT2}[kind]()
    model = make_fixtures.make_model(0, n_layer=2, n_head=2, n_embd=32, vocab_size=made.n_vocab, n_positions=32)
    model.save_pretrained(tmp_path / "hf")
    for name, text in vocabulary.tokenizer_files(made, 32).items():
        (tmp_path / "hf" / name).write_text(text, encoding="utf-8")
    assert cli.guarded(huggingface.main_import, [str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    assert cli.guarded(huggingface.main_export, [str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    difference = [float(line.split(": ")[1].split()[0]) for line in shown.splitlines() if "max |Δlogit|" in line]
    assert len(difference) == 2
    assert max(difference) < 1e-4
    assert_bits_equal(load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "hf/model.safetensors"))

    from nanogpt_jax.inference.generate import Rules
    from nanogpt_jax.inference.sampler import generate_text

    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = "El gato "
    assert auto.encode(prompt) == made.encode(prompt).tolist()
    cfg = config.read_json(tmp_path / "run/config.json")
    params, _ = load(tmp_path / "run")
    cfg = execution.resolve(cfg.model, "cpu")
    ours = generate_text(cfg, params, made, [prompt], rules=Rules(temperature=0), max_new_tokens=15, seed=0)[0]
    theirs = pipeline("text-generation", str(tmp_path / "out"))(prompt, max_new_tokens=15, do_sample=False)
    assert theirs[0]["generated_text"] == prompt + ours
