"""Faults of XLA that a training step could meet: what guards against them, and whether our numbers are right.

distributed/README.md lists them. The gradient here is that of a token embedding alone, in whole numbers, so that any
order of adding gives the bits of numpy's.
"""

# V vocab, C channels, T time, B batch

import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from embedding_elsewhere import embedding_alone
from helpers import make_step

from nanogpt_jax.config import Config, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from nanogpt_jax.distributed.mesh import make_mesh
from nanogpt_jax.distributed.sharding import BATCH, shard, shardings
from nanogpt_jax.model import execution
from nanogpt_jax.training.gradients import make_gradients

V, B, T = 50304, 32, 64  # GPT-2's vocabulary; four micro-batches of 8


def gradient(sizes: tuple[int, ...], dropout: bool, C: int):
    """On a mesh of these sizes: the jitted gradient (params, rows [B, T]) -> {"wte": [V, C]}, and both arguments."""
    cfg = Config(
        model=ModelConfig(block_size=T, vocab_size=V, n_embd=C, n_head=1),
        train=TrainConfig(batch_size=B, micro_batch=8),
        mesh=MeshConfig(*sizes),
    )
    mesh, objective = make_mesh(cfg.mesh), embedding_alone(V, C, T)
    gradients = make_gradients(cfg, mesh, objective, execution.choose(cfg, "cpu", mesh.size)[1])
    key = jax.random.key(0) if dropout else None
    layout, rows_layout = shardings(mesh, jax.eval_shape(objective.init, jax.random.key(0))), shard(mesh, BATCH)
    jitted = jax.jit(
        lambda params, rows: gradients(params, rows, key)[1],
        in_shardings=(layout, rows_layout),
        out_shardings=layout,
    )
    params = jax.jit(objective.init, out_shardings=layout)(jax.random.key(0))
    rows = tokens()
    return jitted, params, jax.make_array_from_callback(rows.shape, rows_layout, lambda part: rows[part])


def tokens() -> np.ndarray:
    """[B, T] int32: some that occur often, as in text, and some from all of the vocabulary."""
    rng = np.random.default_rng(0)
    return np.where(rng.random((B, T)) < 0.5, rng.integers(0, 50, (B, T)), rng.integers(0, V, (B, T))).astype(np.int32)


def by_numpy(C: int) -> np.ndarray:
    """The same gradient [V, C], one token after another."""
    expected, weights = np.zeros((V, C), np.float32), 1 + (np.arange(T)[:, None] + np.arange(C)) % 8
    for row in tokens():
        np.add.at(expected, row, weights.astype(np.float32) / B)
    return expected


MESHES = [(1, 1, 1), (2, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 1), (2, 2, 2)]


@pytest.mark.parametrize("C", [64, pytest.param(768, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", MESHES)
def test_the_gradient_of_a_split_embedding_is_exact(sizes, C):
    """Each row of the vocabulary gets what its own tokens give, once, of every micro-batch and every device."""
    expected = by_numpy(C)
    for dropout in (False, True):
        jitted, params, rows = gradient(sizes, dropout, C)
        np.testing.assert_array_equal(np.asarray(jitted(params, rows)["wte"]), expected, err_msg=f"{dropout=}")


@pytest.mark.parametrize(
    ("sizes", "dropout", "apart"),
    [
        ((2, 1, 1), True, True),
        ((2, 2, 2), False, True),
        ((1, 2, 1), False, True),
        ((2, 1, 1), False, False),
        ((1, 1, 1), True, False),
    ],
)
def test_no_sum_over_devices_can_leave_the_loop_without_its_micro_batches(sizes, dropout, apart):
    """If XLA adds up over devices in the loop over micro-batches, a barrier keeps a scatter off the loop's total.

    A CPU's compiler does not show the fault; `embedding_elsewhere.py TARGET` shows what others make of it.
    """
    jitted, params, rows = gradient(sizes, dropout, 64)
    lines = [line for line in jitted.lower(params, rows).as_text().splitlines() if "optimization_barrier" in line]
    assert len(lines) == apart
    assert all(f"tensor<{V}x64xf32>" in line for line in lines)


@pytest.mark.parametrize("sizes", [(1, 2, 1), (2, 2, 2)])
def test_no_step_on_a_cpu_asks_gloo_for_a_reduce_scatter(sizes):
    """Gloo's is wrong for large arrays, with jaxlib 0.10.2; its all-reduce is right (`gloo_sums.py`)."""
    cfg = Config(
        model=ModelConfig(block_size=16, vocab_size=65, n_layer=1, n_head=4, n_embd=32),
        optim=OptimConfig(name="adamw"),
        train=TrainConfig(steps=10, batch_size=8),
        mesh=MeshConfig(*sizes),
    )
    state, rows = make_step(cfg).state, jax.ShapeDtypeStruct((1, 8, 17), np.int32)
    text = make_step(cfg).jitted.lower(state, rows, np.int32(1), make_step(cfg).dials(0)).compile().as_text()
    assert "all-reduce" in text
    assert "reduce-scatter" not in text


def one_process(port: str, rank: str, C: str) -> None:
    """One of two processes that compute the gradient together, on a mesh split in either way."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank), initialization_timeout=60)
    expected = by_numpy(int(C))
    for sizes in [(2, 1, 1), (1, 2, 1)]:
        jitted, params, rows = gradient(sizes, True, int(C))
        compiled = jitted.lower(params, rows).compile()
        assert "reduce-scatter" not in compiled.as_text()
        for _ in range(3):  # gloo's faults come and go
            for part in compiled(params, rows)["wte"].addressable_shards:
                np.testing.assert_array_equal(np.asarray(part.data), expected[part.index], err_msg=f"{sizes}")


@pytest.mark.parametrize("C", [64, pytest.param(768, marks=pytest.mark.slow)])
@pytest.mark.long
def test_two_processes_add_up_megabytes_exactly(C, clean_env, popen):
    """12 MiB of gradient between two processes; 147 MiB at the size of GPT-2."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, str(port)]
    ranks = [
        popen([*command, rank, str(C)], env=clean_env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in "01"
    ]
    for process in ranks:
        out, _ = process.communicate(timeout=60 if C == 64 else 240)
        assert process.returncode == 0, out


if __name__ == "__main__":
    one_process(*sys.argv[1:])
