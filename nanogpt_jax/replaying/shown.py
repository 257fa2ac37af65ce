"""What a replayed step shows, as text for a terminal."""

import math

import numpy as np

from nanogpt_jax import config
from nanogpt_jax.data.tokenizer import Tokenizer
from nanogpt_jax.host import messages, terminal
from nanogpt_jax.replaying import words
from nanogpt_jax.replaying.findings import COLUMNS, Findings
from nanogpt_jax.replaying.past import Past
from nanogpt_jax.replaying.rebuilt import Rebuilt

ROWS, LONGEST = 3, 300  # of the batch that are shown, and characters of each


def page(past: Past, its: Rebuilt, found: Findings, rows: int | None) -> str:
    """All of it. `rows`: so many of the batch in full; None: a few, cut."""
    return "\n\n".join(
        [_title(past, its), _verdict(past, its, found), _table(its, found), _rows(its, found, past.tokenizer, rows)]
    )


def _title(past: Past, its: Rebuilt) -> str:
    took = its.step - 1 - its.start
    begin = f"checkpoint {its.start}" if its.start else "its seed"
    again = f", {took} step{'s' if took > 1 else ''} taken again" if took else ""
    lines = [f"{past.path}, step {its.step} of {its.cfg.train.steps}: rebuilt from {begin}{again}"]
    c = its.compared
    if not c.steps:
        lines.append("the run has logged none of these steps, so there is nothing to compare them with")
    elif c.equal == c.steps:
        lines.append(f"loss and gradient norm of {_n(c.steps, 'logged step')} are equal, to the last bit")
    else:
        lines.append(
            f"of {_n(c.steps, 'logged step')} {c.equal} are equal to the last bit; the losses differ by up to "
            f"{c.worst:.2g}:\nanother machine, another number of devices or other versions round otherwise "
            "(origin.json has the run's versions)"
        )
    if not its.is_own_mesh:
        lines.append(
            "the run was split over more devices than there are here: this is computed on one, equal to rounding"
        )
    m = its.metrics
    lines.append(
        f"loss {m['loss']:.4f} nats a token, gradient norm {m['grad_norm']:.4g}"
        f"{_clipped(its)}, learning rate {m['learning_rate']:.4g}"
    )
    if m.get("in_a_row"):
        line = f"optim.skip_spikes={its.cfg.optim.skip_spikes:g} skipped this step: it has changed nothing"
        if past.broke and past.broke - past.skipped < its.step <= past.broke:
            line += f"\nit is number {m['in_a_row']:.0f} of the {past.skipped} skipped in a row that ended the run"
        lines.append(line)
    return "\n".join(lines)


def _n(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("s" if n != 1 else "")


def _clipped(its: Rebuilt) -> str:
    clip = its.cfg.optim.grad_clip
    return f" (clipped to {clip:g})" if clip and its.metrics["grad_norm"] > clip else ""


# ---- what broke -----------------------------------------------------------------------------------------------------


def _verdict(past: Past, its: Rebuilt, found: Findings) -> str:
    broken = its.wrong_after or not all(math.isfinite(value) for value in its.metrics.values())
    if found.origin is None and not broken:
        return "all is finite: the loss, each gradient, and the weights after the step"
    if found.origin is None:
        return (
            "the compiled step gives numbers that are not finite, and operation by operation all of them are:\n"
            "they are at the edge of what float32 holds, and the two round otherwise; see the largest numbers below"
        )
    return f"{_where(its, found)}\n\nwhat to try:\n" + "\n".join(f"  - {line}" for line in _advice(past, its, found))


def _where(its: Rebuilt, found: Findings) -> str:
    origin, layers = found.origin, its.cfg.model.n_layer
    assert origin is not None
    lines = []
    if origin.primitive:
        lines.append(
            f"the first result that is not finite: {words.place(origin.place, layers, origin.primitive, found.phase)}"
        )
        lines.append(f"  operation {origin.primitive}, {words.counts(origin)}")
        if source := words.source(origin.place):
            lines.append(f"  {source}")
        sizes = [f"{one.largest:.3g}" for one in origin.inputs]
        if sizes:
            lines.append(f"  the largest numbers that went in: {', '.join(sizes)}")
    else:
        lines.append(f"not finite before the step: {origin.name}, {words.counts(origin)}")
        if found.shown:
            where, primitive = found.shown
            lines.append(f"the first result that is not finite: {words.place(where, layers, primitive, found.phase)}")
            lines.append(f"  operation {primitive}, {words.source(where)}")
    if found.spoilt:
        lines.append(f"  what it spoils: {messages.listed(found.spoilt)}")
    return "\n".join(lines)


def _advice(past: Past, its: Rebuilt, found: Findings) -> list[str]:
    origin, o, cfg = found.origin, its.cfg.optim, its.cfg
    assert origin is not None
    replay = f"{config.program('replay')} {config.word(past.path)} --step"
    in_a_row = int(its.metrics.get("in_a_row", 0))  # the skipped steps before this one had the same weights
    before = its.step - max(1, in_a_row)  # the last step that changed something; 0: none did
    if not origin.primitive:
        return ["the weights were spoilt earlier: " + (f"{replay} {before}" if before else "by what made them")]
    found_rows = [i for i, row in enumerate(found.nats) if not math.isfinite(float(row.sum()))]
    lines = []
    if 0 < len(found_rows) < len(found.nats):
        lines.append(
            f"the text: the loss is not finite in {len(found_rows)} of {len(found.nats)} rows of the batch, shown below"
        )
    lines.append(
        f"a lower optim.learning_rate than {o.learning_rate:g}, or more optim.warmup_steps than {o.warmup_steps}"
        + ("" if 0 < o.grad_clip <= 1 else "; optim.grad_clip=1")
    )
    if cfg.model.dtype != "float32":
        lines.append(f"model.dtype=float32: {cfg.model.dtype} rounds to 3 digits")
    if before:
        lines.append(
            f"how the largest numbers grew: the same table earlier, {replay} {max(1, min(before, its.step - 10))}"
        )
    return lines


# ---- the tables -----------------------------------------------------------------------------------------------------


def _table(its: Rebuilt, found: Findings) -> str:
    heads = [*COLUMNS, "gradient", "weights"]
    lines = [" " * 12 + "".join(f"{head:>11}" for head in heads)]

    def line(name: str, largest: list[float | None], key: int | str) -> str:
        numbers = [*largest, found.gradients[key], found.weights[key]]
        return f"{name:<12}" + "".join(f"{'' if x is None else f'{x:.3g}':>11}" for x in numbers)

    none: list[float | None] = [None] * (len(COLUMNS) - 1)
    lines.append(line("embeddings", [found.largest.get((None, "residual")), *none], "wte"))
    lines.append(line("positions", [None, *none], "wpe"))
    for layer in range(its.cfg.model.n_layer):
        lines.append(line(f"layer {layer + 1}", [found.largest.get((layer, column)) for column in COLUMNS], layer))
    lines.append(line("last norm", [None, *none], "ln_f"))
    logits = found.largest.get((None, "logits"))
    lines.append(f"{'logits':<12}{'' if logits is None else f'{logits:.3g}':>11}")
    return "the largest numbers, by their distance from 0; the norms of gradients and weights\n" + "\n".join(lines)


def _rows(its: Rebuilt, found: Findings, tokenizer: Tokenizer, asked: int | None) -> str:
    """The rows of the batch with the largest loss; those that are not finite come first."""
    means = [float(row.mean()) for row in found.nats]
    order = sorted(range(len(means)), key=lambda i: -means[i] if math.isfinite(means[i]) else -math.inf)
    n = min(asked or ROWS, len(order))
    lines = [f"the {n} of {len(order)} rows of the batch with the largest loss" if n < len(order) else "the batch"]
    for i in order[:n]:
        tokens, nats = its.rows[i], found.nats[i]
        lines.append(f"row {i + 1}: {means[i]:.4f} nats a token{_worst(tokens, nats, tokenizer)}")
        text = visible(tokenizer.decode(tokens))
        lines.append(f"  {text if asked else messages.cut(text, LONGEST)}")
    return "\n".join(lines)


def _worst(tokens: np.ndarray, nats: np.ndarray, tokenizer: Tokenizer) -> str:
    if not math.isfinite(float(nats.sum())):
        return ""
    t = int(nats.argmax())
    token = visible(tokenizer.decode(tokens[t + 1 : t + 2]))
    return f"; most, {nats[t]:.2f}, for token {t + 2} of {len(tokens)}, {token!r}"


def visible(text: str) -> str:
    """A text on one line, with nothing that a terminal would obey."""
    return terminal.visible(text.replace("\\", "\\\\").replace("\r", "\\r")).replace("\n", "\\n").replace("\t", "\\t")
