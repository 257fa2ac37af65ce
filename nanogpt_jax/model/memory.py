"""How much memory a training step takes on a device, in closed form: it allocates nothing and needs no JAX.

Shapes are exact. How often XLA holds them at its peak is fitted to what XLA says of steps that it compiled (TABLE):
it packs arrays into memory by rules of its own. `nanogpt-jax plan --compile` asks XLA itself.
"""

# B sequences of a micro-batch, T positions, C channels, L layers, H heads, V' padded vocabulary

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanogpt_jax.config import Config, ModelConfig

if TYPE_CHECKING:
    from nanogpt_jax.model.execution import Execution

Ways = tuple[int, int, int]  # into how many parts the mesh splits: data, fsdp, tensor


@dataclass(frozen=True)
class Fitted:
    """How often a step holds an array at its peak, at the head or in the backward pass, whichever is higher.

    x: [B, T, C] in the compute dtype; weights: [B, H, T, T] of attention that stores them; logits: [B, T, V'] float32.
    """

    none: float  # x that a layer keeps for its backward pass
    dots: float  # with model.remat=dots
    block: float  # with model.remat=block
    weights: float = 0  # weights that a layer keeps
    logits: float = 1  # at the head: logits,
    wte: float = 0  # wte,
    x: float = 0  # and x, beside what all layers keep
    late: float = 1  # in the backward pass: what all layers keep,
    gradients: float = 1  # all gradients,
    behind: float = 0  # logits,
    layer: float = 0  # x,
    layer_weights: float = 0  # and weights of the layer that is computed
    margin: float = 1.1  # at least: see `margin` below


# Fitted on 29 November 2026 to XLA's memory_analysis() with jax 0.10.2: for a CPU over random settings, for GPU and TPU
# ahead of time to GPT-2's on H100 and TPU v5e. distributed/README.md has the errors.
CPU = {"logits": 1.92, "x": 6.4, "late": 0.79, "behind": 0.04}
HALVED = {**CPU, "wte": 0.67, "gradients": 1.84}
WHOLE = {**CPU, "wte": 0.51, "gradients": 1.75}
LOOP = {"logits": 1.84, "wte": 2.2, "late": 0.69, "behind": 0.23, "layer": 8.1, "layer_weights": 0.85, "margin": 1.35}
TABLE = {
    "cpu reference": Fitted(21.4, 21.4, 21.4, 2.82, **WHOLE),  # unrolled, XLA merges what remat computes twice
    "cpu reference halves": Fitted(18.3, 18.3, 18.3, 2.82, **HALVED),
    "cpu blocked": Fitted(24.3, 24.3, 24.3, **WHOLE),
    "cpu blocked halves": Fitted(23.3, 23.3, 23.3, **HALVED),
    "cpu reference loop": Fitted(26.9, 19.2, 5.0, 1.39, gradients=1.17, **LOOP),
    "cpu reference loop halves": Fitted(26.9, 19.2, 5.0, 1.39, gradients=2.34, **LOOP),
    "cpu blocked loop": Fitted(28.1, 19.2, 5.0, gradients=1.17, **LOOP),
    "cpu blocked loop halves": Fitted(28.1, 19.2, 5.0, gradients=2.34, **LOOP),
    "gpu": Fitted(16, 9.53, 1.53, 3, x=3.5, layer=10, layer_weights=3),
    "tpu": Fitted(16, 9.5, 1.1, 1.8, layer=17),
}
CPU_BFLOAT16 = 4 / 3  # a CPU computes 16-bit products in 32 bits: so many times the x
GATHERED = 1.25  # times the weights of the other devices, which fsdp gathers, in the compute dtype
LESS_EXACT = 1.25  # the margin for a dtype that few use on a platform, and for a CPU with few tokens a parameter
SAVING = 2.0  # times the state while a CPU writes a checkpoint: a copy, and what is compressed
LANES, SPLASH = 128, 5.2  # a TPU pads a head's vectors to so many; x with such an axis that splash attention keeps


@dataclass(frozen=True)
class Step:
    """Bytes of a step on one device, by part; of arrays that come and go, those at the peak."""

    parameters: int
    optimizer: int
    rows: int  # tokens of the steps in a call
    activations: int
    logits: int
    gradients: int
    copies: int  # of weights, in 16 bits or in another layout

    @property
    def state(self) -> int:
        """What lives from step to step. Exact."""
        return self.parameters + self.optimizer + self.rows

    @property
    def temporary(self) -> int:
        """What a step allocates and frees."""
        return self.activations + self.logits + self.gradients + self.copies

    @property
    def total(self) -> int:
        return self.state + self.temporary


def leaves(cfg: ModelConfig) -> Iterator[tuple[str, int, bool, bool]]:
    """Each parameter: its path, its number of entries, and whether `fsdp` and `tensor` split it.

    The padding of the vocabulary is stored, so it counts. distributed/sharding.py has the rules; a test compares.
    """
    C, L = cfg.n_embd, cfg.n_layer
    yield "wte", cfg.padded_vocab_size * C, True, True
    yield "wpe", cfg.block_size * C, True, False
    for path, inputs, outputs, split in (
        ("attn/c_attn", C, 3 * C, True),
        ("attn/c_proj", C, C, False),
        ("mlp/c_fc", C, 4 * C, True),
        ("mlp/c_proj", 4 * C, C, False),
    ):
        yield f"h/{path}/kernel", L * inputs * outputs, True, True
        if cfg.bias:
            yield f"h/{path}/bias", L * outputs, False, split
    for path, n in (("h/ln_1", L), ("h/ln_2", L), ("ln_f", 1)):
        for name in ("scale", "bias") if cfg.bias else ("scale",):
            yield f"{path}/{name}", n * C, False, False


def moments(path: str, optimizer: str) -> int:
    """How many arrays of its size the optimizer keeps for a parameter."""
    if optimizer == "muon":
        return 1 if path.endswith("kernel") else 2  # AdamW for the rest
    return {"adamw": 2, "lion": 1, "sgd": 1}[optimizer]


def stored(cfg: Config, ways: Ways = (1, 1, 1)) -> tuple[int, int]:
    """Bytes of the parameters and of the optimizer's state on one device, all float32."""
    _, fsdp, tensor = ways
    parameters, state = 0, 4 * 2 * 128 if cfg.optim.skip_spikes else 0  # the history in training/spikes.py
    for path, n, by_fsdp, by_tensor in leaves(cfg.model):
        here = 4 * n // ((fsdp if by_fsdp else 1) * (tensor if by_tensor else 1))
        parameters += here
        state += here * moments(path, cfg.optim.name)
    return parameters, state


def of_step(cfg: Config, how: "Execution", platform: str, ways: Ways = (1, 1, 1)) -> Step:
    """A step of `cfg`, whose model and micro-batch are resolved, on one device of a mesh."""
    m, (data, fsdp, tensor) = cfg.model, ways
    micro = cfg.train.micro_batch or cfg.train.batch_size
    parameters, optimizer = stored(cfg, ways)
    rows = how.steps_per_dispatch * cfg.train.batch_size * (m.block_size + 1) * 4 // (data * fsdp)

    fit, is_cpu = fitted(m, how, platform), platform == "cpu"
    n, item = micro * m.block_size / (data * fsdp), 2 if m.dtype == "bfloat16" else 4
    x = n * m.n_embd * item * (CPU_BFLOAT16 if is_cpu and item == 2 else 1)
    stored_in = item if how.attention == "xla" else 4
    weights = n * m.n_head * m.block_size * stored_in / tensor if how.attention in ("reference", "xla") else 0
    # float32; a GPU fuses that with what reads it, a TPU keeps the 16-bit product too
    held = {"cpu": 4, "gpu": item, "tpu": 4 + (item if item == 2 else 0)}[platform]
    logits = n * m.padded_vocab_size * held / tensor
    wte = 4 * m.padded_vocab_size * m.n_embd / (tensor * fsdp)

    kept = {"none": fit.none, "dots": fit.dots, "block": fit.block}[m.remat]
    if how.attention == "splash" and m.remat == "none":
        kept += SPLASH * (-(-m.head_dim // LANES) * LANES / m.head_dim - 1)
    whole = min(kept, 4)  # the residual stream and what layer norms make; heads and hidden units are split by `tensor`
    keeps_weights = m.remat == "none" or (is_cpu and m.scan_unroll == m.n_layer)
    layers = m.n_layer * (x * (whole + (kept - whole) / tensor) + (fit.weights * weights if keeps_weights else 0))
    layer = 0.0
    if not keeps_weights or platform == "tpu":
        layer = fit.layer * x + (0 if keeps_weights else fit.layer_weights * weights)

    summed = parameters if micro < cfg.train.batch_size else 0  # micro-batches add up their gradients
    copies = fit.wte * wte
    if item == 2 and not is_cpu:  # of weights, in 16 bits; a GPU holds wte's twice, a TPU none
        copies += parameters / 2 + (wte / 2 if platform == "gpu" else -wte / 2)
    elif platform == "tpu":
        copies += wte
    if not is_cpu:
        copies += GATHERED * parameters * (fsdp - 1) * item / 4
    if platform == "tpu" and fsdp > 1 and summed:  # the gradient of wte is whole in a micro-batch
        copies += wte * fsdp
    at_head = (layers + fit.x * x, fit.logits * logits, summed, copies)
    backward = (fit.late * layers + layer, fit.behind * logits, fit.gradients * parameters + summed, 0.0)
    return Step(parameters, optimizer, rows, *map(math.ceil, max(at_head, backward, key=sum)))


def fitted(model: ModelConfig, how: "Execution", platform: str) -> Fitted:
    """The row of TABLE for a resolved model."""
    if platform != "cpu":
        return TABLE[platform]
    words = ["cpu", "blocked" if how.attention == "blocked" else "reference"]
    words += ["loop"] if model.scan_unroll < model.n_layer else []
    words += ["halves"] if how.halves else []
    return TABLE[" ".join(words)]


def needed(cfg: Config, how: "Execution", platform: str, ways: Ways = (1, 1, 1)) -> float:
    """Bytes on each device that are enough for a step, with its margin.

    On a CPU a checkpoint is written from the same memory, beside the steps after it.
    """
    step, t = of_step(cfg, how, platform, ways), cfg.train
    beside = platform == "cpu" and any(0 < every < t.steps for every in (t.save_every, t.eval_every))
    return step.total * margin(step, cfg.model, how, platform) + (SAVING * step.state if beside else 0)


def margin(step: Step, model: ModelConfig, how: "Execution", platform: str) -> float:
    """A step is said to fit if so many times its bytes are there. More where the closed form is less exact."""
    usual = "float32" if platform == "cpu" else "bfloat16"
    exact = model.dtype == usual and (platform != "cpu" or step.activations > step.gradients)
    return max(fitted(model, how, platform).margin, 1.1 if exact else LESS_EXACT)
