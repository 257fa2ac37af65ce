"""The heart: state and tokens in, state and metrics out, one jitted call."""

# B batch, T time, G micro-batches, K steps in a dispatch

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nanogpt_jax.config import ClassifierConfig, Config, ModelConfig, UserError
from nanogpt_jax.distributed.mesh import batch_ways
from nanogpt_jax.distributed.sharding import BATCH, shard, shardings
from nanogpt_jax.model import classifier, gpt2, losses
from nanogpt_jax.training.optim import make_schedule, with_frozen

MANY_LOGITS = 2**24  # 64 MiB; below that, the fewer operations are the better ones
Metrics = dict[str, jax.Array]
# (model, params, rows [B, W] int32, dropout key or None) -> mean nats []
Loss = Callable[[ModelConfig, gpt2.Params, jax.Array, jax.Array | None], jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. `step` counts the updates made."""

    step: jax.Array  # [] int32
    params: gpt2.Params
    opt_state: optax.OptState


def state_shardings(cfg: Config, tx: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """The state's shapes, and where each leaf lies."""
    shapes = jax.eval_shape(lambda: _fresh(cfg, tx))
    return shapes, shardings(mesh, shapes)


def init_params(cfg: Config) -> gpt2.Params:
    """Initial weights of a language model, or of a classifier."""
    key = jax.random.key(cfg.train.seed)
    if isinstance(cfg, ClassifierConfig):
        return classifier.init_params(cfg.model, cfg.classify.n_labels, key)
    return gpt2.init_params(cfg.model, key)


def _fresh(cfg: Config, tx: optax.GradientTransformation, given: gpt2.Params | None = None) -> TrainState:
    params = init_params(cfg)
    if given is not None:  # a classifier's head is not among them
        params = {**params, **given, "wpe": given["wpe"][: cfg.model.block_size]}
    return TrainState(jnp.int32(0), params, tx.init(params))


def init_state(
    cfg: Config, tx: optax.GradientTransformation, mesh: Mesh, params: gpt2.Params | None = None
) -> TrainState:
    """The state at step 0, born sharded: no device ever holds more than its part. Weights depend on the seed alone.

    Or they are `params`, of which a shorter context takes the first positions.
    """
    _, layout = state_shardings(cfg, tx, mesh)
    return jax.jit(functools.partial(_fresh, cfg, tx), out_shardings=layout)(params)


def make_train_step(
    cfg: Config, tx: optax.GradientTransformation, mesh: Mesh, steps_per_dispatch: int = 1, loss: Loss | None = None
) -> Callable[[TrainState, jax.Array, jax.typing.ArrayLike], tuple[TrainState, Metrics]]:
    """(state, tokens [K, B, T+1] int32, n <= K) -> the state n steps later, and metrics of [K] float32 each.

    Another `loss` than next-token prediction may have other rows than T+1 tokens.

    The loop's length n is a run-time value, so one program serves a full dispatch, the last short one and a single
    step, and every step is computed by the same instructions wherever a run was cut: that makes resuming exact.
    Metrics: loss (nats a token, before the update), grad_norm (before clipping), learning_rate. The state is donated.
    """
    K, t = steps_per_dispatch, cfg.train
    loss_of = loss or functools.partial(mean_loss, in_pieces=_is_one_cpu(mesh))
    ways = batch_ways(mesh)
    if (t.micro_batch or t.batch_size) % ways:
        name = "train.micro_batch" if t.micro_batch else "train.batch_size"
        raise UserError(f"{name}={t.micro_batch or t.batch_size} must be a multiple of mesh data * fsdp = {ways}")
    schedule = make_schedule(cfg.optim, t.steps)
    _, layout = state_shardings(cfg, tx, mesh)
    dropout_key = jax.random.key(t.seed ^ 0xD409)  # apart from the key of the initial weights

    def one_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(dropout_key, state.step) if cfg.model.dropout else None
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for attention.splash, which splits itself
            loss, grads = _gradients(cfg, loss_of, mesh, state.params, tokens, key)
        grads = with_frozen(cfg.optim, grads, 0.0)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = schedule(state.step)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "learning_rate": jnp.asarray(rate, jnp.float32)}
        return TrainState(state.step + 1, params, opt_state), metrics  # pyright: ignore[reportArgumentType]

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(layout, shard(mesh, P(None, *BATCH)), None),
        out_shardings=(layout, shard(mesh)),
    )
    def train_step(state: TrainState, tokens: jax.Array, n: jax.Array):
        if K == 1:  # nothing to loop over, and a loop would make a GPU ask the host whether to go on
            state, metrics = one_step(state, tokens[0])
            return state, jax.tree.map(lambda x: x[None], metrics)

        def body(i, carry):
            state, history = carry
            state, metrics = one_step(state, tokens[i])
            return state, jax.tree.map(lambda all, new: all.at[i].set(new), history, metrics)

        history = {name: jnp.zeros(K, jnp.float32) for name in ("loss", "grad_norm", "learning_rate")}
        return lax.fori_loop(0, n, body, (state, history))

    return train_step


def _gradients(cfg: Config, loss: Loss, mesh: Mesh, params: gpt2.Params, tokens: jax.Array, key: jax.Array | None):
    """Mean loss of tokens [B, T+1] and its gradients, `micro_batch` sequences at a time: the mean over all is exact."""
    grad = jax.value_and_grad(lambda params, tokens, key: loss(cfg.model, params, tokens, key))
    grad = jax.jit(grad, inline=True)  # the second half takes the trace of the first
    B, micro = cfg.train.batch_size, cfg.train.micro_batch or cfg.train.batch_size
    if micro == B and key is None and _is_better_halved(cfg, mesh):
        layers = gpt2.unstack(params)  # one after the other, and not first all of one half's gradients in one piece
        halves = grad(layers, tokens[: B // 2], None), grad(layers, tokens[B // 2 :], None)
        loss, grads = jax.tree.map(lambda one, other: (one + other) / 2, *halves)
        return loss, gpt2.stack(grads)
    if micro == B:
        return grad(params, tokens, key)
    G = B // micro
    # Row g of micro-batch m is row g*G + m of the batch: each device cuts up the rows that it already holds.
    tokens = tokens.reshape(micro, G, -1).swapaxes(0, 1)
    # D groups of rows add up their own gradients, which meet once, behind the loop, and not once a micro-batch. (A
    # dropout mask numbers the rows of all groups, so there they go together. So they do where all three axes of the
    # mesh split: XLA ends the process when one of those is to be split by hand, "Check failed" in its partitioner.)
    D = mesh.shape["data"] if key is None and 1 in mesh.shape.values() else 1
    tokens = lax.with_sharding_constraint(tokens, shard(mesh, P(None, *BATCH)))
    keys = None if key is None else jax.random.split(key, G)

    def total(params: gpt2.Params, tokens: jax.Array, keys: jax.Array | None):
        def add(total, scanned):
            return jax.tree.map(jnp.add, total, grad(params, *scanned)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (jnp.float32(0), params))
        sums, _ = lax.scan(add, zeros, (tokens, keys))
        return jax.tree.map(lambda x: x[None], sums)  # [1, ...]; over D groups [D, ...]

    if D > 1:
        rows = (P(), P(None, "data"), P())
        total = jax.shard_map(
            total, mesh=mesh, axis_names={"data"}, in_specs=rows, out_specs=P("data"), check_vma=False
        )
    return jax.tree.map(lambda x: x.sum(0) / (G * D), total(params, tokens, keys))


def _is_better_halved(cfg: Config, mesh: Mesh) -> bool:
    """On one CPU, of two halves that know nothing of each other one gives work to the cores that wait in the other.

    Measured: 1.05 to 1.1 below 400 GFLOP a step, less than 1 above, where the products fill the cores.
    """
    return _is_one_cpu(mesh) and cfg.train.batch_size % 2 == 0 and step_flops(cfg) < 400e9


def _is_one_cpu(mesh: Mesh) -> bool:
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def step_flops(cfg: Config) -> float:
    """Floating-point operations of a step, but for those of attention: 6 for each parameter and token."""
    return 6 * gpt2.n_params(cfg.model) * cfg.train.batch_size * cfg.model.block_size


def mean_loss(
    cfg: ModelConfig,
    params: gpt2.Params,
    tokens: jax.Array,
    dropout_key: jax.Array | None = None,
    *,
    in_pieces: bool = False,
) -> jax.Array:
    """Mean cross-entropy in nats of predicting tokens [B, T+1] from position 1 on -> [] float32.

    `in_pieces`: where there are many logits, not all of them exist at a time. Not measured on a GPU.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if in_pieces and targets.size * cfg.padded_vocab_size > MANY_LOGITS:
        x = gpt2.last_norm(cfg, params, gpt2.hidden(cfg, params, inputs, dropout_key))
        return losses.cross_entropy_of_head(
            x.reshape(-1, cfg.n_embd), params["wte"], targets.reshape(-1), cfg.vocab_size
        )
    logits = gpt2.forward(cfg, params, inputs, dropout_key=dropout_key)
    return losses.cross_entropy(logits, targets).mean()


def make_predict_step(cfg: Config, mesh: Mesh) -> Callable[[gpt2.Params, jax.Array], jax.Array]:
    """(a classifier's params, rows [B, W+2] int32) -> log-probabilities of the labels [B, K] float32."""

    @functools.partial(jax.jit, in_shardings=(None, shard(mesh, BATCH)), out_shardings=shard(mesh))
    def predict_step(params: gpt2.Params, rows: jax.Array) -> jax.Array:
        tokens, lengths, _ = classifier.unpack(rows)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.nn.log_softmax(classifier.logits(cfg.model, params, tokens, lengths))

    return predict_step
