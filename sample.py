"""Write text with a trained model: `python sample.py [RUN] [--prompt TEXT] [--FLAG VALUE ...]`, see `--help`.

Text goes to stdout while it is generated, notes and errors to stderr.
"""

import sys
from pathlib import Path

from nanogpt_jax import cli
from nanogpt_jax.inference import options


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(options.COMMAND.help())
        return 0
    asked = options.read(argv)
    prompt = options.read_prompt(asked)

    from nanogpt_jax.run.opened import newest, open_run

    run = open_run(Path(asked.run) if asked.run else newest(Path("runs")))
    cfg, tokenizer = run.cfg, run.tokenizer
    if prompt is None:  # a char model begins an empty prompt with end-of-text or a newline, if its vocabulary has one
        prompt = "" if tokenizer.name == "char" else "\n"
    n, context = len(tokenizer.encode(prompt)), cfg.model.block_size  # UserError if the vocabulary lacks a character
    if n > context:
        print(f"note: of the prompt's {n} tokens the model sees the last {context}, its context", file=sys.stderr)

    if asked.num_samples > 1 and asked.temperature == 0:
        print("note: at temperature 0 all samples are alike", file=sys.stderr)

    from nanogpt_jax.distributed.mesh import start  # importing jax takes seconds
    from nanogpt_jax.inference.generate import Rules
    from nanogpt_jax.inference.sampler import generate_text, stream_text

    start()
    params, step = run.load(asked.checkpoint)
    if not asked.run:
        print(f"from {run.path}, step {step}:", file=sys.stderr)
    rules = Rules(asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.repetition_penalty)
    model = (cfg.model, params, tokenizer, [prompt] * asked.num_samples)
    how = {"rules": rules, "max_new_tokens": asked.max_new_tokens, "seed": asked.seed, "stop": asked.stop}
    if asked.num_samples == 1:
        print(prompt, end="", flush=True)
        for _, piece in stream_text(*model, **how):
            print(piece, end="", flush=True)
        print()
        return 0
    for i, text in enumerate(generate_text(*model, **how), start=1):
        print(f"--- sample {i} ---\n{prompt}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
