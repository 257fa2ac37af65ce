"""Are gloo's sums between two processes right? No test: by hand.

    python tests/gloo_sums.py MEBIBYTES TIMES

Each process holds 2 · MEBIBYTES of float32 in whole numbers, and both add them up, TIMES times: once by reduce-scatter
(lax.psum_scatter), which gives each a half, and once by all-reduce (lax.psum), which gives both the whole.
"""

import os
import socket
import subprocess
import sys


def one_process(port: str, rank: int, mebibytes: int, times: int) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=60)
    mesh = Mesh(np.array(jax.devices()), ("d",))
    half = mebibytes * 2**18  # numbers

    def scattered(x):
        return jax.lax.psum_scatter(x[0], "d", tiled=True)[None]

    def reduced(x):
        return jax.lax.psum(x[0], "d")[None]

    own = {scattered: slice(rank * half, (rank + 1) * half), reduced: slice(None)}
    jitted = {f: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))) for f in own}
    wrong = dict.fromkeys(own, 0)
    for i in range(times):
        whole = np.stack([(np.arange(2 * half) % 1009 + 7 * r + i) % 4096 for r in (0, 1)]).astype(np.float32)
        for f, part in own.items():
            x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("d")), whole[rank : rank + 1])
            found = np.asarray(jitted[f](x).addressable_shards[0].data)[0]
            wrong[f] += not np.array_equal(found, whole.sum(0)[part])
    print(
        f"jaxlib {jax.lib.__version__}, process {rank}, {mebibytes} MiB, wrong of {times}: "
        f"reduce-scatter {wrong[scattered]}, all-reduce {wrong[reduced]}"
    )


def main(mebibytes: str, times: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [subprocess.Popen([sys.executable, __file__, port, rank, mebibytes, times]) for rank in "01"]
    sys.exit(max(process.wait() for process in ranks))


if __name__ == "__main__":
    if len(sys.argv) == 5:
        one_process(sys.argv[1], *map(int, sys.argv[2:]))
    elif len(sys.argv) == 3:
        main(*sys.argv[1:])
    else:
        sys.exit(__doc__)
