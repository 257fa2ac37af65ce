"""Checks of settings: one function for each class, and one for the tokenizer."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from nanogpt_jax.config.errors import UserError, suggestion
from nanogpt_jax.config.settings import Config, MeshConfig, Origin, Settings, items

MOST_STEPS = 2**31 - 1  # the largest int32


def validate(cfg: Settings, origin: Origin) -> Settings:
    """`cfg` itself; UserError that names the setting, its value, where it came from and what to do."""
    check = Check(dict(items(cfg)), origin)
    for demands in (_model, _data, _optim, _train, _mesh, type(cfg).demands):
        demands(cfg, check)
    return cfg


@dataclasses.dataclass(frozen=True)
class Check:
    """`check(good, key, wrong, remedy)` raises a UserError about the setting `key` unless `good`."""

    values: dict[str, Any]
    origin: Origin

    def __call__(self, good: bool, key: str, wrong: str, remedy: str = "", origin_of: str = "") -> None:
        if not good:
            line = f"{key}={self.values[key]} {wrong} ({self.origin.get(origin_of or key, 'default')})"
            raise UserError(line + (f"; {remedy}" if remedy else ""))

    def at_least(self, least: int, keys: str) -> None:
        for key in keys.split():
            self(self.values[key] >= least, key, f"must be at least {least}" if least else "must not be negative")

    def in_0_to_1(self, keys: str) -> None:
        for key in keys.split():
            self(0 <= self.values[key] < 1, key, "must lie in [0, 1)")


def _model(cfg: Config, check: Check) -> None:
    m = cfg.model
    check.at_least(1, "model.block_size model.n_layer model.n_head model.n_embd")
    check.at_least(0, "model.vocab_size model.scan_unroll")
    check.in_0_to_1("model.dropout")
    if m.n_embd % m.n_head:
        below = m.n_embd // m.n_head * m.n_head
        near = " or ".join(str(n) for n in (below, below + m.n_head) if n)
        wrong = f"must be a multiple of model.n_head={m.n_head}"
        set_by_somebody = [k for k in ("model.n_embd", "model.n_head") if check.origin.get(k, "default") != "default"]
        check(False, "model.n_embd", wrong, f"nearest: {near}", next(iter(set_by_somebody), ""))
    check(
        not (m.attention in ("xla", "cudnn", "splash") and m.dropout),
        "model.attention",
        f"has no dropout, but model.dropout={m.dropout}",
        "use auto, reference or blocked, or set model.dropout=0",
    )
    check(
        not (m.attention == "cudnn" and m.dtype == "float32"),
        "model.attention",
        "needs 16-bit numbers",
        "set model.dtype=bfloat16",
    )
    check(m.scan_unroll <= m.n_layer, "model.scan_unroll", f"exceeds model.n_layer={m.n_layer}")


def _data(cfg: Config, check: Check) -> None:
    check(0 < cfg.data.val_fraction < 1, "data.val_fraction", "must lie between 0 and 1", "0.1 keeps a tenth")


def _optim(cfg: Config, check: Check) -> None:
    o, n_layer = cfg.optim, cfg.model.n_layer
    check.at_least(0, "optim.weight_decay optim.grad_clip optim.warmup_steps optim.freeze_layers")
    check.in_0_to_1("optim.beta1 optim.beta2")
    check(0 <= o.min_learning_rate <= 1, "optim.min_learning_rate", "must lie in [0, 1]: a share of the peak")
    check(o.learning_rate > 0, "optim.learning_rate", "must be above 0")
    check(o.learning_rate < 1e38, "optim.learning_rate", "must be below 1e38: a float32 number")
    sane = o.skip_spikes == 0 or 3 <= o.skip_spikes <= 1000
    check(sane, "optim.skip_spikes", "must be 0 (never) or lie in 3 to 1000 standard deviations", "8 is a good start")
    check(o.freeze_layers <= n_layer, "optim.freeze_layers", f"exceeds model.n_layer={n_layer}")


def _train(cfg: Config, check: Check) -> None:
    t = cfg.train
    check.at_least(1, "train.batch_size train.log_every train.keep")
    check.at_least(-1, "train.micro_batch")
    check.at_least(0, "train.steps_per_dispatch train.eval_every train.save_every train.seed")
    check(t.steps <= MOST_STEPS, "train.steps", f"must be at most {MOST_STEPS}", "they are counted in 32 bits")
    check(t.seed < 2**32, "train.seed", "must be below 2**32")
    _place(t.checkpoints, check)
    if t.micro_batch > 0:
        check(
            t.batch_size % t.micro_batch == 0,
            "train.micro_batch",
            f"does not divide train.batch_size={t.batch_size}",
            f"nearest: {max(n for n in range(1, t.micro_batch + 1) if t.batch_size % n == 0)}",
        )


def _place(place: str, check: Check) -> None:
    check(not re.match(r"\w+:(?!//)", place), "train.checkpoints", "must be a folder, file:///PATH or gs://BUCKET/NAME")
    scheme, is_url, rest = place.partition("://")
    ours = not is_url or scheme in ("gs", "file")
    remedy = "keep them in a folder and copy that, or mount the store, if folders can be renamed there"
    check(ours, "train.checkpoints", "must be a folder or gs://BUCKET/NAME: orbax writes to no other store", remedy)
    absolute = scheme != "file" or rest.startswith("/")
    check(absolute, "train.checkpoints", "must be file:///PATH, with the whole path of a folder of this machine")
    plain = scheme != "gs" or re.fullmatch(r"[a-z0-9][a-z0-9._-]{2,}(/[A-Za-z0-9._=@-]+)*/?", rest) is not None
    check(plain, "train.checkpoints", "must be gs://BUCKET/NAME", "of letters, digits and . _ = @ -")


def _mesh(cfg: Config, check: Check) -> None:
    axes = {axis: getattr(cfg.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    for axis, size in axes.items():
        check(size >= 1 or size == -1, f"mesh.{axis}", "must be at least 1, or -1 for the rest")
    check(list(axes.values()).count(-1) <= 1, "mesh.fsdp", "cannot be worked out", "only one axis can be -1")
    n_head, tensor = cfg.model.n_head, max(axes["tensor"], 1)
    check(n_head % tensor == 0, "mesh.tensor", f"must divide model.n_head={n_head}")
    ways = max(axes["data"], 1) * max(axes["fsdp"], 1)
    micro = cfg.train.micro_batch if cfg.train.micro_batch > 0 else cfg.train.batch_size
    check(
        micro % ways == 0,
        "train.micro_batch" if cfg.train.micro_batch > 0 else "train.batch_size",
        f"must be a multiple of mesh.data * mesh.fsdp = {ways}",
        f"nearest: {-(-micro // ways) * ways}",
    )
    _processes(cfg.mesh, check)


def _processes(m: MeshConfig, check: Check) -> None:
    host, _, port = m.coordinator.rpartition(":")
    is_address = host != "" and port.isdecimal() and port.isascii() and 0 < int(port) < 2**16
    check(m.coordinator == "none" or is_address, "mesh.coordinator", "must be HOST:PORT", "for example 10.0.0.1:1234")
    both = "exclude each other; auto finds the coordinator itself"
    check(m.coordinator == "none" or m.processes != "auto", "mesh.coordinator", f"and mesh.processes=auto {both}")
    check(m.num_processes >= 1, "mesh.num_processes", "must be at least 1")
    told = m.coordinator == "none" or check.origin.get("mesh.num_processes", "default") != "default"
    check(told, "mesh.coordinator", "needs mesh.num_processes and mesh.process_id, too")
    alone = "needs mesh.coordinator=HOST:PORT, where process 0 listens"
    check(m.num_processes == 1 or m.coordinator != "none", "mesh.num_processes", alone)
    numbers = f"must lie in 0 to {m.num_processes - 1}: there are mesh.num_processes={m.num_processes}"
    check(0 <= m.process_id < m.num_processes, "mesh.process_id", numbers)
    check(1 <= m.timeout <= 86400, "mesh.timeout", "must lie in 1 to 86400 seconds")


# ---- the tokenizer --------------------------------------------------------------------------------------------------


def check_tokenizer(name: str, where: str) -> None:
    """UserError if `name` cannot be a data.tokenizer. A folder's content is checked when it is opened."""
    kind, colon, size = name.partition(":")
    if kind == "bpe":
        if not (colon and size.isdecimal() and size.isascii()):
            raise UserError(f"data.tokenizer={name} must name its number of tokens, like bpe:8192 ({where})")
        if not 257 <= int(size) <= 1 << 20:
            raise UserError(
                f"data.tokenizer={name} must lie in bpe:257 to bpe:1048576 ({where}): 256 bytes and end-of-text are in"
            )
    elif name not in ("char", "word", "gpt2") and not Path(name).is_dir():
        near = suggestion(name, ("char", "word", "gpt2", "bpe:8192"))
        raise UserError(f"data.tokenizer={name} is none of char, word, gpt2, bpe:8192 or a folder ({where}){near}")


def with_vocabulary(cfg: Settings, n_vocab: int, end_of_text: int | None, origin: Origin) -> Settings:
    """`cfg`, completed with the tokenizer's vocabulary size and end of text; UserError if they do not fit."""
    size = cfg.model.vocab_size or n_vocab
    if size < n_vocab:
        raise UserError(
            f"model.vocab_size={size} is too small for the tokenizer's {n_vocab} tokens "
            f"({origin['model.vocab_size']}); leave it out, and it is {n_vocab}"
        )
    end = cfg.model.end_of_text
    if cfg.model.separate_documents and end == -1:
        if end_of_text is None:
            raise UserError(
                f"model.separate_documents needs an end-of-text token between documents, which data.tokenizer="
                f"{cfg.data.tokenizer} has not ({origin['model.separate_documents']})\n"
                "       it has one for several files, .jsonl and .parquet; one plain text is one document"
            )
        end = end_of_text
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=size, end_of_text=end))
