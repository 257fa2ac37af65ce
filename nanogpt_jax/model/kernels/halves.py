"""The gradients of a batch as those of its two halves, which do not depend on each other: both cores then have work."""

from collections.abc import Callable
from typing import Any

import jax


def of_halves(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """(params, rows [B, ...], key) -> the loss and its gradients, as means over two halves of an even B."""
    gradients = jax.jit(gradients, inline=True)  # the second half takes the trace of the first

    def both(params: Any, rows: jax.Array, key: jax.Array | None) -> Any:
        assert key is None, "a dropout mask numbers the rows of the whole batch"
        one, other = gradients(params, rows[: len(rows) // 2], None), gradients(params, rows[len(rows) // 2 :], None)
        return jax.tree.map(lambda a, b: (a + b) / 2, one, other)

    return both
