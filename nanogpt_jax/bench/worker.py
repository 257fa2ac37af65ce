"""The measuring process of `nanogpt-jax bench`: one engine, asked by bench.py over its standard input.

`python -m nanogpt_jax.bench.worker ORDER`, which is JSON: the kind of work, the engine, the settings and the options.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config, UserError, parse
from nanogpt_jax.host import runtime
from nanogpt_jax.model import sizes

PEER = "nanogpt_jax.bench.torch_peer"  # imported only for --versus


def work(order: dict[str, Any]) -> None:
    """Answer the parent's questions, one JSON line each, until it asks for the end."""
    out, sys.stdout = sys.stdout, sys.stderr  # so that libraries do not print into the answers
    values = parse.flatten(order["cfg"], "bench")
    cfg = config.merge(Config(), values, "bench")
    engines: dict[tuple[str, str], Callable[..., Any]] = {
        ("train", "jax"): _jax_train,
        ("train", "torch"): _torch_train,
        ("train", "torch.compile"): _torch_train,
        ("decode", "jax"): _jax_decode,
        ("decode", "transformers"): _transformers_decode,
        ("data", "jax"): _data,
    }
    run: Callable[[], int] = lambda: 0  # noqa: E731
    facts: dict[str, Any] = {}
    peak_memory = 0
    for question in sys.stdin:
        try:
            if question.strip() == "start":
                run, facts = engines[order["work"], order["engine"]](cfg, order)
                run()
                answer = {"seconds": time.time() - order["began"], **facts}
                run()  # warm
            elif question.strip() == "measure":
                tokens, began = 0, time.perf_counter()
                while (seconds := time.perf_counter() - began) < float(order["seconds"]):
                    tokens += run()
                peak_memory = peak_memory or _peak_memory(order["engine"])  # before the arrays of the limits
                answer = {"tokens_per_second": tokens / seconds}
                if order["engine"] == "jax":
                    computes = order["work"] != "data"  # who only reads has no share of them: seconds a round
                    answer |= _limits() if computes else dict.fromkeys(("peak_flops", "bandwidth"), float("inf"))
            else:
                answer = {"peak_memory_bytes": peak_memory}
        except ImportError as e:
            answer = {"error": f"{e}\n       pip install 'nanogpt-jax[compare]'"}
        except UserError as e:
            answer = {"error": str(e)}
        except (RuntimeError, MemoryError) as e:
            if not (words := cli.out_of_memory(e)):
                raise
            answer = {"error": words}
        print(json.dumps(answer), file=out, flush=True)


def _peak_memory(engine: str) -> int:
    """Peak memory in bytes: of the device if it counts them, else of this process."""
    if engine == "jax":
        import jax

        stats = jax.devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"]
    elif held := importlib.import_module(PEER).peak_memory():
        return held
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device() -> str:
    import jax

    device = jax.devices()[0]
    return device.device_kind if device.platform == "cpu" else f"{device.platform} ({device.device_kind})"


def _limits() -> dict[str, float]:
    """The machine's peak, measured now: FLOP/s, and bytes read a second.

    On a GPU with random numbers, because it computes faster on equal ones, drawing less power.
    """
    import jax
    import jax.numpy as jnp

    is_cpu = jax.default_backend() == "cpu"
    # 512 MB, as 124M's weights: a quarter of 256 may lie in caches. 4 GB: a call costs a card some microseconds
    n, rows = (2048, 2**14) if is_cpu else (8192, 2**17)

    def numbers(shape: tuple[int, int], dtype: jax.typing.DTypeLike) -> jax.Array:
        if is_cpu:
            return jnp.ones(shape, dtype)
        return jax.jit(jax.random.normal, static_argnums=(1, 2))(jax.random.key(0), shape, dtype)

    a = numbers((n, n), jnp.float32 if is_cpu else jnp.bfloat16)
    big, vector = numbers((rows, 8192), jnp.float32), jnp.ones(8192)
    product = jax.jit(jnp.matmul)
    peak = 2 * n**3 / _quickest(lambda: product(a, a).block_until_ready())
    bandwidth = big.nbytes / _quickest(lambda: product(big, vector).block_until_ready())  # dominated by reading
    return {"peak_flops": peak, "bandwidth": bandwidth}


def _quickest(call: Callable[[], Any], times: int = 8) -> float:
    call()
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


def _jax_train(cfg: Config, order: dict[str, Any]):
    import jax
    import numpy as np

    from nanogpt_jax.distributed.mesh import make_mesh, room, start
    from nanogpt_jax.model import execution
    from nanogpt_jax.training.compiled import CompiledStep
    from nanogpt_jax.training.language_model import next_token
    from nanogpt_jax.training.optim import make_optimizer
    from nanogpt_jax.training.state import init_state
    from nanogpt_jax.training.step import make_train_step

    platform, mesh = start(), make_mesh(cfg.mesh)
    cfg, how = execution.choose(cfg, platform, mesh.size, room(mesh))
    tx, task, K = make_optimizer(cfg.optim, cfg.train.steps), next_token(cfg.model), how.steps_per_dispatch
    step = make_train_step(cfg, tx, mesh, task, how)
    state = init_state(step.born, cfg.train.seed)
    shape = (K, cfg.train.batch_size, cfg.model.block_size + 1)
    tokens = jax.device_put(
        np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, dtype=np.int32), step.layout
    )
    program, runs = CompiledStep(step, state, tokens), 0

    def run() -> int:
        nonlocal state, runs
        if runs == 1:
            program.improve(at_once=True)  # as in a long run; not counted in the time to the first step
        state, metrics = program(state, tokens, K, step.dials(0))
        jax.block_until_ready(metrics["loss"])
        runs += 1
        return K * cfg.train.batch_size * cfg.model.block_size

    return run, {"flops_per_token": sizes.flops_per_token(cfg.model), "bytes_per_token": 0, "device": _device()}


def _torch_train(cfg: Config, order: dict[str, Any]):
    import numpy as np

    step = importlib.import_module(PEER).make_step(cfg, order["engine"] == "torch.compile")
    shape = (cfg.train.batch_size, cfg.model.block_size + 1)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape)

    def run() -> int:
        step(tokens)
        return cfg.train.batch_size * cfg.model.block_size

    return run, {"flops_per_token": sizes.flops_per_token(cfg.model), "bytes_per_token": 0}


def _decode_facts(cfg: Config, order: dict[str, Any]) -> dict[str, float]:
    """A step reads every weight once for the whole batch, and the filled part of each text's cache."""
    m, B, P, new = cfg.model, *(int(order[name]) for name in ("batch", "prompt", "new"))
    N = sizes.n_params(m) - m.block_size * m.n_embd
    cached = 2 * m.n_layer * m.n_embd * (P + new / 2)  # keys and values
    return {"flops_per_token": 2 * N, "bytes_per_token": (N / B + cached) * (4 if m.dtype == "float32" else 2)}


def _jax_decode(cfg: Config, order: dict[str, Any]):
    import jax
    import numpy as np

    from nanogpt_jax.distributed.mesh import start
    from nanogpt_jax.inference import generate, sampler
    from nanogpt_jax.model import execution, gpt2

    cfg = replace(cfg, model=execution.resolve(cfg.model, start()))
    B, P, new = (int(order[name]) for name in ("batch", "prompt", "new"))
    rules = generate.Rules(temperature=0)
    params = jax.jit(lambda: gpt2.init_params(cfg.model, jax.random.key(0)))()
    params = generate.for_decoding(cfg.model, params)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (B, P), dtype=np.int32)
    lengths, seed = np.full(B, P, np.int32), np.uint32(0)
    S = sampler.cache_length(P + new, cfg.model.block_size)

    def run() -> int:
        _, state, _ = generate.prefill(
            cfg.model, rules, params, tokens, lengths, None, seed, np.int32(0), cache_length=S
        )
        for done in range(1, new, 16):
            n = np.int32(min(16, new - done))
            drawn, state = generate.decode(cfg.model, rules, params, state, seed, np.int32(done), n, chunk=16)
            jax.device_get(drawn)  # as streaming text would
        return B * new

    return run, {**_decode_facts(cfg, order), "device": _device()}


def _transformers_decode(cfg: Config, order: dict[str, Any]):
    import numpy as np

    B, P, new = (int(order[name]) for name in ("batch", "prompt", "new"))
    generate = importlib.import_module(PEER).make_generate(cfg.model)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (B, P))

    def run() -> int:
        generate(tokens, new)
        return B * new

    return run, _decode_facts(cfg, order)


def _data(cfg: Config, order: dict[str, Any]):
    import numpy as np

    from nanogpt_jax.data import batches
    from nanogpt_jax.data.dataset import open_data

    data, t, steps = open_data(cfg.data), cfg.train, iter(range(2**40))

    def run() -> int:
        of_call = np.arange(8) + next(steps) * 8
        stack = batches.batch(
            data.train, seed=t.seed, step=of_call, batch_size=t.batch_size, block_size=cfg.model.block_size
        )
        return stack[..., 1:].size

    return run, {"flops_per_token": 0, "bytes_per_token": 0, "device": _device()}


if __name__ == "__main__":
    runtime.set_up()
    work(json.loads(sys.argv[1]))
