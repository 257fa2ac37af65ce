"""The page of settings: each with its type, its default and its meaning.

The comment after a setting is its line in `--help`. 0 means "chosen automatically" if the comment says so. The defaults
are the recipe of `python train.py`: the lowest validation loss that we found for three minutes on a laptop's CPU.
"""

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints


@dataclass(frozen=True)
class ModelConfig:
    block_size: int = 64  # T, the longest context, in tokens
    vocab_size: int = 0  # V; 0: as many as the tokenizer has
    n_layer: int = 4  # L, transformer blocks
    n_head: int = 4  # H, attention heads in a block
    n_embd: int = 128  # C, channels; a multiple of n_head
    dropout: float = 0.0  # share dropped of embeddings, attention weights and residual branches
    bias: bool = False  # biases in linear layers and layer norms, as GPT-2 has them
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters stay float32
    attention: Literal["auto", "reference", "blocked", "xla", "cudnn", "splash"] = "auto"  # back-end; auto: by device
    remat: Literal["none", "dots", "block"] = "none"  # recompute in the backward pass; dots: all but products
    separate_documents: bool = False  # attend within documents only; positions restart in each
    end_of_text: int = -1  # id of the token between documents; -1: the tokenizer's
    scan_unroll: int = 0  # layers unrolled in the layer scan; 0: all, but 1 on TPU
    decode: Literal["auto", "native", "xla"] = "auto"  # generation on a CPU; native: in C; auto: in C for large models

    @property
    def padded_vocab_size(self) -> int:
        """50257 -> 50304: a multiple of 128 fills the matrix unit. losses.without_padding masks it."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class DataConfig:
    source: str = "python-docs"  # python-docs, frases, shakespeare, file, folder, "GLOB", hf:NAME[:CONFIG][:FIELD], -
    mixture: dict[str, float] = field(default_factory=dict)  # instead of source: sources and weights, A=3,B=1
    tokenizer: str = "char"  # char, word, gpt2, bpe:8192 (learned from the text), or a folder that holds one
    val_fraction: float = 0.1  # share for validation: the end of a single text, or some of several documents
    field: str = "text"  # the column with the text, in rows of .jsonl, .csv, .parquet and the hub
    dir: str = "data"  # folder for prepared tokens
    threads: int = 0  # threads that turn text into tokens; 0: one a core

    @property
    def title(self) -> str:
        return " + ".join(self.mixture) or self.source


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "lion", "muon", "sgd"] = "muon"  # muon: matrices by Muon, the rest by AdamW
    learning_rate: float = 2e-2  # peak learning rate; adamw needs less, about 4e-3 for a small model
    min_learning_rate: float = 0.0  # at the end of the schedule, as a share of the peak
    weight_decay: float = 0.1  # decoupled, on matrices only
    beta1: float = 0.9  # first moment; momentum of sgd and muon
    beta2: float = 0.99  # second moment
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "linear"  # from the peak down; wsd: in the last 20 %
    warmup_steps: int = 20  # steps of linear warm-up
    skip_spikes: float = 0.0  # skip steps with a loss or gradient so many standard deviations high; 0: none; try 8
    freeze_layers: int = 0  # number of first blocks that are not trained (finetuning)
    freeze_embeddings: bool = False  # do not train the embeddings, and with them the output head


@dataclass(frozen=True)
class TrainConfig:
    init_from: str = "scratch"  # scratch: random weights; or a run, to take its best weights, sizes and tokenizer
    steps: int = 1600  # optimizer steps
    batch_size: int = 12  # sequences a step, over all devices and micro-batches
    micro_batch: int = 0  # sequences at a time (gradients accumulate); 0: the whole batch; -1: as many as fit
    steps_per_dispatch: int = 0  # steps in one call to the device; 0: small model 8 on CPU, 32 on GPU; else 1
    recompile: Literal["auto", "off"] = "auto"  # auto: a long run on one CPU compiles a faster step, in 1 to 5 GB
    eval_every: int = 400  # steps between evaluations on the whole validation split; 0: only at the end
    save_every: int = 200  # steps between checkpoints; 0: only at the end
    log_every: int = 10  # steps between lines in metrics.jsonl
    keep: int = 2  # newest checkpoints kept, besides the best one
    checkpoints: str = "run"  # run: kept in the run directory; or a place for them, a folder or gs://BUCKET/NAME
    seed: int = 1337  # seed of the initial weights, the order of the data and the dropout
    tensorboard: bool = False  # also write TensorBoard files (the extra [tensorboard])
    wandb: bool = False  # also log to Weights & Biases (the extra [wandb])


@dataclass(frozen=True)
class MeshConfig:
    data: int = 1  # devices that split the batch; -1: all that the other axes leave
    fsdp: int = 1  # devices that split the batch and the parameters; -1: the rest
    tensor: int = 1  # devices that split heads and hidden units; -1: the rest
    processes: Literal["one", "auto"] = "one"  # auto: those that Slurm, Open MPI, GKE or a TPU VM has started
    coordinator: str = "none"  # HOST:PORT where process 0 listens: with the next two, starts many processes by hand
    num_processes: int = 1  # processes of the run; each is given the same command, but for its process_id
    process_id: int = 0  # which of them this is, from 0
    timeout: float = 300.0  # seconds that processes wait for each other, at the start and wherever they meet


@dataclass(frozen=True)
class Config:
    """All settings of a run. Frozen: to change one, make a new Config (`dataclasses.replace`)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    # Facts about this kind of run. Subclasses override them: see nanogpt_jax/classify/settings.py.
    COMMAND: ClassVar[str] = "train"  # the command that trains such a run
    ABOUT: ClassVar[str] = (
        "Trains a GPT-2 and keeps everything about it in a run directory. The same command again resumes where it "
        "stopped."
    )
    RUN: ClassVar[str] = "default"  # its directory in runs/ if there is no config file
    OTHER: ClassVar[str] = (  # the error for a run of the other kind
        "{run} is a classifier, not a language model\n       ask it: nanogpt-jax classify predict {word} TEXT; "
        "measure it: nanogpt-jax classify eval {word}"
    )
    OWN: ClassVar[frozenset[str]] = frozenset()  # model settings that --init-from does not take over
    EXECUTION: ClassVar[frozenset[str]] = frozenset(  # how to run, not what to compute: may change on resuming
        "model.attention model.decode model.remat model.scan_unroll data.dir data.threads train.steps "
        "train.micro_batch train.steps_per_dispatch train.recompile train.eval_every train.save_every train.log_every "
        "train.keep train.checkpoints train.tensorboard train.wandb mesh.data mesh.fsdp mesh.tensor mesh.processes "
        "mesh.coordinator mesh.num_processes mesh.process_id mesh.timeout".split()
    )

    def demands(self, check: Callable[..., None]) -> None:
        """Checks for this kind of run alone; validate.py has those that all kinds share."""
        check(self.train.steps >= 1, "train.steps", "must be at least 1")
        check(self.data.threads >= 0, "data.threads", "must not be negative")
        either = not self.data.mixture or self.data.source == DataConfig.source
        check(either, "data.source", "and data.mixture exclude each other", "leave one out")


Settings = TypeVar("Settings", bound=Config)
Kind = type[Config]
Origin = Mapping[str, str]  # "model.n_embd" -> "default", "configs/x.toml", "command line"


def sections_of(kind: Kind) -> dict[str, type]:
    """{"model": ModelConfig, ...}, in the order of the class."""
    hints = get_type_hints(kind)
    return {section.name: hints[section.name] for section in dataclasses.fields(kind)}


@functools.cache
def types_of(kind: Kind = Config) -> dict[str, Any]:
    """The type of every setting: "model.n_layer" -> int."""
    return {
        f"{section}.{name}": hint
        for section, settings in sections_of(kind).items()
        for name, hint in get_type_hints(settings).items()
    }


def meanings(section: type) -> dict[str, str]:
    """The comment behind each setting of a class or of its parents: "n_layer" -> "L, transformer blocks"."""
    classes = reversed(section.__mro__[:-1])  # a class overrides its parent
    return {name: text for one in classes for name, text in _comments(one.__module__).get(one.__name__, {}).items()}


@functools.cache
def _comments(module: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    owner = ""
    for line in inspect.getsource(sys.modules[module]).splitlines():
        if begins := re.match(r"class (\w+)", line):
            owner = begins[1]
        elif setting := re.match(r"    (\w+): .*  # (.*)", line):
            found.setdefault(owner, {})[setting[1]] = setting[2]
    return found


def items(cfg: Config) -> Iterator[tuple[str, Any]]:
    """Every setting as ("model.n_layer", 4), in the order of the classes above."""
    for section, values in dataclasses.asdict(cfg).items():
        for name, value in values.items():
            yield f"{section}.{name}", value


def differences(old: Config, new: Config, keys: frozenset[str]) -> list[tuple[str, Any, Any]]:
    """The settings among `keys` whose values differ, as (name, old value, new value)."""
    before = dict(items(old))
    return [(key, before[key], value) for key, value in items(new) if key in keys and before[key] != value]
