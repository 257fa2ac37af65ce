"""Optimizers and learning-rate schedules: optax's, in two tables. Adding one is a function and an entry."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from nanogpt_jax.config import OptimConfig
from nanogpt_jax.distributed.sharding import path_name
from nanogpt_jax.training.spikes import skipping

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
Numbers = dict[str, jax.typing.ArrayLike]
NUMBERS = ("beta1", "beta2", "weight_decay", "grad_clip", "skip_spikes")  # of OptimConfig
SWITCHES = ("grad_clip", "skip_spikes")  # of these, what 0 turns off


def is_matrix(path: tuple, _leaf: object) -> bool:
    """Whether weight decay applies: to embeddings and kernels, not to biases and layer norms.

    Decided by name: with the layer axis, a bias has the shape of a matrix.
    """
    return path_name(path).endswith(("kernel", "wte", "wpe"))


def decay_mask(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _muon_axes(params: optax.Params) -> optax.Params:
    """Which axes of each kernel are one matrix to Muon; the others (layers; query, key, value) are a batch."""
    axes = {
        "c_attn/kernel": MuonDimensionNumbers(1, (3, 4)),  # [L, C, 3, H, D]
        "attn/c_proj/kernel": MuonDimensionNumbers((1, 2), 3),  # [L, H, D, C]
        "mlp/c_fc/kernel": MuonDimensionNumbers(1, 2),
        "mlp/c_proj/kernel": MuonDimensionNumbers(1, 2),
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, _: next((a for name, a in axes.items() if path_name(path).endswith(name)), None), params
    )


def _adamw(cfg: OptimConfig, rate: Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, cfg.beta1, cfg.beta2, weight_decay=cfg.weight_decay, mask=decay_mask)


def _lion(cfg: OptimConfig, rate: Schedule) -> optax.GradientTransformation:
    return optax.lion(rate, cfg.beta1, cfg.beta2, weight_decay=cfg.weight_decay, mask=decay_mask)


def _muon(cfg: OptimConfig, rate: Schedule) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the kernels in the blocks, AdamW for embeddings, biases and norms.

    `consistent_rms` gives Muon's updates the size of Adam's (Liu et al. 2025), so that one learning rate serves both.
    The preconditioning saves one of five Newton-Schulz steps (Boissin et al. 2025). We take three: a fourth gains too
    little for its time.
    """
    return muon(
        rate,
        ns_steps=3,
        preconditioning="aol",
        beta=cfg.beta1,
        weight_decay=cfg.weight_decay,
        adam_b1=cfg.beta1,
        adam_b2=cfg.beta2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_muon_axes,
    )


def _sgd(cfg: OptimConfig, rate: Schedule) -> optax.GradientTransformation:
    """Nesterov momentum. As in the others, the decay is decoupled: it does not enter the momentum."""
    return optax.chain(
        optax.trace(cfg.beta1, nesterov=True),
        optax.add_decayed_weights(cfg.weight_decay, decay_mask),
        optax.scale_by_learning_rate(rate),
    )


OPTIMIZERS: dict[str, Callable[[OptimConfig, Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}


def _cosine(peak: float, end: float, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, steps, end / peak)


def _linear(peak: float, end: float, steps: int) -> optax.Schedule:
    return optax.linear_schedule(peak, end, steps)


def _wsd(peak: float, end: float, steps: int) -> optax.Schedule:
    """Warm-up, stable, decay: linear decay in the last fifth (Hu et al. 2024)."""
    return optax.linear_schedule(peak, end, max(steps // 5, 1), transition_begin=steps - max(steps // 5, 1))


def _constant(peak: float, end: float, steps: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


SCHEDULES: dict[str, Callable[[float, float, int], optax.Schedule]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "constant": _constant,
}


def make_schedule(cfg: OptimConfig, steps: int) -> Schedule:
    """Step (0 is the first) -> learning rate: linear warm-up to the peak, then the schedule.

    The first step's rate is peak / warmup_steps, not 0, which would waste a step.
    """
    peak, end = cfg.learning_rate, cfg.learning_rate * cfg.min_learning_rate
    after = SCHEDULES[cfg.schedule](peak, end, max(steps - cfg.warmup_steps, 1))
    if not cfg.warmup_steps:
        return after  # pyright: ignore[reportReturnType]
    warmup = optax.linear_schedule(peak / cfg.warmup_steps, peak, max(cfg.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [cfg.warmup_steps])  # pyright: ignore[reportReturnType]


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The whole chain from gradient to update: clip by global norm, then the optimizer with its schedule.

    Its `update` takes `rate`, instead of the schedule's, and `numbers`, instead of those of `cfg`: a compiled step has
    them as arguments. With cfg.skip_spikes it takes the loss, too, as `value`.
    """

    def chain(cfg: OptimConfig, rate: Schedule) -> optax.GradientTransformation:
        tx = OPTIMIZERS[cfg.name](cfg, rate)
        return optax.chain(optax.clip_by_global_norm(cfg.grad_clip), tx) if "grad_clip" in own else tx

    own = numbers_of(cfg)
    scheduled = chain(cfg, make_schedule(cfg, steps))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        rate: jax.Array | None = None,
        numbers: Numbers | None = None,
        **_: object,
    ):
        tx = scheduled
        if rate is not None:
            tx = chain(dataclasses.replace(cfg, **(numbers or {})), lambda _: rate)  # pyright: ignore[reportArgumentType]
        updates, state = tx.update(updates, state, params)
        if cfg.freeze_layers or cfg.freeze_embeddings:
            # weight decay moves what has no gradient; x + -0.0 is x for every x, and x + 0.0 is not for -0.0
            updates = with_frozen(cfg, updates, -0.0)
        return updates, state

    whole = optax.GradientTransformationExtraArgs(scheduled.init, update)
    return skipping(whole, cfg.skip_spikes) if cfg.skip_spikes else whole


def numbers_of(cfg: OptimConfig) -> Numbers:
    """What `update` takes as `numbers`, each [] float32. Without clipping or skipping it is another program."""
    return {name: np.float32(getattr(cfg, name)) for name in NUMBERS if name not in SWITCHES or getattr(cfg, name)}


def with_frozen(cfg: OptimConfig, tree: optax.Updates, value: float) -> optax.Updates:
    """`tree`, gradients or updates of the parameters, with `value` for the frozen ones."""

    def fill(path: tuple, x: jax.Array) -> jax.Array:
        name = path_name(path)
        if cfg.freeze_embeddings and name in ("wte", "wpe"):
            return jnp.full_like(x, value)
        if cfg.freeze_layers and name.startswith("h/"):  # [L, ...]
            return x.at[: cfg.freeze_layers].set(value)
        return x

    return jax.tree_util.tree_map_with_path(fill, tree)
