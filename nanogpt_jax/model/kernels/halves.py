"""The gradients of a batch from its two halves. They are independent of each other, so both cores have work."""

from collections.abc import Callable
from typing import Any

import jax


def of_halves(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """(params, rows [B, ...], key) -> the loss and its gradients, as means over the two halves of an even B."""
    gradients = jax.jit(gradients, inline=True)  # traced once, for both halves

    def both(params: Any, rows: jax.Array, key: jax.Array | None) -> Any:
        assert key is None, "a dropout mask indexes the rows of the whole batch"
        one, other = gradients(params, rows[: len(rows) // 2], None), gradients(params, rows[len(rows) // 2 :], None)
        return jax.tree.map(lambda a, b: (a + b) / 2, one, other)

    return both
