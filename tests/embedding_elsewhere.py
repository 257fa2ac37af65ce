"""Compiles the gradient of the token embedding alone for hardware that is not here, where XLA has had faults. By hand.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tests/embedding_elsewhere.py v4:2x2x1 [CONFIG] [--FLAG VALUE ...]
    JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python tests/embedding_elsewhere.py h100:TARGET.txtpb gpt2 ...

The first needs jax[tpu], the second jax[cuda13] and a description of the card in XLA's text format. With dropout, the
all-reduce has to be `in a loop`, once a micro-batch (nanogpt_jax/distributed/README.md). The whole step is compiled by
nanogpt-jax plan --compile.
"""

import collections
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from nanogpt_jax import config
from nanogpt_jax.distributed.sharding import shard
from nanogpt_jax.model import execution
from nanogpt_jax.training.optim import make_optimizer
from nanogpt_jax.training.step import make_train_step
from nanogpt_jax.training.task import Objective


def embedding_alone(V: int, C: int, T: int) -> Objective:
    """A token embedding [V, C] and a loss that is linear in it, in whole numbers, so that the gradient is exact.

    The loss of rows [B, T] of tokens is the mean over rows of the sum over t, c of (1 + (t + c) mod 8) · wte[token, c].
    """
    weights = 1.0 + (np.arange(T)[:, None] + np.arange(C)) % 8

    def loss(params, rows, key=None):
        return jnp.einsum("btc,tc->", params["wte"][rows], jnp.float32(weights)) / len(rows)

    return Objective(lambda key: {"wte": jnp.zeros((V, C))}, loss, T)


def devices(target: str) -> tuple[str, list]:
    name, _, rest = target.partition(":")
    if name == "h100":
        card = Path(rest).read_text()
        return "gpu", topologies.get_topology_desc(
            "h100", platform="cuda", topology="1x4x1", target_config=card
        ).devices
    return "tpu", topologies.get_topology_desc(target, platform="tpu").devices


def main(target: str, argv: list[str]) -> None:
    platform, there = devices(target)
    cfg = config.load(argv).cfg
    model = replace(cfg.model, vocab_size=cfg.model.vocab_size or 50257)
    if platform == "gpu" and model.attention == "auto" and model.dtype == "bfloat16":
        model = replace(model, attention="cudnn")  # `auto` tries it on the card, and there is none
    m = cfg.mesh
    shape = [len(there) // abs(m.fsdp * m.tensor) if m.data == -1 else m.data, m.fsdp, m.tensor]
    mesh = Mesh(
        np.array(there[: int(np.prod(shape))]).reshape(shape),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
    )
    cfg = replace(cfg, model=model, train=replace(cfg.train, steps_per_dispatch=1))
    cfg, how = execution.choose(cfg, platform, mesh.size)
    tx = make_optimizer(cfg.optim, cfg.train.steps)
    objective = embedding_alone(cfg.model.padded_vocab_size, cfg.model.n_embd, cfg.model.block_size)
    tokens = jax.ShapeDtypeStruct((1, cfg.train.batch_size, objective.row_length), np.int32)
    step = make_train_step(cfg, tx, mesh, objective, how)
    compiled = step.jitted.lower(
        step.state, tokens, jax.ShapeDtypeStruct((), np.int32, sharding=shard(mesh)), step.dials(0)
    ).compile()

    text = compiled.as_text()
    # per computation: the body of a loop runs many times
    kinds = collections.Counter()
    for part in re.split(r"\n\n", text):
        where = "once" if "\nENTRY" in "\n" + part or part.startswith("ENTRY") else "in a loop or a branch"
        found = re.findall(r" = [^=]*? (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(", part)
        kinds.update(f"{kind} {where}" for kind in found)
    print(f"{target}: between devices: {dict(kinds) or 'nothing'}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
