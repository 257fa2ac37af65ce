"""Settings: one typed tree, and the one parser for its three sources.

A setting can come from a TOML file, from the command line, or from the `config.json` of a run directory. All three go
through `coerce` and `validate`, so a wrong key or value gets the same message everywhere. This room imports no jax: a
typo is reported before XLA starts.
"""

# ClassifierConfig.data is another class than Config.data:
# pyright: reportIncompatibleVariableOverride=false

import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from nanogpt_jax.host import files


class UserError(Exception):
    """A mistake that the person at the keyboard can mend. The doors print it without a traceback and exit with 2."""


# The defaults are the recipe of `python train.py`: the lowest validation loss that we found for three minutes of a
# laptop's CPU. The comment behind a setting is its line in `--help`. 0 is "chosen for you" where the comment says so.


@dataclass(frozen=True)
class ModelConfig:
    block_size: int = 64  # T, the longest context, in tokens
    vocab_size: int = 0  # V; 0: as many as the tokenizer has
    n_layer: int = 4  # L, transformer blocks
    n_head: int = 4  # H, attention heads in a block
    n_embd: int = 128  # C, channels; a multiple of n_head
    dropout: float = 0.0  # dropped share of embeddings, attention weights and residual branches
    bias: bool = False  # biases in linear layers and layer norms; GPT-2 has them
    dtype: Literal["float32", "bfloat16"] = "float32"  # type of the computation; parameters stay float32
    attention: Literal["auto", "reference", "blocked", "xla", "cudnn", "splash"] = "auto"  # back-end; auto: by device
    remat: Literal["none", "dots", "block"] = "none"  # recomputed in the backward pass; dots: all but products
    separate_documents: bool = False  # attention stays within a document, and positions begin anew in each
    end_of_text: int = -1  # id of the token between documents; -1: the tokenizer's
    scan_unroll: int = 0  # layers unrolled in the layer scan; 0: all, but 1 on TPU
    decode: Literal["auto", "native", "xla"] = "auto"  # generation on a CPU; native: in C; auto: if the model is large

    @property
    def padded_vocab_size(self) -> int:
        """50257 -> 50304: a multiple of 128 fills the matrix unit. losses.without_padding masks it."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class DataConfig:
    source: str = "python-docs"  # python-docs, shakespeare, a file, a folder, a "GLOB", hf:NAME[:CONFIG][:FIELD], -
    mixture: dict[str, float] = field(default_factory=dict)  # instead of source: sources and weights, A=3,B=1
    tokenizer: str = "char"  # char, gpt2, bpe:8192 (learned from the text), or a folder that holds a tokenizer
    val_fraction: float = 0.1  # share kept for validation: the end of a single text, else every so many documents
    field: str = "text"  # where rows of .jsonl, .csv, .parquet and the hub keep their text
    dir: str = "data"  # where prepared tokens are kept
    threads: int = 0  # threads that turn text into tokens; 0: one a core

    @property
    def title(self) -> str:
        return " + ".join(self.mixture) or self.source


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "lion", "muon", "sgd"] = "muon"  # muon: matrices by Muon, the rest by AdamW
    learning_rate: float = 2e-2  # peak learning rate; adamw wants less, about 4e-3 for a small model
    min_learning_rate: float = 0.0  # where the schedule ends, as a share of the peak
    weight_decay: float = 0.1  # decoupled, on matrices only
    beta1: float = 0.9  # first moment; momentum of sgd and muon
    beta2: float = 0.99  # second moment
    grad_clip: float = 1.0  # longest global gradient norm; 0: no clipping
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "linear"  # from the peak down; wsd: in the last 20 %
    warmup_steps: int = 20  # steps of linear warm-up
    freeze_layers: int = 0  # the first so many blocks stay as they are (finetuning)
    freeze_embeddings: bool = False  # the embeddings stay as they are, and with them the output head


@dataclass(frozen=True)
class TrainConfig:
    init_from: str = "scratch"  # scratch: random weights; or a run, whose best weights, sizes and tokenizer are taken
    steps: int = 1600  # optimizer steps
    batch_size: int = 12  # sequences a step, over all devices and micro-batches
    micro_batch: int = 0  # sequences at a time (gradients accumulate); 0: the whole batch
    steps_per_dispatch: int = 0  # steps in one call to the device; 0: small model 8 on CPU, 32 on GPU; else 1
    recompile: Literal["auto", "off"] = "auto"  # auto: a long run on one CPU compiles a quicker step, in 1 to 5 GB
    eval_every: int = 400  # steps between losses on the whole validation split; 0: only at the end
    save_every: int = 200  # steps between checkpoints; 0: only at the end
    log_every: int = 10  # steps between lines in metrics.jsonl
    keep: int = 2  # newest checkpoints kept, besides the best one
    seed: int = 1337  # seed of the initial weights, the order of the data and the dropout
    tensorboard: bool = False  # also write TensorBoard files (the extra [tensorboard])
    wandb: bool = False  # also log to Weights & Biases (the extra [wandb])


@dataclass(frozen=True)
class MeshConfig:
    data: int = 1  # devices along which the batch is split; -1: all that the other axes leave
    fsdp: int = 1  # devices that split the batch and the parameters; -1: the rest
    tensor: int = 1  # devices that split heads and hidden units; -1: the rest


@dataclass(frozen=True)
class Config:
    """All settings of a run. Frozen: a changed setting is a new Config (`dataclasses.replace`)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


# ---- the same for a classifier: its own data, a section more, and defaults for a few thousand labelled texts ---------


@dataclass(frozen=True)
class LabelledConfig:
    source: str = "python"  # a .jsonl, .json, .csv, .tsv or .parquet file, hf:NAME[:CONFIG], or python: prose or code
    split: str = "train"  # of hf:NAME, the split that is taken
    text_column: str = "text"  # where the text stands
    label_column: str = "label"  # where the label stands: a string or a whole number
    keep: Literal["first", "last"] = "first"  # which model.block_size tokens of a longer text are read
    tokenizer: str = "char"  # char, gpt2, bpe:8192 (learned from the texts), or a folder that holds a tokenizer
    val_fraction: float = 0.1  # share of each label kept to choose the checkpoint by
    test_fraction: float = 0.1  # share of each label kept for `classify eval`

    @property
    def title(self) -> str:
        return self.source


@dataclass(frozen=True)
class ClassifyConfig:
    freeze: bool = False  # train the head alone, on the language model as it is
    class_weights: Literal["none", "balanced"] = "none"  # balanced: a rare label's texts count more, n / (K * n_label)
    epochs: int = 5  # passes over the training texts
    monitor: Literal["loss", "macro-f1"] = "loss"  # what the best checkpoint is best by, on the validation texts
    patience: int = 0  # evaluations without a better one after which the run ends; 0: it goes on to the last step
    n_labels: int = 0  # K; 0: as many as the data has


@dataclass(frozen=True)
class ClassifierTrainConfig(TrainConfig):
    steps: int = 0  # optimizer steps; 0: classify.epochs passes
    batch_size: int = 16  # texts a step, over all devices and micro-batches
    micro_batch: int = 0  # texts at a time (gradients accumulate); 0: the whole batch
    eval_every: int = 0  # steps between looks at the validation texts; 0: once an epoch


@dataclass(frozen=True)
class ClassifierConfig(Config):
    """All settings of a classifier's run: GPT-2 with a head over the last token."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(block_size=256, dropout=0.1))
    data: LabelledConfig = field(default_factory=LabelledConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig("adamw", 1e-3))
    train: ClassifierTrainConfig = field(default_factory=ClassifierTrainConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)


MOST_STEPS = 2**31 - 1  # that an int32 counts
Settings = TypeVar("Settings", bound=Config)
Kind = type[Config]  # Config: a language model's; ClassifierConfig
COMMANDS = {Config: "train", ClassifierConfig: "classify train"}  # what trains one

# How to run, not what is computed: these may differ between a run and its resumption.
EXECUTION = frozenset(
    "model.attention model.decode model.remat model.scan_unroll data.dir data.threads train.steps train.micro_batch "
    "train.steps_per_dispatch train.recompile train.eval_every train.save_every train.log_every train.keep "
    "train.tensorboard train.wandb mesh.data mesh.fsdp mesh.tensor classify.epochs classify.patience".split()
)


@functools.cache
def types_of(kind: Kind) -> dict[str, Any]:
    """The type of every setting: "model.n_layer" -> int."""
    return {
        f"{section}.{name}": hint
        for section, settings in get_type_hints(kind).items()
        for name, hint in get_type_hints(settings).items()
    }


TYPES = types_of(Config)
Origin = Mapping[str, str]  # "model.n_embd" -> "default", "configs/x.toml", "command line"


def items(cfg: Config) -> Iterator[tuple[str, Any]]:
    """Every setting as ("model.n_layer", 4), in the order of the classes above."""
    for section, values in dataclasses.asdict(cfg).items():
        for name, value in values.items():
            yield f"{section}.{name}", value


def differences(old: Config, new: Config, keys: frozenset[str]) -> list[tuple[str, Any, Any]]:
    """The settings among `keys` whose values differ, as (name, old value, new value)."""
    before = dict(items(old))
    return [(key, before[key], value) for key, value in items(new) if key in keys and before[key] != value]


DOORS = ("train.py", "sample.py")


def program(name: str, briefly: bool = False) -> str:
    """How a person here types the command `name`: as they typed this one, "python train.py" or "nanogpt-jax train".

    `briefly`: to be read, and not to be copied; without the folder.
    """
    typed = Path(sys.argv[0])
    if typed.name in DOORS and f"{name}.py" in DOORS:
        path = typed.with_name(f"{name}.py")
        return f"python {path.name if briefly else word(path)}"
    return f"nanogpt-jax {name}"


def word(value: str | Path) -> str:
    """A path as one word of a command that a person may copy into a shell."""
    text = str(value)
    return quoted(f"./{text}" if text.startswith("-") else text)


def quoted(text: str) -> str:
    """Any word of a command for a shell. A byte that is no UTF-8 is written as bash and zsh write it."""
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return shlex.quote(text)
    escaped = "".join(
        f"\\x{byte:02x}" if byte > 126 or byte < 32 or byte in b"\\'" else chr(byte) for byte in os.fsencode(text)
    )
    return f"$'{escaped}'"


def joined(words: Iterable[str]) -> str:
    """A command to be copied into a shell."""
    return " ".join(map(quoted, words))


def suggestion(word: str, known: Any) -> str:
    """A second line for an error: the known word that begins like it, or else the nearest, if one is near."""
    known = list(known)
    begun = [k for k in known if k.startswith(word)] if len(word) > 4 else []
    near = begun or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"\n       did you mean {near[0]}?" if near else ""


def unknown_flag(key: str, known: Any, command: str) -> UserError:
    """What to say of --KEY, which COMMAND does not have; `known` are the names of those it has."""
    near = suggestion(_flag(key), [_flag(k) for k in known if len(k) > 1])  # not -h
    near = near or f"\n       see {program(command)} --help"
    return UserError(f"unknown flag {_flag(key)}{near}")


def _flag(key: str) -> str:
    return f"--{key}".replace("_", "-")


def unknown_setting(key: str, where: str, kind: Kind = Config) -> UserError:
    names = {k: k.split(".")[1] for k in types_of(kind)}
    near = difflib.get_close_matches(key.split(".")[-1], sorted(names.values()))  # the section may be a wrong one
    hint = suggestion(key, [k for k, name in names.items() if name in near or k.startswith(key)])
    hint = hint or f"\n       sections are {', '.join(get_type_hints(kind))}; see {program(COMMANDS[kind])} --help"
    return UserError(f"unknown setting {key} ({where}){hint}")


def coerce(key: str, hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint`, the type of setting `key`. Text from the command line is read as TOML would read it."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            shown = ", ".join(choices)
            raise UserError(f"{key}={value!r} is not one of {shown} ({where}){suggestion(str(value), choices)}")
        return value
    if key == "data.mixture":
        return _mixture(value, where)
    if hint is str:
        if isinstance(value, str) and value:
            return value
        raise UserError(f"{key}={value!r} must be text ({where})")
    if where == "command line" and isinstance(value, str):
        value = _parse(hint, value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and type(value) is int:
        return value
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    wanted = {bool: "true or false", int: "a whole number", float: "a finite number"}[hint]
    raise UserError(f"{key}={value!r} must be {wanted} ({where})")


def _mixture(value: Any, where: str) -> dict[str, float]:
    """A table of sources and weights; from the command line as JSON or as A=3,B=1."""
    good = 'sources and their weights: A=3,B=1 or {"A": 3, "B": 1} on the command line, { "A" = 3, "B" = 1 } in TOML'
    wrong = UserError(f"data.mixture={value!r} must be {good} ({where})")
    table = value
    if isinstance(value, str) and where == "command line":
        pairs = [part.rpartition("=") for part in value.split(",")] if value else []
        try:
            table = json.loads(value) if value.startswith("{") else {a.strip(): float(b) for a, _, b in pairs}
        except ValueError:
            raise wrong from None
        if len(table) < len(pairs):
            raise UserError(f"data.mixture={value} names a source twice ({where})")
    if not isinstance(table, Mapping) or not all(table):
        raise wrong
    for source, weight in table.items():
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise UserError(f"data.mixture: the weight of {source} is {weight!r}, and must be above 0 ({where})")
    return {source: float(weight) for source, weight in table.items()}


def check_tokenizer(name: str, where: str) -> None:
    """UserError where `name` can be no data.tokenizer. Whether a folder holds one is seen when it is opened."""
    kind, colon, size = name.partition(":")
    if kind == "bpe":
        if not (colon and size.isdecimal() and size.isascii()):
            raise UserError(f"data.tokenizer={name} must name its number of tokens, like bpe:8192 ({where})")
        if not 257 <= int(size) <= 1 << 20:
            raise UserError(
                f"data.tokenizer={name} must lie in bpe:257 to bpe:1048576 ({where}): 256 bytes and end-of-text are in"
            )
    elif name not in ("char", "gpt2") and not Path(name).is_dir():
        near = suggestion(name, ("char", "gpt2", "bpe:8192"))
        raise UserError(f"data.tokenizer={name} is none of char, gpt2, bpe:8192 or a folder ({where}){near}")


def _parse(kind: type, text: str) -> Any:
    """Text as bool, int or float; the text itself where it is not one, so that `coerce` can show it."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def merge(cfg: Settings, values: Mapping[str, Any], where: str) -> Settings:
    """`cfg` with `values` ("model.n_layer" -> 4) laid over it."""
    types = types_of(type(cfg))
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key not in types:
            raise unknown_setting(key, where, type(cfg))
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = coerce(key, types[key], value, where)
    return dataclasses.replace(
        cfg, **{s: dataclasses.replace(getattr(cfg, s), **changed) for s, changed in sections.items()}
    )


def flatten(tree: Mapping[str, Any], where: str, kind: Kind = Config) -> dict[str, Any]:
    """{"model": {"n_layer": 4}} -> {"model.n_layer": 4}; anything else than sections of settings is refused."""
    flat = {}
    for section, values in tree.items():
        if not isinstance(values, Mapping):
            near = [key for key in types_of(kind) if key.endswith("." + section.replace("-", "_"))]
            hint = f"\n       did you mean {near[0]}, in a section [{near[0].split('.')[0]}]?" if near else ""
            raise UserError(f"unknown setting {section} ({where}): settings stand in sections{hint}")
        for name, value in values.items():
            flat[f"{section}.{name.replace('-', '_')}"] = value
    return flat


def validate(cfg: Settings, origin: Origin) -> Settings:
    """`cfg` itself, or an error that names the setting, its value, where it came from and what to do."""
    value = dict(items(cfg))

    def check(good: bool, key: str, wrong: str, remedy: str = "", origin_of: str = "") -> None:
        if not good:
            line = f"{key}={value[key]} {wrong} ({origin.get(origin_of or key, 'default')})"
            raise UserError(line + (f"; {remedy}" if remedy else ""))

    for key in "model.block_size model.n_layer model.n_head model.n_embd train.batch_size".split():
        check(value[key] >= 1, key, "must be at least 1")
    for key in "train.log_every train.keep".split():
        check(value[key] >= 1, key, "must be at least 1")
    for key in (
        "model.vocab_size model.scan_unroll optim.weight_decay optim.grad_clip optim.warmup_steps optim.freeze_layers "
        "train.micro_batch train.steps_per_dispatch train.eval_every train.save_every train.seed data.threads"
    ).split():
        check(key not in value or value[key] >= 0, key, "must not be negative")
    for key in "model.dropout optim.beta1 optim.beta2".split():
        check(0 <= value[key] < 1, key, "must lie in [0, 1)")
    check(0 < cfg.data.val_fraction < 1, "data.val_fraction", "must lie between 0 and 1", "0.1 keeps a tenth")
    check(0 <= cfg.optim.min_learning_rate <= 1, "optim.min_learning_rate", "must lie in [0, 1]: a share of the peak")
    check(cfg.optim.learning_rate > 0, "optim.learning_rate", "must be above 0")
    check(cfg.optim.learning_rate < 1e38, "optim.learning_rate", "must be below 1e38: a float32 number")
    if isinstance(cfg, ClassifierConfig):
        check(value["train.steps"] >= 0, "train.steps", "must not be negative")
        check(value["classify.epochs"] >= 1, "classify.epochs", "must be at least 1")
        check(value["classify.patience"] >= 0, "classify.patience", "must not be negative")
        check(value["classify.n_labels"] >= 0, "classify.n_labels", "must not be negative")
        kept = cfg.data.val_fraction + cfg.data.test_fraction
        check(cfg.data.test_fraction >= 0, "data.test_fraction", "must not be negative", "0 keeps no test texts")
        check(kept < 1, "data.test_fraction", f"and data.val_fraction={cfg.data.val_fraction} leave no training texts")
        check(
            not (cfg.classify.freeze and cfg.train.init_from == "scratch"),
            "classify.freeze",
            "would train a head on weights that nobody has trained",
            "set train.init_from to a language model's run",
        )
    else:
        check(value["train.steps"] >= 1, "train.steps", "must be at least 1")
        either = not cfg.data.mixture or cfg.data.source == DataConfig.source
        check(either, "data.source", "and data.mixture exclude each other", "leave one out")
    check(cfg.train.steps <= MOST_STEPS, "train.steps", f"must be at most {MOST_STEPS}", "they are counted in 32 bits")
    check(cfg.train.seed < 2**32, "train.seed", "must be below 2**32")

    m, t = cfg.model, cfg.train
    if m.n_embd % m.n_head:
        below = m.n_embd // m.n_head * m.n_head
        near = " or ".join(str(n) for n in (below, below + m.n_head) if n)
        wrong = f"must be a multiple of model.n_head={m.n_head}"
        somebody_set = [key for key in ("model.n_embd", "model.n_head") if origin.get(key, "default") != "default"]
        check(False, "model.n_embd", wrong, f"nearest: {near}", next(iter(somebody_set), ""))
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
    for key in ("model.scan_unroll", "optim.freeze_layers"):
        check(value[key] <= m.n_layer, key, f"exceeds model.n_layer={m.n_layer}")
    if t.micro_batch:
        check(
            t.batch_size % t.micro_batch == 0,
            "train.micro_batch",
            f"does not divide train.batch_size={t.batch_size}",
            f"nearest: {max(n for n in range(1, t.micro_batch + 1) if t.batch_size % n == 0)}",
        )
    axes = {axis: getattr(cfg.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    for axis, size in axes.items():
        check(size >= 1 or size == -1, f"mesh.{axis}", "must be at least 1, or -1 for the rest")
    check(list(axes.values()).count(-1) <= 1, "mesh.fsdp", "cannot be worked out", "only one axis can be -1")
    if m.n_head % max(axes["tensor"], 1):
        check(False, "mesh.tensor", f"must divide model.n_head={m.n_head}")
    ways = max(axes["data"], 1) * max(axes["fsdp"], 1)
    micro = t.micro_batch or t.batch_size
    check(
        micro % ways == 0,
        "train.micro_batch" if t.micro_batch else "train.batch_size",
        f"must be a multiple of mesh.data * mesh.fsdp = {ways}",
        f"nearest: {-(-micro // ways) * ways}",
    )
    return cfg


def with_vocabulary(cfg: Settings, n_vocab: int, end_of_text: int | None, origin: Origin) -> Settings:
    """`cfg` with the tokenizer's number of tokens and its end of text filled in; UserError where they do not do."""
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


def with_labels(cfg: ClassifierConfig, n_labels: int, n_texts: int, origin: Origin) -> ClassifierConfig:
    """`cfg` with the number of labels, and an epoch's length in steps, filled in."""
    if cfg.classify.n_labels not in (0, n_labels):
        raise UserError(
            f"classify.n_labels={cfg.classify.n_labels} ({origin['classify.n_labels']}), but the data has {n_labels} "
            "labels; leave it out"
        )
    epoch, t = -(-n_texts // cfg.train.batch_size), cfg.train
    if not t.steps and cfg.classify.epochs * epoch > MOST_STEPS:
        raise UserError(
            f"classify.epochs={cfg.classify.epochs} are {cfg.classify.epochs * epoch} steps "
            f"({origin['classify.epochs']}), and must be at most {MOST_STEPS}: at most {MOST_STEPS // epoch} epochs"
        )
    return dataclasses.replace(
        cfg,
        classify=dataclasses.replace(cfg.classify, n_labels=n_labels),
        train=dataclasses.replace(t, steps=t.steps or cfg.classify.epochs * epoch, eval_every=t.eval_every or epoch),
    )


# ---- the file -------------------------------------------------------------------------------------------------------


def config_folder() -> Path:
    """Where the shipped configs lie: inside an installed wheel, or at the top of a clone."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def find_config(name: str) -> Path:
    """The path of a config file given by path or, for a shipped one, by name."""
    shipped = {path.stem: path for path in sorted(config_folder().glob("*.toml"), key=lambda path: path.stem)}
    path = Path(name)
    if path.is_file():
        return path
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise UserError(f"{name} is a directory, not a config file\n       to go on with a run: --run-dir {name}")
    raise UserError(f"no config file {name}{suggestion(name, shipped)}\n       shipped: {', '.join(shipped)}")


def read_toml(path: Path, kind: Kind = Config) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # some editors write a mark at the beginning
        return flatten(tomllib.loads(text), str(path), kind)
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"{path} is not valid TOML: {e}") from None
    except (UnicodeDecodeError, RecursionError) as e:
        why = "nested too deeply" if isinstance(e, RecursionError) else "not UTF-8 text"
        raise UserError(f"{path} is {why}, so it cannot be a TOML file") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def to_json(cfg: Config) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def read_json(path: Path, kind: type[Settings] = Config) -> Settings:
    """The settings of a run of that kind, from its config.json.

    A setting that the file lacks (an older run) has its default; one that is unknown is refused.
    """
    tree = _read_tree(path)
    if ("classify" in tree) != (kind is ClassifierConfig):
        raise UserError(_other_kind(path.parent, kind))
    values = flatten(tree, str(path), kind)
    cfg = merge(kind(), values, str(path))
    return validate(cfg, dict.fromkeys(values, str(path)))


def _other_kind(run: Path, wanted: Kind) -> str:
    if wanted is Config:
        ask, measure = (f"{program(f'classify {command}')} {word(run)}" for command in ("predict", "eval"))
        return f"{run} is a classifier, not a language model\n       ask it: {ask} TEXT; measure it: {measure}"
    return (
        f"{run} is a language model, not a classifier\n       "
        f"train one from it: {program('classify train')} --train.init-from {word(run)} --data.source FILE"
    )


def is_classifier(run: Path) -> bool:
    """Whether a run directory holds a classifier, and not a language model."""
    return "classify" in _read_tree(run / "config.json")


REPLACED = (".overwriting", ".overwritten")  # in a run directory: the run that is started over, see run_dir.py


def _read_tree(path: Path) -> dict[str, Any]:
    again = f"{program('train')} --run-dir {word(path.parent)} --overwrite"
    other = "\n       choose another run"
    remedy = f"{other}, or train it again from the start: rm {word(path)} && {again}"
    try:
        tree = json.loads(files.read(path).decode("utf-8"))
    except FileNotFoundError:
        found = [p.parent for p in sorted(path.parent.glob("*/config.json"))]
        if any(folder.name in REPLACED for folder in found):
            raise UserError(
                f"{path.parent} is being started over, or that was interrupted: give the same command again\n"
                "       what it does not begin anew, it puts back"
            ) from None
        if runs := [str(folder) for folder in found if not folder.name.startswith(".")]:
            more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
            raise UserError(f"{path.parent} is a folder of runs; name one: {', '.join(runs[:5])}{more}") from None
        if (path.parent / "checkpoints").is_dir():
            other += f", or train it again from the start: {again}"
        elif not path.parent.is_dir() or not any(path.parent.iterdir()):
            other += f", or train one there: {program('train')} --run-dir {word(path.parent)}"
        raise UserError(f"{path.parent} is not a run directory: it has no {path.name}{other}") from None
    except (ValueError, RecursionError) as e:
        why = "it is nested too deep" if isinstance(e, RecursionError) else e
        raise UserError(f"{path} is damaged: {why}{remedy}") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged: it holds no settings{remedy}")
    return tree


# ---- the command line -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command(Generic[Settings]):
    """One training command: the settings, where each came from, and what to do with the run directory."""

    cfg: Settings
    origin: Origin
    run_dir: Path
    resume: Literal["auto", "never", "must"] = "auto"
    overwrite: bool = False
    print_config: bool = False


TRAIN_USAGE = """usage: {program} [CONFIG.toml] [--run-dir DIR] [--init-from RUN]
           [--resume auto|never|must] [--overwrite] [--print-config] [--SECTION.NAME VALUE ...]

Trains a GPT-2 and keeps everything about it in a run directory. The same command again goes on where
it stopped.

  CONFIG.toml     a config file, or the name of a shipped one:
{shipped}
  --run-dir DIR   where the run is kept (default: runs/NAME, after the config file)
  --init-from RUN start from the best weights of another run, or of an imported model: the same as
                  --train.init-from
  --resume HOW    auto: go on if there is a run; never: only a new directory; must: only an old one
                  (default: auto)
  --overwrite     delete the run in the directory and start over
  --print-config  show each value and where it came from, as TOML; do not train
"""
CLASSIFY_USAGE = """usage: {program} [CONFIG.toml] [--run-dir DIR] [--init-from RUN]
           [--resume auto|never|must] [--overwrite] [--print-config] [--SECTION.NAME VALUE ...]

Trains GPT-2 with a head over the last token's hidden state to name the label of a text. The arguments
mean what they mean to train.py; runs go to runs/classifier, or to runs/NAME after a CONFIG.toml of yours.
"""


def split_arguments(
    argv: list[str], switches: tuple[str, ...], check: Callable[[str], None]
) -> tuple[list[str], dict[str, str]]:
    """Positional words, and {"model.n_layer": "8"} from `--model.n-layer 8` or `--model.n-layer=8`.

    Dashes and underscores are the same. `switches` are the flags that take no value; `check` refuses unknown ones.
    """
    words: list[str] = []
    flags: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if word.startswith("-") and len(word) > 1:
                raise UserError(f"unknown flag {word}\n       flags start with two dashes; see --help")
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        check(key)
        if key in switches:
            if equals:
                raise UserError(f"--{name} takes no value, but was given {value!r}")
            value = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} needs a value; see --help")
            value = rest.pop(0)
        if flags.setdefault(key, value) != value:
            raise UserError(f"--{name} was given twice: {flags[key]} and {value}")
    return words, flags


SWITCHES = ("overwrite", "print_config")
OPTIONS = ("run_dir", "init_from", "resume", *SWITCHES)


def _check_flag(kind: Kind, key: str) -> None:
    """UserError where `key` is no flag of train.py; it names the setting that may be meant."""
    if "." in key:
        if key not in types_of(kind):
            raise unknown_setting(key, "command line", kind)
    elif key not in OPTIONS:
        full = [k for k in types_of(kind) if k.endswith("." + key)]
        near = f"\n       did you mean --{full[0]}?" if full else suggestion(_flag(key), map(_flag, OPTIONS))
        near = near or f"\n       settings are --SECTION.NAME; see {program(COMMANDS[kind])} --help"
        raise UserError(f"unknown flag {_flag(key)} (command line){near}")


def load(argv: list[str], kind: type[Settings] = Config) -> Command[Settings]:
    """Read a training command line: defaults, then the TOML file, then the command line."""
    words, flags = split_arguments(argv, SWITCHES, functools.partial(_check_flag, kind))
    for word in words:
        if word.partition("=")[0].replace("-", "_") in types_of(kind):
            raise UserError(f"no config file {word}\n       did you mean --{word}?")
    if len(words) > 1:
        raise UserError(f"one config file at a time, but got {' and '.join(words)}")
    settings = {key: value for key, value in flags.items() if "." in key}
    options = {key: value for key, value in flags.items() if "." not in key}
    if "init_from" in options:
        short = options.pop("init_from")
        if settings.setdefault("train.init_from", short) != short:
            raise UserError(
                f"--init-from={short} and --train.init-from={settings['train.init_from']} exclude each other"
            )

    cfg, origin = kind(), dict.fromkeys(types_of(kind), "default")
    name = "default" if kind is Config else "classifier"
    if words:
        path = find_config(words[0])
        values = read_toml(path, kind)
        cfg = merge(cfg, values, str(path))
        origin.update(dict.fromkeys(values, str(path)))
        name = path.stem
    cfg = merge(cfg, settings, "command line")
    origin.update(dict.fromkeys(settings, "command line"))
    check_tokenizer(cfg.data.tokenizer, origin["data.tokenizer"])  # here: a run moved elsewhere needs no such folder

    resume = options.get("resume", "auto")
    if resume not in ("auto", "never", "must"):
        raise UserError(f"--resume={resume} is not one of auto, never, must")
    if resume == "must" and "overwrite" in options:
        raise UserError("--resume=must and --overwrite exclude each other")
    run_dir = Path(options.get("run_dir", f"runs/{name}"))
    if options.get("run_dir") == "":
        raise UserError("--run-dir needs a value")
    for flag, path in (("--run-dir", run_dir), ("train.init_from", Path(cfg.train.init_from))):
        try:
            path.lstat()
        except FileNotFoundError:
            continue
        except OSError as e:  # a name that is too long, a folder that is not ours to read
            raise UserError(f"{flag}={path} cannot be used: {e.strerror}") from None
    if cfg.train.init_from != "scratch":
        cfg, origin = _take_over(cfg, origin, run_dir, "overwrite" in options)
    return Command(
        cfg=validate(cfg, origin),
        origin=origin,
        run_dir=run_dir,
        resume=resume,  # pyright: ignore[reportArgumentType]
        overwrite="overwrite" in options,
        print_config="print_config" in options,
    )


def _take_over(cfg: Settings, origin: Origin, run_dir: Path, overwrite: bool) -> tuple[Settings, Origin]:
    """`cfg` with what was left open of the model and the tokenizer taken from the run train.init_from.

    A run that has begun in `run_dir` knows them itself, so that it goes on when the initial one is gone.
    """
    first = Path(cfg.train.init_from)
    where = origin["train.init_from"]
    mine = run_dir / "config.json"
    begun = None if overwrite or not mine.is_file() else read_json(mine, type(cfg))
    if begun and begun.train.init_from == cfg.train.init_from:
        before, source = begun, run_dir
    elif first.is_dir():
        before, source = read_json(first / "config.json"), first
    else:
        near = suggestion(str(first), [str(p.parent.parent) for p in first.parent.glob("*/checkpoints/[0-9]*")])
        hint = f"\n       train one first, or import one: {program('import-hf')} gpt2 {word(first)}"
        raise UserError(f"train.init_from={first} is no run directory ({where}){near}{hint}")
    given, old = dict(items(cfg)), dict(items(before))
    taken: dict[str, Any] = {}
    for key in (key for key in TYPES if key.startswith("model.") and key not in EXECUTION):
        if origin[key] == "default" and not (key == "model.dropout" and isinstance(cfg, ClassifierConfig)):
            taken[key] = old[key]
        elif given[key] == old[key] or key in ("model.dropout", "model.dtype", "model.separate_documents"):
            continue
        elif key != "model.block_size":
            raise UserError(
                f"{key}={given[key]} ({origin[key]}), but train.init_from={first} ({where}) has {key}={old[key]}\n"
                f"       leave {key} out, and it is {old[key]}"
            )
        elif given[key] > old[key]:
            raise UserError(
                f"{key}={given[key]} ({origin[key]}), but train.init_from={first} ({where}) has {key}={old[key]}\n"
                "       a shorter context can be cut from it; for a longer one it has no positions"
            )
    if origin["data.tokenizer"] == "default":
        taken["data.tokenizer"] = str(source)
    return merge(cfg, taken, str(source)), {**origin, **dict.fromkeys(taken, str(source))}


def render(cfg: Config, origin: Origin) -> str:
    """The settings as TOML with their origins in comments: a config file that gives this run again."""
    lines: list[str] = []
    section = ""
    for key, value in items(cfg):
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines.append(f"\n[{section}]" if lines else f"[{section}]")
        setting = f"{key.split('.')[1]} = {_toml(value)}"
        lines.append(f"{setting:<34}# {origin.get(key, 'default')}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)  # JSON's text, numbers and booleans are TOML's too


def help_text(kind: Kind = Config) -> str:
    """The `--help` page of what trains this kind: the comments behind the settings, drawn by argparse."""
    import argparse
    import textwrap

    names, indent = ", ".join(sorted(path.stem for path in config_folder().glob("*.toml"))), " " * 18
    shipped = textwrap.fill(names, 98, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    usage = TRAIN_USAGE if kind is Config else CLASSIFY_USAGE
    page = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=usage.format(program=program(COMMANDS[kind], briefly=True), shipped=shipped),
        add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34),
    )
    comments, defaults = _comments(), dict(items(kind()))
    kinds = {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT", dict[str, float]: "A=3,B=1"}
    for section, settings in get_type_hints(kind).items():
        group = page.add_argument_group(section)
        for name, hint in get_type_hints(settings).items():
            key = f"{section}.{name}"
            comment = next((text for c in settings.__mro__ if (text := comments.get((c.__name__, name)))), "")
            default = defaults[key] if isinstance(defaults[key], str) else _toml(defaults[key])
            group.add_argument(
                _flag(key),
                metavar=kinds.get(hint) or f"{{{','.join(get_args(hint))}}}",
                help=f"{comment} (default: {default})".replace("%", "%%"),  # a lone % would be argparse's own
            )
    return page.format_help().rstrip()


def _comments() -> dict[tuple[str, str], str]:
    """What stands behind each setting in the classes above: ("ModelConfig", "n_layer") -> "L, transformer blocks"."""
    found: dict[tuple[str, str], str] = {}
    owner = ""
    for line in inspect.getsource(sys.modules[__name__]).splitlines():
        if begins := re.match(r"class (\w+)", line):
            owner = begins[1]
        elif setting := re.match(r"    (\w+): .*  # (.*)", line):
            found[owner, setting[1]] = setting[2]
    return found
