"""Where each array lies on the mesh: ordered rules from a parameter's path to a PartitionSpec."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanogpt_jax.config import UserError

Rules = tuple[tuple[str, P], ...]  # patterns of paths, and how an array with such a path is split

# The first rule that matches a path decides. `fsdp` splits arrays that would otherwise be replicated. `tensor` splits
# heads and hidden units: each device computes its own, and one sum a layer combines them.
RULES: Rules = (
    (r"wte$", P("tensor", "fsdp")),
    (r"wpe$", P(None, "fsdp")),
    (r"h/attn/c_attn/kernel$", P(None, "fsdp", None, "tensor", None)),
    (r"h/attn/c_attn/bias$", P(None, None, "tensor", None)),
    (r"h/attn/c_proj/kernel$", P(None, "tensor", None, "fsdp")),
    (r"h/mlp/c_fc/kernel$", P(None, "fsdp", "tensor")),
    (r"h/mlp/c_fc/bias$", P(None, "tensor")),
    (r"h/mlp/c_proj/kernel$", P(None, "tensor", "fsdp")),
    (r"(ln_1|ln_2|ln_f)/(scale|bias)$|c_proj/bias$", P()),
)

BATCH = P(("data", "fsdp"))  # the first axis of tokens [B, T+1]; micro-batches are cut inside the step


def path_name(path: tuple) -> str:
    """A pytree path as text: h/attn/c_attn/kernel."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def rule_for(name: str, more: Rules = ()) -> P | None:
    return next((spec for pattern, spec in RULES + more if re.search(rf"(^|/)({pattern})", name)), None)


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh, more: Rules = ()) -> P:
    """The PartitionSpec of the parameter `name`; UserError if no rule matches or a dimension is not divisible."""
    spec = rule_for(name, more)
    if spec is None:
        raise UserError(f"no sharding rule matches parameter {name} {shape}; add one to distributed/sharding.py")
    for size, axis in zip(shape, spec, strict=False):
        if axis and size % (ways := mesh.shape[axis]):
            divisors = [n for n in range(1, size + 1) if size % n == 0]
            near = {max(n for n in divisors if n < ways), min((n for n in divisors if n > ways), default=1)}
            raise UserError(
                f"mesh.{axis}={ways} does not divide a dimension of {size} of {name} {shape}\n"
                f"       nearest: {' or '.join(map(str, sorted(near)))}"
            )
    return spec


def shard(mesh: Mesh, spec: P = P()) -> NamedSharding:
    """`spec` on `mesh`; replicated by default."""
    return NamedSharding(mesh, spec)


def shardings(mesh: Mesh, tree: Any, more: Rules = ()) -> Any:
    """A NamedSharding for each leaf of `tree` (arrays or ShapeDtypeStructs): parameters, or a whole training state.
    `more`: rules for parameters that GPT-2 does not have.

    The path of an optimizer's moment ends in its parameter's path (0/mu/h/mlp/c_fc/kernel), so it is sharded alike.
    Everything else (counters, coefficients) is replicated.
    """

    def lay(path: tuple, x: jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path)
        own = name == "step" or (name.startswith("opt_state") and rule_for(name, more) is None)
        return shard(mesh, P() if own else spec_for(name, x.shape, mesh, more))

    return jax.tree_util.tree_map_with_path(lay, tree)


def laid_out(mesh: Mesh, shapes: Any, more: Rules = ()) -> Any:
    """`shapes` as ShapeDtypeStructs with the sharding of each leaf, as restoring a checkpoint needs them."""
    return jax.tree.map(lambda x, place: x.update(sharding=place), shapes, shardings(mesh, shapes, more))
