"""A run as a model of EleutherAI's lm-evaluation-harness: `lm_eval.simple_evaluate(model=RunLM(model), tasks=[...])`.

The only importer of lm_eval (pip install 'nanogpt-jax[lm-eval]'; no torch needed). Log-likelihoods are those of
likelihood.py, which follows lm-eval's rules, so `eval --choices` and `eval --last-word` agree with it.
"""

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nanogpt_jax.config import UserError
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
