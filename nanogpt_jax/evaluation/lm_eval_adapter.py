"""A run as a model of EleutherAI's lm-evaluation-harness: `lm_eval.simple_evaluate(model=RunLM(model), tasks=[...])`,
and its tasks for `eval --lm-eval`.

The only importer of lm_eval (pip install 'nanogpt-jax[lm-eval]'; no torch needed). Log-likelihoods are those of
likelihood.py, which follows lm-eval's rules, so `eval --choices` and `eval --last-word` agree with it.
"""

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nanogpt_jax.config import UserError, suggestion
from nanogpt_jax.evaluation.likelihood import Model, encode_pair, log_likelihoods
from nanogpt_jax.evaluation.loss import Track, silent
from nanogpt_jax.inference.generate import Rules
from nanogpt_jax.inference.sampler import generate_text, prompt_ids

AT_ONCE = 16  # texts generated in a batch
NEW_TOKENS = 256  # lm-eval's default if a task does not set it


class RunLM(LM):
    """Runs in one process, on all devices of `model.mesh`."""

    def __init__(self, model: Model, track: Track = silent) -> None:
        super().__init__()
        self.model, self.track = model, track

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """log p(continuation | context) of each request, and whether greedy decoding writes it."""
        pairs = [encode_pair(self.model, *request.args, where=_where(request)) for request in requests]
        found = [(f.nats, f.greedy) for f in log_likelihoods(self.model, pairs, self.track)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """log p of each whole text, in windows of the model's context that do not overlap, the last one full."""
        prefix, T = prompt_ids(self.model.tokenizer, "")[0], self.model.cfg.block_size
        pairs, counts = [], []
        for request in requests:
            try:
                tokens = self.model.tokenizer.encode(request.args[0]).tolist()
            except UserError as e:
                raise UserError(f"{_where(request)}: {e}") from None
            windows = [make_disjoint_window(w) for w in get_rolling_token_windows(tokens, prefix, T, context_len=1)]
            pairs += windows
            counts.append(len(windows))
        found = iter(log_likelihoods(self.model, pairs, self.track))
        answers = [math.fsum(next(found).nats for _ in range(n)) for n in counts]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """A continuation of each context, up to the first of the strings in `until`."""
        kinds: dict[tuple[Rules, int, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(_how(request), []).append(i)
        parts = [
            (how, members[i : i + AT_ONCE]) for how, members in kinds.items() for i in range(0, len(members), AT_ONCE)
        ]
        answers = [""] * len(requests)
        for (rules, most, stop), members in self.track(parts, len(parts)):
            contexts = [requests[i].args[0] for i in members]
            m = self.model
            texts = generate_text(
                m.cfg, m.params, m.tokenizer, contexts, rules=rules, max_new_tokens=most, seed=0, stop=stop
            )
            for i, text in zip(members, texts, strict=True):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers


def load_tasks(names: list[str], include_path: str | None) -> Any:
    """The tasks, loaded by lm-eval; UserError if one is unknown or its data is unavailable.

    `include_path`: a folder with tasks of your own. They may name Python code, which lm-eval runs.
    """
    from lm_eval.tasks import TaskManager

    wrong = UserError("")
    for defaults in (False, True) if include_path else (True,):  # indexing its own 14,000 takes seconds
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            near = suggestion(unknown[0], manager.all_tasks) or "\n       --include-path DIR adds your own"
            wrong = UserError(f"lm-eval knows no task {unknown[0]}{near}")
            continue
        try:
            return manager.load(names)
        except Exception as e:  # from many libraries: YAML, datasets, the network
            wrong = UserError(
                f"--lm-eval={','.join(names)} cannot be loaded: {' '.join(str(e).split())[:300]}\n"
                "       a task whose data is on the hub needs the network"
            )
    raise wrong


def measure(model: Model, tasks: Any, track: Track) -> dict[str, Any]:
    """lm-eval's results for the tasks of `load_tasks`: task -> figure -> value."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else its bootstrap forks a process with jax's threads
    from lm_eval.evaluator import evaluate

    with contextlib.redirect_stdout(sys.stderr):  # its own progress
        found: Any = evaluate(RunLM(model, track), tasks, bootstrap_iters=1000, log_samples=False)
    return {task: {k: v for k, v in row.items() if k != "alias"} for task, row in found["results"].items()}


def _where(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _how(request: Instance) -> tuple[Rules, int, tuple[str, ...]]:
    """lm-eval's generation settings as ours. UserError if we lack one."""
    arguments: Any = request.args
    asked: dict[str, Any] = dict(arguments[1])
    until = asked.pop("until", None) or []
    stop = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    most = asked.pop("max_gen_toks", NEW_TOKENS)
    rules = {
        name: asked.pop(name)
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        if name in asked
    }
    if not asked.pop("do_sample", False):  # greedy unless this is set, whatever the temperature
        rules["temperature"] = 0.0
    if asked:
        known = "until, max_gen_toks, do_sample, temperature, top_k, top_p, min_p, repetition_penalty"
        raise UserError(f"{_where(request)}: generation_kwargs has {next(iter(asked))}; known are {known}")
    return Rules(**{"temperature": 1.0, **rules}), int(most), stop
