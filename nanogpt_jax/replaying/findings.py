"""What one step computed: where it stopped being finite, the largest numbers of each layer, the loss of each token."""

# B batch, T time, L layers, G micro-batches

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from nanogpt_jax.config import ModelConfig
from nanogpt_jax.config.settings import MeshConfig
from nanogpt_jax.distributed.mesh import make_mesh
from nanogpt_jax.distributed.sharding import path_name
from nanogpt_jax.model import gpt2, losses
from nanogpt_jax.replaying import operations
from nanogpt_jax.replaying.operations import Evaluation, Mark, Place, Summary
from nanogpt_jax.replaying.rebuilt import Rebuilt
from nanogpt_jax.training.dials import dropout_key
from nanogpt_jax.training.gradients import make_gradients
from nanogpt_jax.training.state import TrainState
from nanogpt_jax.training.step import update

COLUMNS = ("residual", "q, k, v", "attention", "hidden", "mlp")  # what of a layer is measured
_OF_MODULES = {
    (): "residual",
    ("attn", "c_attn"): "q, k, v",
    ("attn", "c_proj"): "attention",
    ("mlp", "c_fc"): "hidden",
    ("mlp", "c_proj"): "mlp",
}
PHASES = ("loss", "gradients", "update")


@dataclass(frozen=True)
class Findings:
    """`origin`: the operation in which numbers stopped being finite, in the phase that it spoilt; None if none did."""

    phase: str
    origin: Mark
    shown: tuple[Place, str] | None  # if `origin` is an input: the first operation whose result is not finite
    loss: float  # operation by operation
    largest: dict[tuple[int | None, str], float]  # (layer, column) -> the largest distance from 0; None: beside layers
    gradients: dict[int | str, float]  # layer, or the name of a parameter beside the layers -> norm
    weights: dict[int | str, float]  # the same of the parameters before the step
    nats: np.ndarray  # [B, T] float32: the loss of each token
    spoilt: list[str]  # parameters whose gradient, or whose new value, is not finite


def find(its: Rebuilt) -> Findings:
    """The step once more on one device, operation by operation."""
    cfg, mesh = its.cfg, make_mesh(MeshConfig())
    state: TrainState = jax.device_put(its.before, mesh.devices.flat[0])
    rows, key = jax.device_put(its.rows, mesh.devices.flat[0]), None
    if cfg.model.dropout:
        key = dropout_key(its.dials, state.step)
    # by halves, JAX would name one line for all operations; it is the same to rounding
    gradients = make_gradients(cfg, mesh, its.task, replace(its.how, halves=False))
    largest: dict[tuple[int | None, str], float] = {}

    def measure(place: Place, primitive: str, found: Summary) -> None:
        if not place.is_backward and (column := _column(place, primitive)):
            known = largest.get((place.layer, column), 0.0)
            largest[place.layer, column] = max(known, found.largest if found.is_finite else np.inf)

    keys = () if key is None else (key,)

    def whole(params: Any, *keys: jax.Array) -> Any:
        return gradients(params, rows, *(keys or (None,)))

    def both(params: Any, *keys: jax.Array) -> Any:
        return whole(params, *keys), _nats(cfg.model, its.how.micro_batch, params, rows, *keys)

    args = (state.params, *keys)
    forward = Evaluation(lambda *args: whole(*args)[0], args, measure)
    phase, origin, shown = PHASES[0], forward.origins[0], forward.shown
    (loss, grads), nats = jax.jit(both)(*args)
    spoilt = _spoilt(grads)
    if origin is None and spoilt:
        backward = Evaluation(whole, args)
        phase, origin, shown = PHASES[1], operations.first(backward.origins), backward.shown
    elif origin is None and (its.wrong_after or not np.isfinite(its.metrics["grad_norm"])):

        def rest(state: TrainState, loss: jax.Array, grads: Any) -> Any:
            rate, numbers = np.asarray(its.dials.rates)[0], its.dials.numbers
            return update(its.tx, lambda *_: (loss, grads), state, rows, None, rate=rate, numbers=numbers)

        last = Evaluation(rest, (state, loss, grads))
        phase, origin, shown = PHASES[2], operations.first(last.origins), last.shown
        spoilt = _spoilt(last.outputs[0].params)
    return Findings(
        phase, origin, shown.get(origin.number) if origin else None, float(forward.outputs),
        largest, _norms(grads), _norms(state.params), np.asarray(nats), spoilt,
    )  # fmt: skip


def _column(place: Place, primitive: str) -> str:
    """What an operation of the forward pass makes, if it is one of those that are measured."""
    if primitive not in ("dot_general", "add"):
        return ""
    if place.layer is None:
        by_function = {"embed": "residual", "head": "logits", "_dot": "logits", "linear": "logits"}
        return by_function.get(place.function, "") if place.file.startswith("model/") else ""
    modules = tuple(name for name in place.modules if name.isidentifier() and name != operations.BLOCK)
    return _OF_MODULES.get(modules, "")


def _norms(tree: Any) -> dict[int | str, float]:
    """The norm of each layer, and of each parameter beside the layers."""
    found: dict[int | str, float] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, squares = path_name(path), np.square(np.asarray(leaf, np.float64))
        if name.startswith("h/"):
            for layer, total in enumerate(squares.reshape(len(squares), -1).sum(1)):
                found[layer] = found.get(layer, 0.0) + float(total)
        else:
            name = name.partition("/")[0]
            found[name] = found.get(name, 0.0) + float(squares.sum())
    return {name: float(np.sqrt(total)) for name, total in found.items()}


def _spoilt(tree: Any) -> list[str]:
    """The parameters that hold numbers that are not finite; of layers, with the first of them."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, x = path_name(path), np.asarray(leaf)
        if not np.isfinite(x).all():
            if name.startswith("h/"):
                layer = int(np.argmin(np.isfinite(x.reshape(len(x), -1)).all(1)))
                name = f"{name.removeprefix('h/')} of layer {layer + 1}"
            found.append(name)
    return found


def _nats(cfg: ModelConfig, micro_batch: int, params: Any, rows: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """[B, T]: the loss of each token, with the masks of the step."""

    def of_rows(rows: jax.Array, key: jax.Array | None) -> jax.Array:
        return losses.cross_entropy(gpt2.forward(cfg, params, rows[:, :-1], dropout_key=key), rows[:, 1:])

    B, G = len(rows), len(rows) // micro_batch
    if G == 1:
        return of_rows(rows, key)
    apart = rows.reshape(B // G, G, -1).swapaxes(0, 1)  # as training/gradients.py cuts them
    keys = None if key is None else jax.random.split(key, G)
    return jax.lax.map(lambda one: of_rows(*one), (apart, keys)).swapaxes(0, 1).reshape(B, -1)
