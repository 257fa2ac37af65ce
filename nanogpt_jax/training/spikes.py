"""Steps that change nothing: those whose loss or gradient norm lies far above that of the steps before."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

HISTORY = 128  # kept steps that a new one is compared with; none is skipped before there are so many
LEAST = 1e-3  # the smallest spread, in logarithms: a rise of a few thousandths is no spike, however even the rest
TINY = 1e-30  # for the logarithm of a loss or a norm of 0


class Skipping(NamedTuple):
    """The state of `skipping`."""

    seen: jax.Array  # [2, HISTORY] float32, a ring: logarithms of loss and gradient norm of the last kept steps
    kept: jax.Array  # [] int32: how many steps were kept, in all
    skipped: jax.Array  # [] int32: how many were skipped, in all
    in_a_row: jax.Array  # [] int32: how many were skipped since the last kept one
    inner: optax.OptState


def skipping(
    tx: optax.GradientTransformationExtraArgs, z: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """`tx`, but a step changes nothing if its loss or its gradient norm, as logarithms, lies more than `z` standard
    deviations above the mean of the last HISTORY kept steps, or is not finite.

    `update` takes the loss as `value`, as in optax; `numbers` may hold another z, as "skip_spikes". A skipped step's
    updates are -0.0 (x + -0.0 is x for every x, and x + 0.0 is not for -0.0), and the state of `tx` stays as it was.
    Logarithms, because gradient norms are skewed: in clean runs, without them, one lay three times as often beyond 5.
    """

    def init(params: optax.Params) -> Skipping:
        zero = jnp.int32(0)
        return Skipping(jnp.zeros((2, HISTORY)), zero, zero, zero, tx.init(params))

    def update(
        updates: optax.Updates,
        state: Skipping,
        params: optax.Params | None = None,
        *,
        value: jax.Array,
        numbers: dict[str, jax.typing.ArrayLike] | None = None,
        **more: object,
    ) -> tuple[optax.Updates, Skipping]:
        raw = jnp.stack([value, optax.tree.norm(updates)])
        new = jnp.log(jnp.maximum(raw, TINY))
        limit = state.seen.mean(1) + (numbers or {"skip_spikes": z})["skip_spikes"] * state.seen.std(1).clip(LEAST)
        keep = jnp.isfinite(raw).all() & ((new <= limit).all() | (state.kept < HISTORY))

        def kept(new: jax.Array, old: jax.typing.ArrayLike) -> jax.Array:
            return jnp.where(keep, new, old)

        place = jnp.arange(HISTORY) == state.kept % HISTORY
        seen = jnp.where(keep & place, new[:, None], state.seen)
        updates, inner = tx.update(updates, state.inner, params, numbers=numbers, **more)
        return jax.tree.map(lambda x: kept(x, -0.0), updates), Skipping(
            seen,
            state.kept + keep,
            state.skipped + ~keep,
            kept(jnp.int32(0), state.in_a_row + 1),
            jax.tree.map(kept, inner, state.inner),
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def counts(state: optax.OptState) -> dict[str, jax.Array]:
    """How many steps were skipped until now, and how many of them in a row, [] float32; {} if none ever is."""
    if not isinstance(state, Skipping):
        return {}
    return {"skipped": state.skipped.astype(jnp.float32), "in_a_row": state.in_a_row.astype(jnp.float32)}
