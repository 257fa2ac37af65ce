"""The laws of the model room: it is GPT-2, to the last digit and the last gradient, and no position looks ahead."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpt2_numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from nanogpt_jax import config
from nanogpt_jax.config import ModelConfig, UserError
from nanogpt_jax.model import attention, dropout, execution, gpt2, sizes, watching
from nanogpt_jax.model.kernels import blocked_attention, norm_gelu
from nanogpt_jax.model.kernels.linear import linear, project, project_few
from nanogpt_jax.model.losses import cross_entropy

# L, T, V, H, C all odd or prime, and no two sizes equal, so that a wrong axis cannot fit
ODD = ModelConfig(
    block_size=19, vocab_size=131, n_layer=3, n_head=5, n_embd=20, bias=True, attention="reference", scan_unroll=1
)
SMALL = dataclasses.replace(ODD, block_size=6, vocab_size=11, n_layer=2, n_head=2, n_embd=12)
ON_CPU = sorted(set(attention.BACKENDS) - {"cudnn", "splash"})
FIXTURE = Path(__file__).parent / "fixtures" / "gpt2_odd.safetensors"


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{"h/attn/c_attn/kernel": (L, C, 3, H, D)}"""
    tree = jax.eval_shape(lambda: gpt2.init_params(cfg, jax.random.key(0)))
    return {path: p.shape for path, p in flatten_dict(tree, sep="/").items()}


def random_params(cfg: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Parameters of which every one matters: no zero bias, no unit scale, noise even in the vocabulary's padding."""
    rng = np.random.default_rng(seed)
    flat = {path: rng.normal(path.endswith("scale"), 0.2, s).astype("float32") for path, s in shapes(cfg).items()}
    for name in ("wte", "wpe"):
        flat[name][0] *= 0.05  # a short vector, beside which the layer norm's epsilon is not nothing
    return unflatten_dict(flat, sep="/")


def random_tokens(cfg: ModelConfig, *shape: int) -> np.ndarray:
    tokens = np.random.default_rng(1).integers(cfg.vocab_size, size=shape)
    tokens[0, 0] = 0
    return tokens


@functools.cache
def compiled(function: Callable, cfg: ModelConfig) -> Callable:
    """`function(cfg, ...)`, compiled once for each shape: compiling is what these tests spend their time on."""
    return jax.jit(functools.partial(function, cfg))


def logits(cfg: ModelConfig, params, tokens) -> jax.Array:
    """[B, T, V], without the vocabulary's padding."""
    return compiled(gpt2.forward, cfg)(params, tokens)[..., : cfg.vocab_size]


def loss_and_logits(cfg: ModelConfig, params, tokens):
    all_logits = gpt2.forward(cfg, params, tokens[:, :-1])
    return cross_entropy(all_logits, tokens[:, 1:]).mean(), all_logits


def gradients(cfg: ModelConfig, params, tokens):
    (loss, all_logits), grads = jax.value_and_grad(functools.partial(loss_and_logits, cfg), has_aux=True)(
        params, tokens
    )
    return loss, all_logits, flatten_dict(grads, sep="/")


def run(cfg: ModelConfig, params, tokens) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """Mean loss, logits [B, T, V'] and gradients {"h/mlp/c_fc/kernel": array} for tokens [B, T+1]."""
    return jax.device_get(compiled(gradients, cfg)(params, tokens))


def assert_close(a, b, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=tolerance)


# ---- the same numbers as other GPT-2s -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("L", "H", "C", "T", "V", "bias"),
    [(3, 5, 20, 19, 131, True), (2, 3, 21, 7, 128, False), (1, 1, 3, 1, 2, True), (1, 7, 7, 2, 129, False)],
)
def test_logits_equal_numpy(L, H, C, T, V, bias):
    cfg = dataclasses.replace(ODD, n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V, bias=bias)
    params, tokens = random_params(cfg), random_tokens(cfg, 2, T)
    assert_close(logits(cfg, params, tokens), gpt2_numpy.forward(params, tokens, V), 1e-4)


def from_hugging_face(cfg: ModelConfig, arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays under `prefix` ("weight." or "grad.") as {"h/attn/c_attn/kernel": array}, and none left over.

    Their names are ours but for the last word, their layers stand one by one, their vocabulary is not padded.
    """
    arrays = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
    found = {}
    for path, shape in shapes(cfg).items():
        name = path.replace("kernel", "weight").replace("scale", "weight").replace("/", ".")
        name = f"{path}.weight" if path in ("wte", "wpe") else name
        layers = [name.replace("h.", f"h.{i}.", 1) for i in range(cfg.n_layer)] if path.startswith("h/") else [name]
        array = np.stack([arrays.pop(each) for each in layers])
        if path == "wte":
            array = np.pad(array, [(0, 0), (0, cfg.padded_vocab_size - cfg.vocab_size), (0, 0)])
        found[path] = array.reshape(shape)
    assert not arrays
    return found


def assert_equals_hugging_face(cfg: ModelConfig, arrays: dict[str, np.ndarray]) -> None:
    params = unflatten_dict(from_hugging_face(cfg, arrays, "weight."), sep="/")
    _, ours, grads = run(cfg, params, arrays["tokens"])
    assert_close(ours[..., : cfg.vocab_size], arrays["logits"], 1e-4)
    for path, expected in from_hugging_face(cfg, arrays, "grad.").items():
        assert np.abs(expected).max() > 1e-3, f"{path} is not tested: it hardly has a gradient"
        assert_close(grads[path], expected, 1e-4)


def test_logits_and_gradients_equal_transformers():
    """For weights, logits and gradients that tests/make_fixtures.py took from PyTorch."""
    assert_equals_hugging_face(ODD, load_file(FIXTURE))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("L", "H", "C", "T", "V"), [(1, 1, 5, 3, 17), (2, 3, 9, 11, 128), (4, 2, 14, 23, 129), (3, 7, 49, 13, 257)]
)
def test_logits_and_gradients_equal_live_transformers(L, H, C, T, V):
    import make_fixtures

    cfg = dataclasses.replace(ODD, n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V)
    model = make_fixtures.make_model(L, n_layer=L, n_head=H, n_embd=C, vocab_size=V, n_positions=T)
    assert_equals_hugging_face(cfg, make_fixtures.run(model, C, batch_size=3))


@pytest.mark.torch
def test_the_defaults_of_gpt2_are_ours():
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2Config()
    cfg = dataclasses.replace(
        config.load(["gpt2"]).cfg.model,
        block_size=theirs.n_positions,
        vocab_size=theirs.vocab_size,
        n_layer=theirs.n_layer,
        n_head=theirs.n_head,
        n_embd=theirs.n_embd,
    )
    assert theirs.layer_norm_epsilon == norm_gelu.EPSILON
    assert theirs.initializer_range == gpt2.INIT_STD
    assert theirs.activation_function == "gelu_new"  # the tanh form
    assert theirs.n_inner is None  # 4C
    assert theirs.scale_attn_weights  # 1/√d_k, and by nothing else
    assert not theirs.scale_attn_by_inverse_layer_idx
    assert theirs.tie_word_embeddings
    assert cfg.bias

    import torch

    with torch.device("meta"):
        assert sizes.n_params(cfg) == sum(p.numel() for p in GPT2LMHeadModel(theirs).parameters())


# ---- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ON_CPU)
def test_no_position_looks_ahead(backend):
    """d logits[t] / d embedding[s]: exactly zero for s > t, and not zero for s <= t."""
    cfg = dataclasses.replace(SMALL, attention=backend)
    params, tokens = random_params(cfg), random_tokens(cfg, 1, cfg.block_size)

    @jax.jit
    @jax.jacrev
    def jacobian(wpe):  # what is added to the embedding of position s, and enters nowhere else
        return gpt2.forward(cfg, {**params, "wpe": wpe}, tokens)[0, :, : cfg.vocab_size]

    strongest = np.abs(jacobian(params["wpe"])).max((1, 3))  # [T, V, T, C] -> [T, T]
    may_look = np.tri(cfg.block_size, dtype=bool)
    assert (strongest[~may_look] == 0).all()
    assert (strongest[may_look] > 1e-5).all()


SENTENCE = ["El", "gato", "persigue", "al", "ratón"]


def test_persigue_looks_at_el_gato_and_itself():
    q, k = np.random.default_rng(0).normal(size=(2, 1, len(SENTENCE), 3, 8)).astype("float32")
    weights = np.asarray(attention.attention_weights(q, k))  # [1, H, T, S]
    row = dict(zip(SENTENCE, np.moveaxis(weights[0, :, SENTENCE.index("persigue")], 1, 0), strict=True))
    for word in ("El", "gato", "persigue"):
        assert (row[word] > 0).all(), word
    for word in ("al", "ratón"):
        assert (row[word] == 0).all(), word
    assert ((weights >= 0) & (weights <= 1)).all()
    assert_close(weights.sum(-1), np.ones((1, 3, len(SENTENCE))), 1e-6)


def test_what_is_watched_is_what_the_forward_pass_computed():
    cfg = dataclasses.replace(SMALL, attention="reference")
    params, tokens = random_params(cfg), jnp.arange(cfg.block_size) * 7 % cfg.vocab_size
    seen = watching.watch(cfg, params, tokens)
    assert (seen.logits == compiled(gpt2.forward, cfg)(params, tokens[None])[0]).all()
    T, may_look = len(tokens), np.tri(len(tokens), dtype=bool)
    assert seen.weights.shape == seen.scores.shape == (cfg.n_layer, cfg.n_head, T, T)
    assert (np.asarray(seen.weights)[:, :, ~may_look] == 0).all()
    x = np.asarray(seen.hidden, np.float64)
    assert_close(x[0], params["wte"][tokens] + params["wpe"][:T], 1e-6)
    for layer in range(cfg.n_layer):
        block = gpt2_numpy.pick(params["h"], layer)
        met = gpt2_numpy.layer_norm(block["ln_1"], x[layer])
        q, k, v = (
            np.einsum("tc,cnhd->nhtd", met, block["attn"]["c_attn"]["kernel"])
            + block["attn"]["c_attn"]["bias"][:, :, None]
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(cfg.head_dim)
        assert_close(seen.scores[layer], scores, 1e-5)
        assert_close(seen.weights[layer], gpt2_numpy.softmax(np.where(may_look, scores, -np.inf)), 1e-6)
        assert_close(seen.value_norms[layer], np.linalg.norm(v, axis=-1), 1e-5)


def test_the_lens_of_the_last_layer_is_the_answer_of_the_model():
    params, tokens = random_params(SMALL), jnp.arange(SMALL.block_size) * 7 % SMALL.vocab_size
    seen = watching.watch(SMALL, params, tokens)
    lens = watching.lens(SMALL, params, seen, 3)
    assert lens.likeliest.shape == lens.probability.shape == (SMALL.n_layer + 1, len(tokens), 3)
    probability = jax.nn.softmax(seen.logits)
    assert (lens.likeliest[-1, :, 0] == probability.argmax(-1)).all()
    assert_close(lens.probability[-1, :, 0], probability.max(-1), 1e-6)
    assert np.abs(lens.divergence[-1]).max() < 1e-6
    assert (np.asarray(lens.divergence[:-1]) > 0).all()
    assert (np.asarray(lens.likeliest) < SMALL.vocab_size).all()


def test_gato_after_negro_is_another_vector():
    """The same word at the same place has another vector in another context, and the same one in the same."""
    words = ["El", "negro", "gato", *SENTENCE[2:]]
    params = random_params(SMALL)

    def vectors(text: str) -> np.ndarray:
        tokens = jnp.array([[words.index(word) for word in text.split()]])
        return np.asarray(compiled(gpt2.hidden, SMALL)(params, tokens)[0][0])

    el_gato, negro_gato, el_gato_al = vectors("El gato"), vectors("negro gato"), vectors("El gato al")
    assert np.abs(el_gato[1] - negro_gato[1]).max() > 0.01
    assert_close(el_gato, el_gato_al[:2], 1e-5)


def test_dividing_by_root_d_k_keeps_the_variance_of_the_scores():
    T, D = 64, 256
    q, k = jax.random.normal(jax.random.key(0), (2, 1, T, 4, D))
    weights = attention.attention_weights(q, k, jnp.ones((1, 1, T, T), bool))
    scores = jnp.log(weights)
    scores = scores - scores.mean(-1, keepdims=True)  # softmax forgets a constant, and nothing else
    assert abs(scores.var() - 1) < 0.1


@st.composite
def attention_case(draw):
    """q, k, v and a cotangent, each [B, T, H, D]."""
    shape = [draw(st.integers(1, n)) for n in (3, 6, 3, 9)]
    return np.random.default_rng(draw(st.integers(0, 99))).normal(size=(4, *shape)).astype("float32")


def the_equation(q, k, v, see):
    """softmax(QKᵀ/√d_k)V in float64; see [B or 1, 1, T, S]: whether a query may look there."""
    scores = np.einsum("bthd,bshd->bhts", q, k, dtype="float64") / np.sqrt(q.shape[-1])
    return np.einsum("bhts,bshd->bthd", gpt2_numpy.softmax(np.where(see, scores, -np.inf)), v)


def value_and_gradients(f, g, *xs):
    value, backward = jax.vjp(f, *xs)
    return value, *backward(jnp.asarray(g, value.dtype))


@settings(max_examples=6)
@given(attention_case())
def test_every_backend_equals_the_reference_and_that_the_equation(case):
    q, k, v, g = case

    @jax.jit
    def run_all(*args):
        return {name: value_and_gradients(attention.BACKENDS[name], *args) for name in ON_CPU}

    results = run_all(g, q, k, v)
    for name in set(ON_CPU) - {"reference"}:
        for one, other in zip(results[name], results["reference"], strict=True):
            assert_close(one, other, 1e-5)
    assert_close(results["reference"][0], the_equation(q, k, v, np.tri(q.shape[1], dtype=bool)), 1e-5)


def check_the_caches_attention(q, k, v, position):
    """q [B, T, H, D] on S positions; `position` [B, T] is the last to look at, and what lies behind it is rubbish."""
    B, T, H, D = q.shape
    in_one_row = (x.swapaxes(1, 2).reshape(B * H, -1, D) for x in (q, k, v))
    y = jax.jit(attention.cached)(*in_one_row, position.repeat(H, axis=0))
    see = np.arange(k.shape[1]) <= position[:, None, :, None]
    assert_close(y.reshape(B, H, T, D).swapaxes(1, 2), the_equation(q, k, v, see), 1e-5)


@given(attention_case(), st.integers(0, 5))
def test_the_caches_attention_equals_the_equation(case, more):
    q, k, v, _ = case
    B, T, H, D = q.shape
    rng = np.random.default_rng(more)
    k, v = (np.concatenate([x, rng.normal(size=(B, more, H, D)).astype("float32")], axis=1) for x in (k, v))
    check_the_caches_attention(q, k, v, rng.integers(0, more + 1, (B, 1)) + np.arange(T))


@pytest.mark.parametrize("S", [1, 8, 30, 40])  # in pieces of 8 where they fit
def test_one_query_looks_at_a_cache_of_any_length(S):
    q, k, v = (np.random.default_rng(0).normal(size=(2, n, 3, 4)).astype("float32") for n in (1, S, S))
    check_the_caches_attention(q, k, v, np.array([[S - 1], [S // 2]]))


@settings(max_examples=10)
@given(case=attention_case(), block=st.integers(1, 4), rate=st.sampled_from([0.0, 0.4]))
def test_blocks_of_any_size_equal_the_reference_with_the_same_dropout(case, block, rate):
    q, k, v, g = case
    drop = {"dropout_rate": rate, "dropout_key": jax.random.key(1) if rate else None}

    def run(name):
        return jax.jit(functools.partial(value_and_gradients, functools.partial(attention.BACKENDS[name], **drop)))

    expected = run("reference")(g, q, k, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked_attention, "block_length", lambda T: block)
        results = run("blocked")(g, q, k, v)
    for one, other in zip(results, expected, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 150, 2, 16),  # 64 + 64 + 22 queries; several heads at a time, as there are several devices
        (1, 600, 3, 8),  # 4 * 128 + 88; one head at a time
    ],
)
def test_blocks_of_the_real_size_equal_the_reference(rate, shape):
    q, k, v, g = np.random.default_rng(0).normal(size=(4, *shape)).astype("float32")
    drop = {"dropout_rate": rate, "dropout_key": jax.random.key(1) if rate else None}
    results = [
        jax.jit(functools.partial(value_and_gradients, functools.partial(backend, **drop)))(g, q, k, v)
        for backend in (attention.blocked, attention.reference)
    ]
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize(
    ("model", "platform", "expected"),
    [
        ({"block_size": 128}, "cpu", "reference"),
        ({"block_size": 256}, "cpu", "blocked"),
        ({"block_size": 1024, "dropout": 0.1}, "cpu", "blocked"),
        ({}, "gpu", "xla"),
        ({"block_size": 64}, "tpu", "xla"),
        ({"block_size": 1024, "dtype": "bfloat16"}, "tpu", "splash"),
        ({"dtype": "bfloat16"}, "gpu", "xla"),  # no cuDNN here, and no error
        ({"dropout": 0.1}, "tpu", "reference"),
        ({"dropout": 0.1, "dtype": "bfloat16"}, "gpu", "reference"),
        ({"attention": "xla"}, "cpu", "xla"),
    ],
)
def test_auto_chooses_a_backend_that_can_do_the_work(model, platform, expected):
    assert execution.resolve(ModelConfig(**model), platform).attention == expected


def test_layers_are_unrolled_but_on_a_tpu_unless_told():
    asked = [(platform, unroll) for platform in ("cpu", "gpu", "tpu") for unroll in (0, 2)]
    found = [execution.resolve(ModelConfig(n_layer=5, scan_unroll=unroll), on).scan_unroll for on, unroll in asked]
    assert found == [5, 2, 5, 2, 1, 2]


@pytest.mark.parametrize(("name", "platform"), [("splash", "cpu"), ("splash", "gpu"), ("cudnn", "cpu")])
def test_a_backend_of_other_hardware_is_refused(name, platform):
    with pytest.raises(UserError, match=f"model.attention={name} needs a .PU, and this is a {platform.upper()}"):
        execution.resolve(ModelConfig(attention=name, dtype="bfloat16"), platform)


# ---- documents in one window ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=5)
@given(cuts=st.sets(st.integers(1, 18), max_size=5), first=st.booleans())
def test_packed_documents_are_computed_as_if_each_stood_alone(backend, cuts, first):
    cfg = dataclasses.replace(ODD, attention=backend, separate_documents=True, end_of_text=130)
    params = random_params(cfg)
    tokens = np.random.default_rng(len(cuts)).integers(0, 130, (1, 19))
    starts = sorted(cuts | ({0} if first else set()))
    tokens[0, starts] = 130
    packed = jax.jit(functools.partial(gpt2.forward, cfg))(params, tokens)
    for start, end in itertools.pairwise(sorted({0, *starts, 19})):
        assert_close(
            packed[:, start:end, : cfg.vocab_size], gpt2_numpy.forward(params, tokens[:, start:end], 131), 1e-4
        )


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_documents_in_blocks_of_the_real_size(rate):
    q, k, v, g = np.random.default_rng(0).normal(size=(4, 3, 150, 2, 8)).astype("float32")
    documents = jnp.cumsum(np.random.default_rng(1).random((3, 150)) < 0.02, axis=1)
    drop = {"dropout_rate": rate, "dropout_key": jax.random.key(1) if rate else None, "documents": documents}
    results = [
        jax.jit(functools.partial(value_and_gradients, functools.partial(backend, **drop)))(g, q, k, v)
        for backend in (attention.blocked, attention.reference)
    ]
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.long
def test_the_tpu_kernel_equals_the_reference_on_one_device_and_split_over_four():
    q, k, v, g = np.random.default_rng(0).normal(size=(4, 2, 128, 2, 64)).astype("float32")
    mesh = Mesh(
        np.array(jax.devices()[:4]).reshape(2, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    split = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))

    def one(documents, *args):
        return value_and_gradients(functools.partial(attention.splash, documents=documents, interpret=True), *args)

    def four(documents, *args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return one(documents, *args)

    for documents in (None, np.cumsum(np.random.default_rng(1).random((2, 128)) < 0.02, axis=1).astype("int32")):
        expected = value_and_gradients(functools.partial(attention.reference, documents=documents), g, q, k, v)
        for f, where in ((one, None), (four, split)):
            results = jax.jit(functools.partial(f, documents))(*jax.device_put((g, q, k, v), where))
            for mine, other in zip(results, expected, strict=True):
                assert_close(mine, other, 1e-5)


# ---- linear ---------------------------------------------------------------------------------------------------------


@given(
    lead=st.lists(st.integers(1, 4), max_size=2),
    inputs=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    outputs=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_project_and_its_gradients_equal_einsum(lead, inputs, outputs, seed):
    rng = np.random.default_rng(seed)
    x, kernel, g = (rng.normal(size=s).astype("float32") for s in (lead + inputs, inputs + outputs, lead + outputs))
    letters = iter("abcdefghij")
    n, i, o = ("".join(next(letters) for _ in axes) for axes in (lead, inputs, outputs))

    def ours(x, kernel):
        if len(lead) == len(inputs) == 1:
            return linear(x, kernel)
        return project(x, kernel, len(inputs))

    @jax.jit
    def both(*args):
        einsum = functools.partial(jnp.einsum, f"{n + i},{i + o}->{n + o}")
        return value_and_gradients(ours, *args), value_and_gradients(einsum, *args)

    for a, b in zip(*both(g, x, kernel), strict=True):
        assert a.shape == b.shape
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize(("lead", "outputs"), [((2,), (16,)), ((2, 3), (3, 2, 4)), ((1, 1), (3, 2, 4)), ((1,), (7,))])
def test_few_rows_are_projected_alike(lead, outputs):
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=s).astype("float32") for s in ((*lead, 2, 5), (*outputs, 2, 5)))
    expected = project(x, np.moveaxis(kernel, (-2, -1), (0, 1)), 2)
    assert_close(jax.jit(functools.partial(project_few, n_in=2))(x, kernel), expected, 1e-5)


def test_a_bfloat16_input_gives_a_float32_kernel_gradient():
    """Summed in float32 too: bfloat16 has 8 bits, and would be off by 1e-2 here."""
    rng = np.random.default_rng(0)
    x, g = jnp.asarray(rng.normal(size=(500, 3)), "bfloat16"), jnp.asarray(rng.normal(size=(500, 2, 4)), "bfloat16")
    kernel = rng.normal(size=(3, 2, 4)).astype("float32")
    y, dx, dkernel = jax.jit(functools.partial(value_and_gradients, linear))(g, x, jnp.asarray(kernel))
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = np.einsum("ni,nab->iab", np.asarray(x, "float64"), np.asarray(g, "float64"))
    assert_close(dkernel, exact, 1e-4)


def gelu_and_slope(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GPT-2's GELU as its definition says, and its derivative, in float64."""
    x = x.astype("float64")
    t, inner = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)), np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return x / 2 * (1 + t), (1 + t) / 2 + x / 2 * (1 - t**2) * inner


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 6e-6), ("bfloat16", 0.004)])
def test_gelu_and_its_gradient_equal_the_definition(dtype, tolerance):
    tiny = [0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-9, 1e-4]
    points = np.concatenate([tiny, np.linspace(0, 12, 12001), [20, 1e3, 1e12]])
    x = jnp.asarray(np.concatenate([points, -points]), dtype)
    y, slope = jax.jit(lambda x: (norm_gelu.gelu(x), jax.grad(lambda x: norm_gelu.gelu(x).sum())(x)))(x)
    assert y.dtype == slope.dtype == x.dtype
    for ours, theirs in zip((y, slope), gelu_and_slope(np.asarray(x, "float32")), strict=True):
        np.testing.assert_allclose(np.asarray(ours, "float32"), theirs, rtol=tolerance, atol=tolerance)


def test_layer_norm_survives_a_large_mean():
    """E[x²] - E[x]² would lose every digit of the variance here."""
    x = np.random.default_rng(0).normal(3000, 1, (4, 32)).astype("float32")
    scale = {"scale": np.ones(32, "float32"), "bias": np.zeros(32, "float32")}
    ours = gpt2.LayerNorm(SMALL.bias).apply({"params": scale}, x)
    assert_close(ours, gpt2_numpy.layer_norm(scale, x.astype("float64")), 5e-3)


# ---- parameters -----------------------------------------------------------------------------------------------------

TREE = {  # for ODD, whose vocabulary of 131 is padded to 256
    "wte": (256, 20),
    "wpe": (19, 20),
    "h/ln_1/scale": (3, 20),
    "h/ln_1/bias": (3, 20),
    "h/attn/c_attn/kernel": (3, 20, 3, 5, 4),
    "h/attn/c_attn/bias": (3, 3, 5, 4),
    "h/attn/c_proj/kernel": (3, 5, 4, 20),
    "h/attn/c_proj/bias": (3, 20),
    "h/ln_2/scale": (3, 20),
    "h/ln_2/bias": (3, 20),
    "h/mlp/c_fc/kernel": (3, 20, 80),
    "h/mlp/c_fc/bias": (3, 80),
    "h/mlp/c_proj/kernel": (3, 80, 20),
    "h/mlp/c_proj/bias": (3, 20),
    "ln_f/scale": (20,),
    "ln_f/bias": (20,),
}


def test_the_parameter_tree_is_pinned():
    """Checkpoints, sharding rules and the importer know these names."""
    assert shapes(ODD) == TREE
    without = {path: shape for path, shape in TREE.items() if not path.endswith("/bias")}
    assert shapes(dataclasses.replace(ODD, bias=False)) == without


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_float32(dtype):
    tree = jax.eval_shape(lambda: gpt2.init_params(dataclasses.replace(ODD, dtype=dtype), jax.random.key(0)))
    assert {p.dtype for p in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def test_gpt2_small_has_124_439_808_parameters():
    cfg = ModelConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, bias=True)
    assert cfg.padded_vocab_size == 50304
    assert sizes.n_params(cfg) == 124_439_808
    assert sizes.n_params(ODD) == sum(np.prod(s) for s in TREE.values()) - (256 - 131) * 20


def test_operations_of_a_training_step_are_those_of_its_matrix_products():
    """6 a token for each weight that multiplies, and 12 L C T for the scores and the sums: counted by hand here."""
    cfg = config.load("--model.vocab-size 128 --model.n-layer 3 --model.n-embd 32 --model.n-head 2".split()).cfg
    C, T, V = 32, cfg.model.block_size, 128
    products = 3 * (C * 3 * C + C * C + 2 * C * 4 * C) + V * C
    norms = (2 * 3 + 1) * C
    assert sizes.flops_per_token(cfg.model) == 6 * (products + norms) + 12 * 3 * C * T


def test_weights_are_made_without_the_attention_that_will_use_them():
    """cuDNN refuses what initialization passes through a block, and every other place than its card."""
    cfg = dataclasses.replace(SMALL, attention="cudnn", dtype="bfloat16")
    shapes = jax.eval_shape(lambda: gpt2.init_params(cfg, jax.random.key(0)))
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(shapes))


def test_initial_weights_are_gpt2s():
    cfg = dataclasses.replace(ODD, block_size=128, n_layer=4, n_head=4, n_embd=64)

    def init(seed: int) -> dict[str, np.ndarray]:
        return flatten_dict(jax.device_get(compiled(gpt2.init_params, cfg)(jax.random.key(seed))), sep="/")

    params, again, other = init(0), init(0), init(1)
    residual = 0.02 / (2 * 4) ** 0.5
    std = {
        "wte": 0.02,
        "wpe": 0.02,
        "h/attn/c_attn/kernel": 0.02,
        "h/mlp/c_fc/kernel": 0.02,
        "h/attn/c_proj/kernel": residual,
        "h/mlp/c_proj/kernel": residual,
    }
    for path, p in params.items():
        if path in std:
            assert p.std() == pytest.approx(std[path], rel=0.05), path
            assert abs(p.mean()) < 0.05 * std[path], path
            assert np.unique(p).size > 0.9 * p.size or p.size > 2**14, f"{path} repeats itself"
            if path.startswith("h/"):  # no two layers begin alike
                apart = np.abs(p[:, None] - p[None]).reshape(4, 4, -1).mean(-1)
                assert (apart[~np.eye(4, dtype=bool)] > std[path]).all(), path
        else:
            assert (p == float(path.endswith("scale"))).all(), path
    q, k, v = np.moveaxis(params["h/attn/c_attn/kernel"], 2, 0)
    assert min(np.abs(q - k).mean(), np.abs(k - v).mean(), np.abs(q - v).mean()) > 0.02
    assert all((again[path] == params[path]).all() for path in params)
    assert all((other[path] != params[path]).any() for path in std)


# ---- how it is computed changes nothing, or little ------------------------------------------------------------------


THREE = dataclasses.replace(SMALL, n_layer=3)
PARAMS, TOKENS = random_params(THREE), random_tokens(THREE, 2, THREE.block_size + 1)


@pytest.fixture(scope="module")
def plain():
    """Loss, logits and gradients of THREE with nothing recomputed or unrolled."""
    return run(THREE, PARAMS, TOKENS)


@pytest.mark.parametrize(("unroll", "remat"), [(3, "none"), (1, "dots"), (2, "block")])
def test_unrolling_and_recomputing_change_nothing(plain, unroll, remat):
    loss, _, grads = plain
    other_loss, _, other_grads = run(dataclasses.replace(THREE, scan_unroll=unroll, remat=remat), PARAMS, TOKENS)
    assert_close(other_loss, loss, 1e-6)
    for path, g in grads.items():
        assert_close(other_grads[path], g, 1e-5)


def test_dots_keeps_matrix_products_and_block_keeps_none():
    def count(remat: str) -> dict[str, int]:
        text = compiled(gradients, dataclasses.replace(THREE, remat=remat)).lower(PARAMS, TOKENS).as_text()
        return {op: text.count(f"stablehlo.{op}") for op in ("dot_general", "exponential")}

    none, dots, block = (count(remat) for remat in ("none", "dots", "block"))
    assert dots["exponential"] == block["exponential"] == none["exponential"] + 2  # GELU and softmax, once more
    assert dots["dot_general"] == none["dot_general"] + 2  # QKᵀ and its product with V, which grow with T²
    assert block["dot_general"] == none["dot_general"] + 5  # and all others of a block but the last


def test_bfloat16_stays_near_float32(plain):
    """8 bits of mantissa: 2 % of the logits' spread, 5 % of a gradient's length. What comes out is float32."""
    loss, one, grads = plain
    low = dataclasses.replace(THREE, dtype="bfloat16")
    low_loss, other, low_grads = run(low, PARAMS, TOKENS)
    assert other.dtype == np.float32
    assert jax.eval_shape(functools.partial(gpt2.hidden, low), PARAMS, TOKENS)[0].dtype == jnp.bfloat16
    one, other = one[..., : low.vocab_size], other[..., : low.vocab_size]
    assert 0 < np.sqrt(((one - other) ** 2).mean()) < 0.02 * one.std()
    assert abs(low_loss - loss) < 0.02
    for path, g in grads.items():
        assert low_grads[path].dtype == np.float32, path
        assert np.linalg.norm(low_grads[path] - g) < 0.05 * np.linalg.norm(g), path


def test_a_context_beyond_block_size_is_refused():
    """Where indexing out of range would silently give the last position again."""
    params, tokens = random_params(SMALL), random_tokens(SMALL, 1, SMALL.block_size + 1)
    with pytest.raises(AssertionError, match="7 tokens do not fit into a context of 6"):
        gpt2.forward(SMALL, params, tokens)


# ---- the vocabulary and the loss ------------------------------------------------------------------------------------


def test_padding_of_the_vocabulary_neither_wins_nor_learns(plain):
    _, all_logits, grads = plain
    V = THREE.vocab_size
    assert all_logits.shape == (2, 6, 128)
    assert (all_logits[..., V:] == -np.inf).all()
    assert np.isfinite(all_logits[..., :V]).all()
    with_padding, without = (cross_entropy(x, TOKENS[:, 1:]) for x in (all_logits, all_logits[..., :V]))
    assert_close(with_padding, without, 1e-6)
    assert all(np.isfinite(g).all() for g in grads.values())
    assert (grads["wte"][V:] == 0).all()
    assert (grads["wte"][:V] != 0).any(-1).all()


def test_a_vocabulary_of_128_has_no_padding():
    cfg = dataclasses.replace(SMALL, vocab_size=128)
    all_logits = gpt2.head(cfg, random_params(cfg), jnp.ones((1, cfg.n_embd)))
    assert all_logits.shape == (1, 128)
    assert np.isfinite(all_logits).all()


@given(
    shape=st.sampled_from([(1, 1, 1), (2, 3, 5), (3, 1, 9)]),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_cross_entropy_and_its_gradient_equal_numpy(shape, scale, seed):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * scale).astype("float32")
    targets, g = rng.integers(shape[-1], size=shape[:-1]), rng.normal(size=shape[:-1]).astype("float32")
    wide = x.astype("float64") - x.max(-1, keepdims=True)
    log_softmax = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_softmax, targets[..., None], -1)[..., 0]
    ours, backward = jax.vjp(jax.jit(cross_entropy), x, targets)
    assert ours.shape == shape[:-1]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * max(scale, 1))
    gradient = (np.exp(log_softmax) - np.eye(shape[-1])[targets]) * g[..., None]
    np.testing.assert_allclose(backward(g)[0], gradient, rtol=1e-5, atol=2e-6)


def test_the_gradient_of_a_bias_is_summed_in_float32():
    """As it is written: XLA:CPU would sum in float32 anyway, and a GPU does not."""
    layer, x = gpt2.Linear((1,), (1,), bias=True), jnp.ones((1000, 1), jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    gradient = jax.grad(lambda params: layer.apply(params, x).astype(jnp.float32).sum())  # pyright: ignore
    sums = re.findall(r":(\w+)\[\d*\] = reduce_sum", str(jax.make_jaxpr(gradient)(params)))
    assert sums
    assert set(sums) == {"f32"}
    assert gradient(params)["params"]["bias"] == 1000


# ---- dropout --------------------------------------------------------------------------------------------------------

RATE = 0.25
DROPPED = dataclasses.replace(SMALL, block_size=16, n_embd=32, dropout=RATE)
WITHOUT = dataclasses.replace(DROPPED, dropout=0.0)
CONTEXT = random_tokens(DROPPED, 2, DROPPED.block_size)
KEYS = 400


def vectors(cfg: ModelConfig, params, seed: int | None = None) -> np.ndarray:
    """hidden for CONTEXT: [B, T, C] without a seed, else [KEYS, B, T, C] for as many keys."""
    if seed is None:
        return np.asarray(compiled(gpt2.hidden, cfg)(params, CONTEXT)[0])
    keys = jax.random.split(jax.random.key(seed), KEYS)
    return np.asarray(compiled(for_many_keys, cfg)(params, keys))


def for_many_keys(cfg: ModelConfig, params, keys):
    return jax.vmap(lambda key: gpt2.hidden(cfg, params, jnp.asarray(CONTEXT), key)[0])(keys)


def only(cfg: ModelConfig, **values: Any) -> dict[str, Any]:
    """Parameters that are zero, but for unit scales and `values`: with c_proj zero, a branch adds only its bias."""
    flat = {path: np.full(s, path.endswith("scale"), "float32") for path, s in shapes(cfg).items()}
    for path, value in values.items():
        flat[path] = np.broadcast_to(value, flat[path].shape).astype("float32")
    return jax.tree.map(jnp.asarray, unflatten_dict(flat, sep="/"))


def test_masks_have_the_rate_and_their_bits_do_not_hang_together():
    """Over 64 keys: the share kept, neighbours in either direction, and the same entry under the next key."""
    keys = jax.random.split(jax.random.key(0), 64)
    kept = np.asarray(
        jax.vmap(lambda key: dropout.keep(RATE, dropout.words(key), dropout.numbers((64, 64))))(keys), "float64"
    )
    noise = 1 / kept.size**0.5
    assert abs(kept.mean() - (1 - RATE)) < 5 * noise
    z = (kept - kept.mean()) / kept.std()
    for axis in range(3):
        for lag in (1, 2, 3, 32):
            assert abs((z * np.roll(z, lag, axis)).mean()) < 5 * noise, (axis, lag)
    counts = kept.sum((1, 2))
    assert counts.std() == pytest.approx((4096 * RATE * (1 - RATE)) ** 0.5, rel=0.35)


def test_any_part_of_a_mask_can_be_had_alone():
    words = dropout.words(jax.random.key(3))
    whole = dropout.keep(RATE, words, dropout.numbers((3, 5, 7)))
    part = dropout.keep(RATE, words, dropout.numbers((2, 4), first=35 + 2 * 7 + 1, strides=(7, 1)))
    assert (whole[1, 2:4, 1:5] == part).all()


def test_dropout_needs_a_key_and_a_rate():
    params = jax.tree.map(jnp.asarray, random_params(DROPPED))
    without = vectors(WITHOUT, params)
    assert (vectors(DROPPED, params) == without).all()
    key = jax.random.key(0)
    with_key, no_key = (
        str(jax.make_jaxpr(functools.partial(gpt2.forward, WITHOUT))(params, CONTEXT, **drop))
        for drop in ({"dropout_key": key}, {})
    )
    assert "random" not in with_key  # a rate of 0 draws nothing
    assert with_key.count("dot_general") == no_key.count("dot_general")
    dropped = vectors(DROPPED, params, 0)
    assert (vectors(DROPPED, params, 0) == dropped).all()
    assert (vectors(DROPPED, params, 1) != dropped).any(-1).all()
    assert (dropped != without).any(-1).all()
    assert (dropped[0] != dropped[1]).any(-1).all()
    drop_all = functools.partial(gpt2.forward, DROPPED)
    drawn = str(jax.make_jaxpr(drop_all)(params, CONTEXT, dropout_key=key))
    assert "random_bits" in drawn  # `forward` passes its key on


def test_dropout_of_embeddings_keeps_their_mean():
    """Blocks that add nothing, so that what comes out is the embedding: dropped, or scaled up."""
    x = np.random.default_rng(0).uniform(1, 2, (DROPPED.padded_vocab_size, DROPPED.n_embd))
    params = only(DROPPED, wte=x)
    many, without = vectors(DROPPED, params, 0), vectors(WITHOUT, params)
    assert_close(many, np.where(many == 0, 0, without / (1 - RATE)), 1e-5)
    assert (many == 0).mean() == pytest.approx(RATE, abs=0.01)
    assert_close(many.mean(0), without, 6 * 2 * (RATE / (1 - RATE) / KEYS) ** 0.5)  # 6 standard errors
    assert ((many[:, 0] == 0) != (many[:, 1] == 0)).any()  # the rows of a batch lose different entries


def test_dropout_hits_both_residual_branches_of_each_layer_independently():
    """Embeddings are zero, and each of the four branches adds 1: dropped, or scaled up to 4/3."""
    params = only(DROPPED, **{"h/attn/c_proj/bias": 1, "h/mlp/c_proj/bias": 1})
    assert (vectors(WITHOUT, params) == 4).all()
    kept = vectors(DROPPED, params, 0) * (1 - RATE)
    assert_close(kept, kept.round(), 1e-5)
    share = np.bincount(kept.round().astype(int).ravel(), minlength=5) / kept.size
    binomial = [1 / 256, 12 / 256, 54 / 256, 108 / 256, 81 / 256]  # 4 draws that keep with probability 3/4
    assert_close(share, binomial, 0.005)


def test_dropout_hits_attention_weights():
    """Embeddings are zero and each value is 1, so the output is the sum of the weights, each 1/(t+1): of those kept."""
    H, D, C, T = DROPPED.n_head, DROPPED.head_dim, DROPPED.n_embd, DROPPED.block_size
    values, projection = np.zeros((2, 3, H, D)), np.zeros((2, H, D, C))
    values[0, 2] = 1
    projection[0] = np.eye(C).reshape(H, D, C)  # heads side by side; the second layer adds nothing
    params = only(DROPPED, **{"h/attn/c_attn/bias": values, "h/attn/c_proj/kernel": projection})
    out = vectors(DROPPED, params, 0).reshape(KEYS, 2, T, H, D)
    sums = out.max(-1)  # residual dropout takes some of the D equal entries, and scales up the rest
    kept = sums * (1 - RATE) ** 2 * np.arange(1, T + 1)[:, None]
    assert_close(kept, kept.round(), 1e-4)
    assert kept.mean((0, 1, 3)).sum() / (T * (T + 1) / 2) == pytest.approx(1 - RATE, abs=0.01)
    assert (kept[..., 0] != kept[..., 1]).any()  # heads differ
    assert (kept[:, 0] != kept[:, 1]).any()  # rows differ
