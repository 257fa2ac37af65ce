"""A step of generation as one C function, decode.c, on a CPU with a C compiler. It is built once and cached.

For a few texts, such a step does little more than read every weight once. XLA:CPU runs many products and small programs
one after the other; here, each core reads its own share of all weights, with few barriers. JAX's foreign function
interface calls it inside jitted programs. Up to rounding it equals decoding.decode_step, which runs everywhere else,
except for rows that have overrun their cache: those write garbage to another place.
"""

# B batch, C channels, V padded vocabulary

import contextlib
import ctypes
import functools
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nanogpt_jax.config import ModelConfig
from nanogpt_jax.host import files, runtime
from nanogpt_jax.model import decoding, gpt2
from nanogpt_jax.model.execution import NATIVE_TEXTS
from nanogpt_jax.model.losses import without_padding

SOURCE, NAME = Path(__file__).with_name("decode.c"), "nanogpt_jax_decode"
# Sums may be reordered. Not -ffast-math, which would change how the whole process rounds tiny numbers.
COMMON = "-O3 -std=gnu11 -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -shared -fPIC -pthread"
_LOCK = threading.Lock()
FOR_THIS_PROCESSOR = ("-march=native", "-mcpu=native", "")  # the first that the compiler accepts


def takes(cfg: ModelConfig, B: int) -> bool:
    """Whether the C function computes a step for B texts. `cfg` is resolved (model/execution.py)."""
    fits = B <= NATIVE_TEXTS and cfg.dtype == "float32" and jax.default_backend() == "cpu"
    return cfg.decode == "native" and fits and _registered()


def decode_step(cfg: ModelConfig, params: gpt2.Params, token: jax.Array, cache: decoding.Cache):
    """decoding.decode_step of B <= NATIVE_TEXTS texts: token [B] int32 -> logits [B, V] float32, the extended cache."""
    x = gpt2.embed(cfg, params, token[:, None], cache.length[:, None])[:, 0]
    C = x.shape[1]

    def norm(p: gpt2.Params) -> list[jax.Array]:
        return [p["scale"], p.get("bias", jnp.zeros(C))]

    def linear(p: gpt2.Params, n_out: int) -> list[jax.Array]:
        return [p["kernel"].reshape(n_out, -1), p.get("bias", jnp.zeros(n_out)).reshape(-1)]

    arrays: list[jax.Array] = [x, cache.length, *norm(params["ln_f"]), params["wte"]]
    results: list[Any] = [jax.ShapeDtypeStruct((len(x), len(params["wte"])), x.dtype)]
    written: dict[int, int] = {}  # the caches are updated in place
    for block, *kv in zip(params["h"], cache.k, cache.v, strict=True):
        for old in kv:
            written[len(arrays)] = len(results)
            arrays.append(old)
            results.append(jax.ShapeDtypeStruct(old.shape, old.dtype))
        attn, mlp = block["attn"], block["mlp"]
        arrays += [*norm(block["ln_1"]), *linear(attn["c_attn"], 3 * C), *linear(attn["c_proj"], C)]
        arrays += [*norm(block["ln_2"]), *linear(mlp["c_fc"], 4 * C), *linear(mlp["c_proj"], C)]
    assert all(array.dtype == jnp.float32 for array in arrays if array is not cache.length), "it reads float32 alone"
    logits, *kv = jax.ffi.ffi_call(NAME, results, input_output_aliases=written)(*arrays)
    return without_padding(logits, cfg.vocab_size), decoding.Cache(kv[::2], kv[1::2], cache.length + 1)


def _registered() -> bool:
    """Whether the function is registered with JAX. The first call finds or builds it; False if that fails."""
    with _LOCK:  # else two threads might build and register it twice
        return _register()


@functools.cache
def _register() -> bool:
    try:
        library = _library()
    except (OSError, ValueError):  # no folder to build it in, or CC is no command
        library = None
    if library is None:
        return False
    ctypes.c_int.in_dll(library, "cores").value = runtime.cores()
    jax.ffi.register_ffi_target(NAME, jax.ffi.pycapsule(library.decode), platform="cpu")
    return True


def _library() -> ctypes.CDLL | None:
    """The compiled function for this source, compiler command, JAX and processor, stored beside JAX's programs.

    Its name ends with a hash of its content, because loading a truncated library would end the process.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if os.name != "posix" or not compiler or not shutil.which(compiler[0]):
        return None
    made_of = [SOURCE.read_bytes(), compiler, COMMON, jax.__version__, runtime.processor()]
    name = f"decode-{_hash(repr(made_of).encode())}"
    place = jax.config.jax_compilation_cache_dir or ""  # pyright: ignore
    kept = Path(place).absolute() if place and "://" not in place else None
    for path in sorted(kept.glob(f"{name}-*.so")) if kept else []:
        if _is_own(path) and path.stem == f"{name}-{_hash(path.read_bytes())}":
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        built = Path(folder) / "decode.so"
        if not any(_compiles([*compiler, *flag.split()], built) for flag in FOR_THIS_PROCESSOR):
            return None
        if kept:
            with contextlib.suppress(OSError):  # it is built again next time
                _keep(built, kept / f"{name}-{_hash(built.read_bytes())}.so")
        return ctypes.CDLL(str(built))


def _is_own(path: Path) -> bool:
    """Whether only this user can have written the file: in a shared cache folder, anybody may place a link."""
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & stat.S_IWOTH


def _hash(content: bytes) -> str:
    return sha256(content).hexdigest()[:16]


def _keep(built: Path, path: Path) -> None:
    """Copy atomically, as another process may look for it."""
    with files.replacing(path) as beside:
        shutil.copy(built, beside)


def _compiles(compiler: list[str], built: Path) -> bool:
    command = [*compiler, *COMMON.split(), "-I", jax.ffi.include_dir(), str(SOURCE), "-o", str(built), "-lm"]
    try:
        return subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
