"""One process of a run of many, for test_processes.py: python tests/many.py OUT CASES FLAGS, CASES a JSON of flags.

Trains a little with each case, as train.py would, and process 0 writes what came out as OUT.
"""

import hashlib
import json
import sys
from typing import Any

import jax
import numpy as np
from helpers import steps_of
from jax.experimental import multihost_utils

from nanogpt_jax import cli, config
from nanogpt_jax.distributed import processes
from nanogpt_jax.distributed.mesh import start
from nanogpt_jax.distributed.sharding import path_name

STEPS = 3


def whole(tree: Any) -> Any:
    """Every process's parts of global arrays, put together, in every process."""
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def main(argv: list[str]) -> int:
    out, cases, flags = argv[0], json.loads(argv[1]), argv[2:]
    found: dict[str, np.ndarray] = {}
    with processes.joined(config.load(flags)):
        start()  # in a CPU's own thread, programs come in the same order in every process; gloo mixes up two at once
        for number, case in enumerate(cases):
            cfg = config.load([*flags, *case]).cfg
            state, losses, batches = steps_of(cfg, STEPS)
            hashes = [hashlib.sha256(whole(rows).tobytes()).hexdigest() for rows in batches]
            found[f"{number}/losses"], found[f"{number}/hashes"] = np.array(losses), np.array(hashes)
            for path, x in jax.tree_util.tree_leaves_with_path(state.params):
                name = path_name(path)
                found[f"{number}/params/{name}"] = whole(x)
                # how many bytes a device holds, and where the sharding says that they lie
                parts = {shard.data.nbytes for shard in x.addressable_shards}
                found[f"{number}/bytes/{name}"] = np.array([*parts, x.nbytes])
                found[f"{number}/spec/{name}"] = np.array(str(x.sharding.spec))
            arrays = jax.tree.leaves(state)
            held = sum(x.addressable_shards[0].data.nbytes for x in arrays), sum(x.nbytes for x in arrays)
            found[f"{number}/held"] = np.array(held)  # bytes of the whole state: on a device, and in all
        if processes.is_first():
            np.savez(out, **found)
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
