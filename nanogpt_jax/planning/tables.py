"""The tables of distributed/README.md, in Markdown: `nanogpt-jax plan --tables`."""

import contextlib
import math

from nanogpt_jax import config
from nanogpt_jax.config import Config, UserError
from nanogpt_jax.config.parse import config_folder
from nanogpt_jax.planning import estimate, shown, targets
from nanogpt_jax.planning.estimate import Plan
from nanogpt_jax.planning.targets import GIB, Target

ON = ("cpu", "h100:1", "h100:8", "v5e:2x2", "v5e:4x4", "v6e:4x4")
NOWHERE = "--data.dir=/nonexistent"  # the tables are the same on every machine: they look at no prepared text
LARGEST = "--train.micro-batch=-1"


def fits() -> str:
    """Every shipped config on every target: GiB a device by the closed form, and what to change if it does not fit."""
    rows = [["config", *ON]]
    for name in ["", *sorted(path.stem for path in config_folder().glob("*.toml"))]:
        rows.append([f"`{name}`" if name else "*(none)*", *(_cell(name, targets.find(target)) for target in ON)])
    return markdown(rows)


def load(name: str, *flags: str) -> Config:
    """A shipped config. What it would take from a run is taken from GPT-2 small, which that run is by its page."""
    words = [name] if name else []
    if name == "finetune_shakespeare":
        small = config.load(["gpt2"]).cfg.model
        sizes = [f"--model.{key}={getattr(small, key)}".lower() for key in ("n_layer", "n_head", "n_embd", "bias")]
        words += ["--train.init-from=scratch", "--data.tokenizer=gpt2", *sizes]
    return config.load([*words, NOWHERE, *flags]).cfg


def _cell(name: str, target: Target) -> str:
    """GiB a device as configured; "no" if that does not fit or cannot be split, and what does, if one change is."""
    change, why = "", ""
    try:
        made = estimate.plan(load(name), target)
    except UserError:  # more devices than sequences in a micro-batch
        made = estimate.plan(load(name, LARGEST), target)
        change = f"micro-batch {made.how.micro_batch}"
        why = "no: micro-batch below mesh"
    if target.kind.platform == "cpu" or (made.fits and not change):
        return _gib(made)
    why = why or f"no: {_gib(made)}"
    if not made.fits:
        found = estimate.remedies(made, 1)
        change, made = (_short(found[0][0]), found[0][1]) if found else ("", made)
    return f"{why}; {_gib(made)} with {change}" if change and made.fits else why


def _short(change: str) -> str:
    """A change without the names of sections, as a table has little room."""
    words = {"train.micro_batch=": "micro-batch ", "model.remat=": "remat ", "mesh.": ""}
    for long, short in words.items():
        change = change.replace(long, short)
    return change


def _gib(p: Plan) -> str:
    return f"{p.step.total / GIB:.{1 if p.step.total > GIB else 2}f}"


# ---- scale on paper --------------------------------------------------------------------------------------------------

SIZES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1.5B": "gpt2-xl"}
COUNTS = (1, 8, 64, 256)
BATCH = 512  # sequences of 1,024: half a million tokens a step, on however many devices
REMAT = ("none", "dots", "block")
TOPOLOGY = {1: "v5e", 8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"}


def scale() -> str:
    """Four sizes on 1 to 256 devices: how they are laid out, what they hold and send, and what that takes."""
    head = ["model", "devices", "fsdp", "micro-batch", "remat", "GiB", "sent, GB: gather", "scatter", "sum", "takes"]
    rows = [[*head, "products take", "devices do"]]
    for kind in ("v5e", "h100"):
        for title, name in SIZES.items():
            for count in COUNTS:
                target = targets.find(TOPOLOGY[count] if kind == "v5e" else f"h100:{count}")
                rows.append([title, f"{count} {kind}", *_scaled(best(name, target))])
    return markdown(rows)


def best(name: str, target: Target) -> Plan | None:
    """The layout of `name` on all devices that takes the least time by the closed forms, if one fits.

    Tried are several fsdp, each remat, and the largest micro-batch that fits.
    """
    found = []
    for remat in REMAT:
        for fsdp in sorted({n for n in (1, 8, 16, 32, 64, target.count) if target.count % n == 0}):
            flags = (f"--model.remat={remat}", f"--mesh.data={target.count // fsdp}", f"--mesh.fsdp={fsdp}")
            with contextlib.suppress(UserError):  # 1600 channels cannot be split in 256
                found.append(estimate.plan(load(name, LARGEST, f"--train.batch-size={BATCH}", *flags), target))
    found = [p for p in found if p.fits]
    return min(found, key=lambda p: (seconds(p), REMAT.index(p.cfg.model.remat)), default=None)


def seconds(p: Plan) -> float:
    """Of a step, if nothing is sent while something is computed: the worst case."""
    return products(p) + p.sent_seconds


def products(p: Plan) -> float:
    """Seconds of a step's products, at the middle of the range of utilisation."""
    return math.sqrt(math.prod(p.step_seconds))


def _scaled(p: Plan | None) -> list[str]:
    if p is None:
        return ["no layout fits", *[""] * 9]
    sent = [f"{p.sent.get(kind, 0) / 1e9:.2f}" for kind in ("all-gather", "reduce-scatter", "all-reduce")]
    share = products(p) / seconds(p)
    return [
        str(p.ways[1]),
        f"{p.how.micro_batch}",
        p.cfg.model.remat,
        _gib(p),
        *sent,
        shown.span(p.sent_seconds) if p.sent else "0",
        shown.span(products(p)),
        f"{share:.0%}",
    ]


def markdown(rows: list[list[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)
