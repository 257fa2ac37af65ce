"""How fast this machine trains and samples: `nanogpt-jax bench [train|decode|data]`, optionally beside PyTorch.

Each engine has its own process, which sleeps while another is measured, so that they share no thread pool. A round
measures every engine once, in turn, so that other load on the machine affects all alike. Figures are medians over
rounds. Start-up and compilation are reported separately. Shares are relative to a large matrix product, and to a large
matrix-vector product, in the same round.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from nanogpt_jax import cli, config
from nanogpt_jax.config import Config, UserError, command_line
from nanogpt_jax.config.command_line import COUNT, CommandLine, flag

WORKS = """train: tokens/s of the training step on random tokens (the default)
decode: tokens/s of generation, from random weights
data: tokens/s of making batches on the host"""


@dataclass(frozen=True)
class Options(command_line.Options):
    rounds: int = flag("N", "measurements of every engine, in turn", 5, must=COUNT)
    seconds: int = flag(
        "S", "least length of a measurement in whole seconds; the current step is finished", 2, must=COUNT
    )
    versus: Literal["torch"] | None = flag(
        "",
        "do the same work in PyTorch too: eager and compiled for train (both with AdamW, whatever the "
        "configuration), transformers' generate for decode",
    )
    json: str | None = flag("FILE", "write the results as JSON")
    batch: int | None = flag("N", "texts at once, for decode (default: 1)", must=COUNT)
    prompt: int | None = flag(
        "N", "tokens of the prompt, for decode (default: 16, or half of model.block_size)", must=COUNT
    )
    new: int | None = flag("N", "tokens generated, for decode (default: 256, or as many as fit)", must=COUNT)


COMMAND = CommandLine(
    "bench",
    Options,
    "Measures how fast this machine trains and samples. A step of training takes a whole batch, and gpt2's is half a "
    "million tokens: see --train.batch-size and --train.micro-batch.",
    {"[train|decode|data]": WORKS, "[CONFIG.toml]": "a config file, or the name of a shipped one, as for train.py"},
    kind=Config,
)
PEERS = {"train": ("torch", "torch.compile"), "decode": ("transformers",), "data": ()}


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(COMMAND.help())
        return 0
    work, cfg, options = read(argv)
    engines = ["jax", *(PEERS[work] if options.versus else ())]
    order = {"work": work, "cfg": json.loads(config.to_json(cfg)), **dataclasses.asdict(options)}
    workers: dict[str, _Worker] = {}
    try:
        started = {}
        for name in engines:  # in turn: the time to the first step starts here
            print(f"starting {name} ...", file=sys.stderr)
            workers[name] = _Worker({**order, "engine": name})
            started[name] = workers[name].ask("start")
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for i in range(options.rounds):
            print(f"round {i + 1} of {options.rounds}", file=sys.stderr)
            for name, worker in workers.items():
                rounds[name].append(worker.ask("measure"))
        ended = {name: worker.ask("end") for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    results = [_result(name, started, rounds, ended[name]) for name in engines]
    print(_table(cfg, work, options, results))
    if options.json:
        numbers = {name: order[name] for name in ("rounds", "seconds", "batch", "prompt", "new")}
        table = {"work": work, "cfg": order["cfg"], **numbers, "results": results}
        cli.write_file("--json", options.json, json.dumps(table, indent=2, allow_nan=False) + "\n")
    return 0


def read(argv: list[str]) -> tuple[str, Config, Options]:
    """The kind of work, the settings, and our own options, checked and completed."""
    options = COMMAND.read(argv)
    works = [word for word in options.words if word in PEERS]
    work = works[0] if works else "train"
    words = [word for word in options.words if word not in PEERS]
    if len(works) > 1:
        raise UserError(f"one kind of work at a time, but got {' and '.join(works)}")
    if words and not Path(words[0]).exists() and (near := config.suggestion(words[0], PEERS)):
        raise UserError(f"{words[0]} is neither a kind of work nor a config file{near}")
    for name in ("batch", "prompt", "new"):
        if getattr(options, name) is not None and work != "decode":
            other = "; of training, it is --train.batch-size" if name == "batch" else ""
            raise UserError(f"--{name} is about generation, which is nanogpt-jax bench decode{other}")
    needed = {"train": ("torch",), "decode": ("torch", "transformers"), "data": ()}[work]
    if options.versus and (gone := [name for name in needed if not find_spec(name)]):
        raise UserError(f"--versus=torch needs {' and '.join(gone)}: pip install 'nanogpt-jax[compare]'")
    if options.json is not None:
        cli.check_file("--json", options.json)
    cfg = config.load([*words, *(f"--{key}={value}" for key, value in options.settings.items())]).cfg
    if cfg.mesh.num_processes > 1 or cfg.mesh.processes != "one":
        raise UserError("bench measures one process; leave mesh.processes and mesh.num_processes out")
    room = cfg.model.block_size
    prompt = options.prompt or max(1, min(16, room // 2))
    if work == "decode" and prompt >= room:
        raise UserError(f"--prompt={prompt} leaves no room in model.block_size={room}")
    new = options.new or max(1, min(256, room - prompt))
    vocab_size = cfg.model.vocab_size or _vocab_size(cfg.data.tokenizer)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))
    if work == "decode" and prompt + new > room:
        raise UserError(f"--prompt={prompt} and --new={new} exceed model.block_size={room}")
    if options.versus and cfg.optim.name != "adamw":
        cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, name="adamw", learning_rate=1e-3))
    return work, cfg, dataclasses.replace(options, batch=options.batch or 1, prompt=prompt, new=new)


def _vocab_size(tokenizer: str) -> int:
    """The vocabulary size, without the text: that of tiny Shakespeare, GPT-2, bpe:N or a stored tokenizer."""
    kind, _, size = tokenizer.partition(":")
    if kind in ("char", "gpt2", "bpe"):
        return {"char": 65, "gpt2": 50257, "bpe": int(size or 0)}[kind]
    if kind == "word":
        raise UserError(
            "data.tokenizer=word has as many tokens as the text has words; say how many: --model.vocab-size N"
        )
    from nanogpt_jax.data import tokenizer as tokenizers

    return tokenizers.load(tokenizers.find(tokenizer)).n_vocab


class _Worker:
    """A process that measures one engine, one question at a time."""

    def __init__(self, order: dict[str, Any]):
        self._name = order["engine"]
        order = {**order, "began": time.time()}
        # all engines share a GPU: none may allocate three quarters of its memory in advance
        env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ} if order.get("versus") else None
        command = [sys.executable, "-m", "nanogpt_jax.bench.worker", json.dumps(order)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, question: str) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; its last words say why
            stdin.write(question + "\n")
            stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise UserError(f"the measuring process of {self._name} ended with code {self._process.wait()}")
        said = json.loads(answer)
        if "error" in said:
            raise UserError(said["error"])
        return said

    def close(self) -> None:
        self._process.kill()
        with self._process:  # closes the pipes
            pass


def _result(name: str, started: dict[str, dict], rounds: dict[str, list[dict[str, float]]], ended: dict) -> dict:
    speeds = [r["tokens_per_second"] for r in rounds[name]]
    ours = rounds["jax"]  # it also measures the machine's limits
    flops, read = started[name]["flops_per_token"], started[name]["bytes_per_token"]

    def median(of: Callable[[float, dict[str, float]], float]) -> float:
        """The median over rounds of a ratio within each, so that a slow minute affects both sides."""
        return statistics.median(of(*pair) for pair in zip(speeds, ours, strict=True))

    return {
        "engine": name,
        "device": started["jax"]["device"],
        "tokens_per_second": statistics.median(speeds),
        "rounds": speeds,
        "times_as_fast": median(lambda speed, our: our["tokens_per_second"] / speed),
        "first_step_seconds": started[name]["seconds"],
        "peak_memory_bytes": ended["peak_memory_bytes"],
        "gflops": statistics.median(speeds) * flops / 1e9,
        "share_of_peak": median(lambda speed, our: speed * flops / our["peak_flops"]),
        "share_of_bandwidth": median(lambda speed, our: speed * read / our["bandwidth"]),
    }


def _table(cfg: Config, work: str, options: Options, results: list[dict[str, Any]]) -> str:
    m = cfg.model
    shape = f"n_layer={m.n_layer} n_head={m.n_head} n_embd={m.n_embd} block_size={m.block_size} {m.dtype}"
    load = f"batch_size={cfg.train.batch_size} dropout={m.dropout}"
    if work == "decode":
        load = " ".join(f"{name}={getattr(options, name)}" for name in ("batch", "prompt", "new"))
    lines = [f"{work}: {shape} {load} on {results[0]['device']}", ""]
    computes = work != "data"
    effort = f"{'GFLOP/s':>10}{'of peak':>9}" if computes else ""
    ratio = f"{'ours is':>9}" if len(results) > 1 else ""
    lines.append(f"{'':<14}{'tokens/s':>12}{effort}{'first step':>12}{'memory':>10}{ratio}")
    for r in results:
        ours = r["engine"] == "jax"
        effort = f"{r['gflops']:>10.1f}{r['share_of_peak']:>9.0%}" if computes else ""
        ratio = "" if ours else f"{r['times_as_fast']:>8.2f}x"
        lines.append(
            f"{'ours' if ours else r['engine']:<14}{r['tokens_per_second']:>12,.1f}{effort}"
            f"{r['first_step_seconds']:>10.1f} s{r['peak_memory_bytes'] / 2**20:>6.0f} MiB{ratio}"
        )
    if work == "decode":
        share = results[0]["share_of_bandwidth"]
        lines.append(f"\nours reads its weights, and what its cache holds, at {share:.0%} of the measured bandwidth")
    if len(results[0]["rounds"]) == 1:
        lines.append("\na single round may be off by a factor of two; --rounds 5 shows medians")
    return "\n".join(lines)
