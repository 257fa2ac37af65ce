"""What a run needs and costs on a target, from closed forms alone: no jax, and well under a second."""

import dataclasses
import math
from dataclasses import dataclass

from nanogpt_jax.config import Config, ModelConfig, UserError
from nanogpt_jax.model import execution, memory, sizes
from nanogpt_jax.model.execution import Execution
from nanogpt_jax.model.memory import Step, Ways
from nanogpt_jax.planning import known, process, traffic
from nanogpt_jax.planning.known import Text
from nanogpt_jax.planning.targets import Target

CHINCHILLA, NANOCHAT = 20, 12  # tokens a parameter (Hoffmann et al. 2022); a parameter of matrices and head (nanochat)
FEWEST = 1  # tokens a parameter; our default recipe, the best of three minutes, takes 1.5
MOST_EPOCHS = 4  # passes over a text; from there on, repeated tokens teach little (Muennighoff et al. 2023)
# Kaplan et al. 2020, equation D.1: the rate for Adam by the number of parameters without embeddings; and the multiples
# of it that are usual for each optimizer. Ours of Muon scales its updates like Adam's, and takes more.
RATE, RATE_A_LOG = 0.003239, -0.0001395
USUAL = {"adamw": (1 / 4, 6), "lion": (1 / 40, 1), "muon": (1, 60)}
# Bytes on disk of a checkpoint, as a share of its numbers, as orbax compresses them: of parameters, of AdamW's moments,
# of the single moment of others; and what it writes beside them. Measured on runs of 0.1 to 124M parameters.
SAVED, SAVED_TWO, SAVED_ONE, BESIDE = 0.9255, 0.9225, 0.953, 63_000
SMALL = 20e9  # FLOPs of a step and device. With fewer, an accelerator waits for its program most of the time


@dataclass(frozen=True)
class Plan:
    """A run on a target."""

    cfg: Config  # the model and the micro-batch are resolved
    target: Target
    text: Text
    ways: Ways
    how: Execution
    step: Step
    largest: int  # the largest micro-batch that fits; 0: none

    @property
    def used(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.ways)

    @property
    def parameters(self) -> int:
        return sizes.n_params(self.cfg.model)

    @property
    def without_embeddings(self) -> int:
        m = self.cfg.model
        return self.parameters - (m.vocab_size + m.block_size) * m.n_embd

    @property
    def products(self) -> int:
        """Parameters of matrices and of the head, as nanochat counts them."""
        m = self.cfg.model
        return self.without_embeddings + m.vocab_size * m.n_embd

    @property
    def tokens_a_step(self) -> int:
        return self.cfg.train.batch_size * self.cfg.model.block_size

    @property
    def tokens(self) -> int:
        return self.cfg.train.steps * self.tokens_a_step

    @property
    def flops(self) -> float:
        """Of a step."""
        return sizes.flops_per_token(self.cfg.model) * self.tokens_a_step

    @property
    def needed(self) -> float:
        """Bytes that are enough on a device."""
        return memory.needed(self.cfg, self.how, self.target.kind.platform, self.ways)

    @property
    def fits(self) -> bool:
        return self.needed <= self.target.room

    @property
    def process(self) -> tuple[int, int]:
        """Bytes of the whole process on one CPU, and with the second program, if a run of this length compiles one."""
        first = process.peak(self.step)
        positions = execution.block_length(self.cfg.model.block_size)
        second = process.of_second_program(self.cfg, self.how, positions)
        most = execution.RECOMPILE_SHARE * self.target.room * process.SECOND / execution.RECOMPILE_COST
        long = self.seconds[1] > execution.RECOMPILE_AFTER + execution.RECOMPILE_LEFT
        small = self.step.temporary <= execution.RECOMPILE_TEMPORARY
        if not (self.how.recompile and long and small and second <= most):
            return first, first
        return first, max(first, process.PROCESS + self.step.total + second)

    @property
    def checkpoint(self) -> float:
        """Bytes on disk of one checkpoint."""
        total, name = BESIDE, self.cfg.optim.name
        for path, n, *_ in memory.leaves(self.cfg.model):
            moments = memory.moments(path, name)
            total += 4 * n * (SAVED + moments * (SAVED_TWO if moments == 2 else SAVED_ONE))
        return total

    @property
    def checkpoints(self) -> int:
        """The most that are there at once: the newest, the best, and one that is being written."""
        t = self.cfg.train
        saves = math.ceil(t.steps / t.save_every) if t.save_every else 1
        return min(t.keep + 2, saves + 1)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """The least and the most for a step."""
        slow, fast = self.target.speed(self.cfg.model.dtype)
        more = 4 / 3 if self.cfg.model.remat == "block" else 1  # the forward pass is computed twice
        return self.flops * more / self.used / fast, self.flops * more / self.used / slow

    @property
    def evaluations(self) -> float:
        """The cost of all evaluations, in steps: a forward pass over the whole validation split is a third of one."""
        t = self.cfg.train
        times = math.ceil(t.steps / t.eval_every) if t.eval_every else 1
        return times * self.text.val / 3 / self.tokens_a_step

    @property
    def seconds(self) -> tuple[float, float]:
        """The least and the most for the run."""
        fast, slow = self.step_seconds
        steps = self.cfg.train.steps + self.evaluations
        return steps * fast, steps * slow

    @property
    def sent(self) -> dict[str, float]:
        return traffic.sent(self.cfg, self.ways)

    @property
    def sent_seconds(self) -> float:
        return traffic.seconds(self.sent, self.target, self.ways)

    @property
    def cache(self) -> int:
        """Bytes of keys and values of one sequence of full length, in generation."""
        m = self.cfg.model
        return 2 * m.n_layer * m.n_embd * m.block_size * (2 if m.dtype == "bfloat16" else 4)


def plan(cfg: Config, target: Target, tokens: int = 0) -> Plan:
    """The plan of `cfg`; `tokens`: of the training text, if known otherwise. UserError if the mesh does not fit."""
    text = known.text(cfg.data, cfg.model.vocab_size)
    text = dataclasses.replace(text, train=tokens) if tokens else text
    platform = target.kind.platform
    cfg = dataclasses.replace(cfg, model=model_there(cfg, text.vocabulary, platform))
    ways = execution.ways_of(cfg.mesh, target.count)
    check_mesh(cfg, target, ways)
    largest = execution.largest_micro_batch(cfg, platform, ways, target.room)
    if cfg.train.micro_batch == -1:
        cfg = execution.with_micro_batch(cfg, largest or execution.micro_batches(cfg, ways)[-1])
    how = execution.decide(cfg, platform, ways)
    return Plan(cfg, target, text, ways, how, memory.of_step(cfg, how, platform, ways), largest)


def model_there(cfg: Config, vocabulary: int, platform: str) -> ModelConfig:
    """The model with "auto" resolved for a platform that is not here."""
    model = dataclasses.replace(cfg.model, vocab_size=vocabulary)
    if platform == "gpu" and (model.attention, model.dtype, model.dropout) == ("auto", "bfloat16", 0):
        model = dataclasses.replace(model, attention="cudnn")  # else `resolve` would try it on a card
    return execution.resolve(model, platform)


def check_mesh(cfg: Config, target: Target, ways: Ways) -> None:
    """UserError if this mesh cannot lie on the target, or cannot split the batch or a parameter."""
    shape, used, split = "data={} fsdp={} tensor={}".format(*ways), math.prod(ways), ways[0] * ways[1]
    if used > target.count:
        raise UserError(
            f"mesh {shape} needs {used} devices, and --target={target.name} has {target.count}\n"
            "       make an axis of it smaller (-1 takes what is there), or name a larger target"
        )
    if target.count % used and -1 in (cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor):
        raise UserError(
            f"mesh {shape} leaves {target.count - used} of the {target.count} devices of {target.name} idle"
        )
    micro = cfg.train.micro_batch if cfg.train.micro_batch > 0 else cfg.train.batch_size
    name = "train.micro_batch" if cfg.train.micro_batch > 0 else "train.batch_size"
    if micro % split:
        good = execution.micro_batches(cfg, ways)
        larger = [n for n in good if n > micro]
        instead = f"train.micro_batch={min(larger)}" if larger else f"train.batch_size={-(-micro // split) * split}"
        instead = instead if good else f"train.batch_size={-(-cfg.train.batch_size // split) * split}"
        raise UserError(
            f"{name}={micro} cannot be split over mesh data * fsdp = {split} of {target.name}; nearest: {instead}"
        )
    m = cfg.model
    for axis, n, size in (
        ("fsdp", ways[1], m.n_embd),
        ("tensor", ways[2], m.n_head),
        ("tensor", ways[2], m.padded_vocab_size),
    ):
        if size % n:
            raise UserError(f"mesh.{axis}={n} does not divide a dimension of {size} of the parameters")


def warnings(p: Plan) -> list[str]:
    """What a person would ask about before starting this."""
    t, o, found = p.cfg.train, p.cfg.optim, []
    usual = RATE + RATE_A_LOG * math.log(max(p.without_embeddings, 1))
    if o.name in USUAL and usual > 0:
        low, high = (usual * n for n in USUAL[o.name])
        low = 0 if t.init_from != "scratch" else low  # finetuning takes less
        if not low <= o.learning_rate <= high:
            found.append(
                f"optim.learning_rate={o.learning_rate:g} is {'above' if o.learning_rate > high else 'below'} what is "
                f"usual for {o.name} and this size: {low:.1g} to {high:.1g}"
            )
    a_parameter = p.tokens / p.parameters
    if a_parameter < FEWEST and t.init_from == "scratch":
        found.append(f"only {a_parameter:.2g} tokens a parameter: a smaller model would be better at the same cost")
    if p.text.train and p.tokens / p.text.train > MOST_EPOCHS:
        found.append(
            f"{p.tokens / p.text.train:,.0f} passes over the text: beyond {MOST_EPOCHS}, repeated tokens teach little"
        )
    if o.warmup_steps >= t.steps:
        found.append(
            f"optim.warmup_steps={o.warmup_steps} is no less than train.steps={t.steps}: the peak is never left"
        )
    if p.used < p.target.count:
        found.append(f"the mesh uses {p.used} of {p.target.count} devices; --mesh.data -1 uses all")
    if p.target.kind.platform != "cpu" and p.flops / p.used < SMALL:
        found.append("a step is too small to fill such a device: it will take longer than these times")
    if p.target.kind.platform == "cpu" and p.cfg.model.remat != "none" and p.how.scan_unroll == p.cfg.model.n_layer:
        found.append(
            f"model.remat={p.cfg.model.remat} saves no memory on a CPU unless model.scan_unroll=1: XLA merges what is "
            "computed twice"
        )
    return found


def changes(p: Plan) -> list[tuple[str, Config]]:
    """Single changes by which a run might fit, the cheapest in time first: settings as flags, and the new Config."""
    cfg, found = p.cfg, []
    smaller = [n for n in execution.micro_batches(cfg, p.ways) if n < p.how.micro_batch]
    if smaller:  # the largest that fits, else the smallest there is
        n = p.largest if 0 < p.largest < p.how.micro_batch else smaller[-1]
        found.append((f"train.micro_batch={n}", execution.with_micro_batch(cfg, n)))
    # on a CPU only layers in a loop are really computed again
    loop, words = ({"scan_unroll": 1}, "model.scan_unroll=1 ") if p.target.kind.platform == "cpu" else ({}, "")
    order = ("none", "dots", "block")
    for remat in order[order.index(cfg.model.remat) + 1 :]:
        found.append((f"{words}model.remat={remat}", _model(cfg, remat=remat, **loop)))
    data, fsdp, tensor = p.ways
    for n in range(2, data + 1):
        if data % n == 0 and cfg.model.n_embd % (fsdp * n) == 0:
            mesh = dataclasses.replace(cfg.mesh, data=data // n, fsdp=fsdp * n, tensor=tensor)
            found.append((f"mesh.data={data // n} mesh.fsdp={fsdp * n}", dataclasses.replace(cfg, mesh=mesh)))
    least = execution.micro_batches(cfg, p.ways)[-1]
    both = execution.with_micro_batch(_model(cfg, remat="block", **loop), least)
    found.append((f"{words}model.remat=block train.micro_batch={least}", both))
    return found


def _model(cfg: Config, **settings) -> Config:
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **settings))


def remedies(p: Plan, most: int = 3) -> list[tuple[str, Plan]]:
    """The changes that make it fit, by the closed form."""
    tried = [(words, plan(cfg, p.target, p.text.train)) for words, cfg in changes(p)]
    return [(words, one) for words, one in tried if one.fits][:most]
