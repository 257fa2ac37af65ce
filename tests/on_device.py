"""What the default suite cannot know, since it runs on a CPU: is the model right on this device? No test: by hand.

    python tests/on_device.py        on a machine with a GPU or TPU; five minutes at the first time

Each line is a relative error, ‖ours - reference‖ / ‖reference‖, and the most that it may be; or whether two runs of
the same steps give the same bits. Exit code 1 where one is not as it should be. The references are the reference
back-end on the CPU of this machine, and GPT-2 in float64 (gpt2_numpy.py).
"""

import functools
import os
import sys
from dataclasses import replace

import gpt2_numpy
import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_jax.config import Config, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from nanogpt_jax.distributed.mesh import make_mesh, start
from nanogpt_jax.inference import generate
from nanogpt_jax.model import attention, decoding, execution, gpt2
from nanogpt_jax.training.language_model import mean_loss, next_token
from nanogpt_jax.training.optim import make_optimizer
from nanogpt_jax.training.state import init_state
from nanogpt_jax.training.step import make_train_step

ON = {
    "cpu": ["reference", "blocked", "xla"],
    "gpu": ["reference", "xla", "cudnn"],
    "tpu": ["reference", "xla", "splash"],
}
MOST = {"float32": 1e-5, "bfloat16": 2e-2, "default": 2e-3}  # default: products of float32 in TF32 or less
MODEL = ModelConfig(block_size=256, vocab_size=1000, n_layer=3, n_head=3, n_embd=192, bias=True)
wrong = 0


def report(what: str, error: float, most: float) -> None:
    global wrong
    is_wrong = not error <= most
    wrong += is_wrong
    print(f"{what:<68}{error:>10.1e} of {most:.0e}{'  WRONG' if is_wrong else ''}", flush=True)


def error(ours, reference) -> float:
    ours, reference = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)]) for t in (ours, reference)
    )
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def check_attention(platform: str) -> None:
    def with_gradients(backend, g, *xs):
        value, backward = jax.vjp(backend, *xs)
        return value, *backward(g.astype(value.dtype))

    for T, D in (1024, 64), (200, 48):
        q, k, v, g = np.random.default_rng(0).normal(size=(4, 2, T, 3, D)).astype("float32")
        for dtype in ("float32", "bfloat16"):
            xs = [jnp.asarray(x, dtype) for x in (g, q, k, v)]
            with jax.default_device(jax.devices("cpu")[0]):
                wide = [jnp.asarray(np.asarray(x, np.float32)) for x in xs]
                expected = jax.jit(functools.partial(with_gradients, attention.reference))(*wide)
            for name in ON[platform]:
                if name == "cudnn" and dtype == "float32":
                    continue  # it has 16 bits alone
                with jax.default_matmul_precision("highest"):
                    results = jax.jit(functools.partial(with_gradients, attention.BACKENDS[name]))(*xs)
                for part, one, other in zip(("values", "dq", "dk", "dv"), results, expected, strict=True):
                    report(f"attention {name}, {dtype}, T={T} D={D}: {part}", error(one, other), MOST[dtype])


def check_model(platform: str) -> None:
    params = jax.jit(lambda: gpt2.init_params(MODEL, jax.random.key(0)))()
    params = jax.tree.map(lambda p: p * 2, params)  # scores and logits of the size that training gives them
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, MODEL.block_size + 1))
    host = jax.tree.map(np.asarray, params)
    expected = gpt2_numpy.forward(host, tokens[:, :-1], MODEL.vocab_size)
    with jax.default_device(jax.devices("cpu")[0]):
        on_cpu = execution.resolve(replace(MODEL, attention="reference"), "cpu")
        gradient = jax.jit(jax.grad(functools.partial(mean_loss, on_cpu)))(host, tokens)
    for precision, dtype in ("highest", "float32"), (None, "float32"), (None, "bfloat16"):
        cfg = execution.resolve(replace(MODEL, dtype=dtype), platform)
        most = MOST[dtype] if precision or dtype == "bfloat16" else MOST["default"]
        name = f"model, {dtype}, products {precision or 'default'}, {cfg.attention}"
        with jax.default_matmul_precision(precision):
            logits = jax.jit(functools.partial(gpt2.forward, cfg))(params, tokens[:, :-1])[..., : MODEL.vocab_size]
            report(f"{name}: logits", error(logits, expected), most)
            ours = jax.jit(jax.grad(functools.partial(mean_loss, cfg)))(params, tokens)
            report(f"{name}: gradients", error(ours, gradient), 3 * most)
            for B in 1, 2:
                laid, cache = generate.for_decoding(cfg, params), decoding.init_cache(cfg, B, MODEL.block_size)
                rows, lengths = np.arange(B), np.array([100, 120][:B], np.int32)
                _, cache = jax.jit(functools.partial(decoding.prefill, cfg))(laid, tokens[:B, :120], lengths, cache)
                after, _ = jax.jit(functools.partial(decoding.decode_step, cfg))(laid, tokens[rows, lengths], cache)
                report(f"{name}: decoding {B}", error(after[:, : MODEL.vocab_size], expected[rows, lengths]), most)


def check_repeats(platform: str) -> None:
    """A GPU adds up an embedding's gradient, and cuDNN that of the queries, in the order in which its threads come."""
    in_order = platform != "gpu" or "exclude_nondeterministic_ops" in os.environ.get("XLA_FLAGS", "")
    for dropout, dtype in (0.0, "float32"), (0.1, "bfloat16"), (0.0, "bfloat16"):
        model = replace(MODEL, dropout=dropout, dtype=dtype)
        cfg = Config(
            model=model, optim=OptimConfig("adamw", 1e-3), train=TrainConfig(batch_size=8, steps_per_dispatch=1)
        )
        cfg, how = execution.choose(cfg, platform)
        mesh, tx = make_mesh(MeshConfig()), make_optimizer(cfg.optim, cfg.train.steps)
        objective = next_token(cfg.model)
        step = make_train_step(cfg, tx, mesh, objective, how)
        runs = []
        for _ in range(2):
            state, rng = init_state(step.born, cfg.train.seed), np.random.default_rng(0)
            for i in range(20):
                rows = rng.integers(0, 1000, (1, 8, MODEL.block_size + 1), dtype=np.int32)
                state, _ = step.jitted(state, rows, np.int32(1), step.dials(i))
            runs.append(jax.device_get(state.params))
        report(f"20 steps twice, {dtype}, dropout {dropout}", error(*runs), 0.0 if in_order else 5e-3)


if __name__ == "__main__":
    platform = start()
    print(f"{platform}: {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for check in check_attention, check_model, check_repeats:
        check(platform)
    sys.exit(1 if wrong else 0)
