"""Operations in words that people know: "layer 3 of 6, attention, softmax"."""

from nanogpt_jax.replaying.operations import BLOCK, Origin, Place

# the modules of a layer -> what they do
PARTS = {
    ("ln_1",): "first layer norm",
    ("attn",): "attention",
    ("attn", "c_attn"): "attention, queries, keys and values",
    ("attn", "c_proj"): "attention, output projection",
    ("ln_2",): "second layer norm",
    ("mlp",): "MLP, GELU",
    ("mlp", "c_fc"): "MLP, into the hidden units",
    ("mlp", "c_proj"): "MLP, out of the hidden units",
    (): "sum with the residual stream",
}
SCORES, MEAN = "scores QK\u1d40/\u221ad", "weighted mean of the values"
# within attention: by the label of an einsum, else by our function
LABELS = {"bthd,bshd->bhts": SCORES, "td,sd->ts": SCORES, "ts,sd->td": MEAN, "ts,td->sd": MEAN}
OF_ATTENTION = {"scaled_scores": SCORES, "attention_weights": "softmax", "weighted_mean": MEAN, "_scores": SCORES}
SOFTMAX = ("reduce_max", "sub", "exp", "reduce_sum", "div", "log", "max")  # operations of blocked attention
DROPOUT = ("dropout", "keep", "words", "numbers", "_mix", "_drop")
# beside the layers: by our function
ELSEWHERE = {
    "embed": "embeddings",
    "hidden": "embeddings",
    "separate": "embeddings",
    "last_norm": "last layer norm",
    "head": "output head",
    "_dot": "output head",
    "linear": "output head",
    "project": "output head",
    "without_padding": "output head, padding of the vocabulary",
    "cross_entropy": "loss, cross-entropy",
    "_cross_entropy": "loss, cross-entropy",
    "mean_loss": "loss, cross-entropy",
    "forward": "logits",
    "_forward": "output head",
    "_accumulated": "sum over micro-batches",
    "with_frozen": "gradients of frozen parameters",
}


def place(where: Place, n_layer: int, primitive: str, phase: str = "") -> str:
    """Where an operation stands; `phase`: the one of findings.PHASES in which it was computed."""
    own = [name for name in where.modules if not name.startswith(("jvp(", "transpose(", "vmap("))]
    parts = []
    if phase == "update":
        parts.append(_of_update(where))
    elif where.layer is not None:
        parts += [f"layer {where.layer + 1} of {n_layer}", _of_layer(where, own, primitive)]
    elif any("LayerNorm" in name for name in where.modules):
        parts.append("last layer norm")
    else:
        parts.append(ELSEWHERE.get(where.function, where.function or "the step"))
    if where.micro_batch is not None:
        parts.append(f"micro-batch {where.micro_batch + 1}")
    return ("gradient of " if where.is_backward else "") + ", ".join(parts)


def _of_layer(where: Place, own: list[str], primitive: str) -> str:
    modules = tuple(
        name for name in own if name.isidentifier() and name not in (BLOCK, "checkpoint", "rematted_computation")
    )
    part = PARTS.get(modules, ", ".join(modules))
    if where.function in DROPOUT:
        return f"{part}, dropout" if modules else "dropout"
    if modules != ("attn",):
        return part
    label = next((LABELS[name] for name in own if name in LABELS), "")
    inner = label or OF_ATTENTION.get(where.function, "")
    if not inner and where.file.endswith("blocked_attention.py") and primitive in SOFTMAX:
        inner = "softmax"
    return f"{part}, {inner}" if inner else part


def _of_update(where: Place) -> str:
    if where.file.startswith("optax/") and ("clip" in where.file or "clip" in where.function):
        return "clipping of the gradient"
    if where.function in ("update", "norm", "tree_norm", "global_norm") and not where.file.startswith("optax/contrib"):
        return "norm of the gradient, or the new weights"
    return "the optimizer"


def source(where: Place) -> str:
    """The line that called for it; "" if it is not known."""
    if not where.file:
        return ""
    file = where.file if where.file.startswith("optax/") else f"nanogpt_jax/{where.file}"
    return f"{file}:{where.line}, {where.function}"


def counts(origin: Origin) -> str:
    """How much of a result is not finite: "12 of its 4,096 numbers are inf"."""
    its, n = origin.result, 1
    for size in its.shape:
        n *= size
    what = " and ".join(f"{many:,} {name}" for many, name in ((its.nan, "nan"), (its.inf, "inf")) if many)
    if n == 1:
        return f"the result is {'nan' if its.nan else 'inf'}"
    return f"of its {n:,} numbers {what.replace(' nan', ' are nan').replace(' inf', ' are inf')}"
