"""A plan in words: one screen."""

from nanogpt_jax.model import execution
from nanogpt_jax.planning import estimate
from nanogpt_jax.planning.compiled import Compiled
from nanogpt_jax.planning.estimate import CHINCHILLA, NANOCHAT, Plan
from nanogpt_jax.planning.targets import GIB

MIB = 2**20


def page(p: Plan, name: str) -> str:
    """The whole plan of closed forms."""
    parts = [_title(p, name), _run(p), _memory(p), _cost(p)]
    if found := estimate.warnings(p):
        parts.append("\n".join(f"note: {line}" for line in found))
    return "\n\n".join(parts)


def _title(p: Plan, name: str) -> str:
    data, fsdp, tensor = p.ways
    count, kind = p.target.count, p.target.kind.name
    if p.target.kind.platform == "cpu":
        on = kind if count == 1 else f"{kind}, as {count} devices"
    else:
        on = kind if count == 1 else f"{count} {kind}"
    return f"{name} on {on}; mesh data={data} fsdp={fsdp} tensor={tensor}"


def _run(p: Plan) -> str:
    m, t, text = p.cfg.model, p.cfg.train, p.text
    turns = t.batch_size // p.how.micro_batch
    epochs = "passes over the text: unknown, --tokens N says it"
    if text.train:
        epochs = f"{number(p.tokens / text.train)} passes over {text.train:,}"
    return _rows(
        ("parameters", f"{p.parameters:,}, without embeddings {p.without_embeddings:,}"),
        ("vocabulary", f"{m.vocab_size:,} ({text.whence})"),
        ("a step", f"{p.tokens_a_step:,} tokens, {si(p.flops)}FLOPs ({si(p.flops / p.tokens_a_step)} a token)"),
        ("", f"{turns} micro-batch{'es' if turns > 1 else ''} of {p.how.micro_batch}; {p.how.attention} attention"),
        ("the run", f"{t.steps:,} steps, {si(p.tokens)}tokens; {epochs}"),
        (
            "tokens",
            f"{number(p.tokens / p.parameters)} a parameter (Chinchilla: {CHINCHILLA}); "
            f"{number(p.tokens / p.products)} a parameter of matrices and head (nanochat: {NANOCHAT})",
        ),
    )


def _memory(p: Plan) -> str:
    s, room = p.step, p.target.room
    unit, word = (GIB, "GiB") if s.total >= GIB else (MIB, "MiB")
    tokens = f"{p.how.micro_batch} x {p.cfg.model.block_size} tokens"
    rows = [
        ("parameters", s.parameters, "exact"),
        ("optimizer", s.optimizer, f"{p.cfg.optim.name}, exact"),
        ("gradients", s.gradients, ""),
        ("activations", s.activations, f"remat={p.cfg.model.remat}, {tokens}"),
        ("logits", s.logits, ""),
        ("copies", s.copies + s.rows, "of weights in another format; and the tokens"),
    ]
    lines = [f"  {name:<14}{n / unit:>8.2f}  {note}".rstrip() for name, n, note in rows]
    verdict = (
        "fits" if p.fits else "does not fit" if s.total > room else f"may not fit: {p.needed / unit:.2f} are enough"
    )
    lines.append(f"  {'in all':<14}{s.total / unit:>8.2f}  of {room / unit:,.2f} {_room(p)}: {verdict}")
    if p.target.kind.platform == "cpu" and p.target.count == 1:
        first, second = p.process
        more = f", {second / unit:.2f} while it compiles a second program" if second > first else ""
        lines.append(
            f"  {'the process':<14}{first / unit:>8.2f}  with Python, JAX and a checkpoint being written{more}"
        )
    least = execution.micro_batches(p.cfg, p.ways)[-1]
    most = f"{p.largest} of {p.cfg.train.batch_size} sequences" if p.largest else f"none, not even {least}"
    lines.append(f"  largest micro-batch that fits: {most}")
    lines.append(f"  one text of full length in generation: {p.cache / MIB:,.1f} MiB of keys and values")
    if not p.fits:
        found = [f"{words} ({one.step.total / GIB:.2f} GiB)" for words, one in estimate.remedies(p)]
        lines.append(f"  would fit: {', or '.join(found)}" if found else "  no single change makes it fit")
    return f"memory of a device at the peak of a step, {word}, by the closed form\n" + "\n".join(lines)


def _room(p: Plan) -> str:
    if p.target.kind.platform == "cpu":
        return "free here beside Python and JAX" + (", shared" if p.target.count > 1 else "")
    if p.target.kind.platform == "gpu":
        return f"that JAX takes ({p.target.room / p.target.kind.memory:.2f} of it: XLA_PYTHON_CLIENT_MEM_FRACTION)"
    return "that XLA has"


def _cost(p: Plan) -> str:
    low, high = p.target.kind.utilisation
    peak = p.target.kind.flops[p.cfg.model.dtype]
    fast, slow = p.seconds
    hours = f"{number(fast * p.used / 3600)} to {number(slow * p.used / 3600)} device-hours"
    count = p.checkpoints
    rows = [
        ("time", f"{span(fast)} to {span(slow)}, {hours}: {low:.2f} to {high:.2f} of {si(peak)}FLOP/s a device"),
        ("disk", f"{size(p.checkpoint)} a checkpoint, at most {count} at once: {size(p.checkpoint * count)}"),
    ]
    if p.sent:
        each = ", ".join(f"{kind} {size(n)}" for kind, n in p.sent.items())
        fast, slow = p.step_seconds
        rows.append(("sent", f"{each} a device and step: {span(p.sent_seconds)} beside {span(fast)} to {span(slow)}"))
    return _rows(*rows)


def compiled(p: Plan, its: Compiled) -> str:
    """What XLA says beside what the closed form says."""
    verdict = "fits" if its.total <= p.target.room else "does not fit"
    of = f"of {p.target.room / GIB:.2f} GiB"
    if not its.arguments:
        return f"XLA refuses it, compiled ahead of time: {verdict}: {its.total / GIB:.2f} {of}"
    off = p.step.total / its.total - 1
    words = (
        f"XLA, compiled ahead of time: {verdict}: {its.total / GIB:.2f} {of}: arguments {its.arguments / GIB:.2f}, "
        f"temporaries {its.temporary / GIB:.2f}, outputs {its.outputs / GIB:.2f}; the closed form is {off:+.1%} off"
    )
    if not its.sent:
        return words
    each = ", ".join(f"{kind} {size(n)}" for kind, n in its.sent.items())
    return f"{words}\nsent, by its program: {each} a device and step"


def measured(p: Plan, first: float, second: float, run: float) -> str:
    """Seconds of a step by each program, and of the run."""
    words = f"measured here: {span(first)} a step"
    words += f", {span(second)} by the second program" if second != first else ""
    tokens = p.tokens_a_step / second
    return f"{words}; {tokens:,.0f} tokens/s; the run takes {span(run)}, and its start"


def changes(good: list[tuple[str, Compiled]]) -> str:
    """The changes with which XLA says that it fits."""
    if not good:
        return "no single change that was tried makes it fit"
    return f"would fit, compiled: {', or '.join(f'{words} ({its.total / GIB:.2f})' for words, its in good)}"


def _rows(*rows: tuple[str, str]) -> str:
    return "\n".join(f"{name:<12}{text}" for name, text in rows)


def si(n: float) -> str:
    """1.2e9 -> "1.20 G", ready for a unit."""
    for prefix, unit in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= unit:
            return f"{n / unit:.3g} {prefix}"
    return f"{n:.3g} "


def size(n: float) -> str:
    """Bytes on disk or on a wire, in powers of ten."""
    return f"{si(n)}B"


def number(n: float) -> str:
    return f"{n:,.0f}" if n >= 10 else f"{n:.2g}"


def span(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, n in (("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= 2 * n or (unit == "s" and seconds >= 1):
            return f"{number(seconds / n)} {unit}"
    return f"{seconds * 1e3:.2g} ms"
