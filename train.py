"""Train a GPT-2: `python train.py [CONFIG.toml] [--SECTION.NAME VALUE ...]`, see `--help`.

The whole run, top to bottom. The same command again resumes the run.
"""

import sys
from contextlib import nullcontext

from nanogpt_jax import cli, config


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(config.help_text())
        return 0
    command = config.load(argv)  # defaults, TOML file, command line -> settings, or an error with a hint

    from nanogpt_jax.data import batches, dataset
    from nanogpt_jax.distributed import processes
    from nanogpt_jax.host.signals import stop_on_signals
    from nanogpt_jax.run import plan, run_dir

    if command.print_config:
        print(plan.describe(command))
        return 0
    with (
        processes.joined(command),  # one, unless mesh.* asks for more
        run_dir.claim(command) as run,  # locked, so that nobody else writes here
        nullcontext(processes.in_turn("data", dataset.open_data, command.cfg.data)) as data,  # prepared on first use
        stop_on_signals(lambda: run_dir.standing(run, argv)) as stop,
    ):
        run_dir.check_tokenizer(command, data)
        cfg = config.with_vocabulary(command.cfg, data.tokenizer.n_vocab, data.tokenizer.end_of_text, command.origin)
        batches.check_length(data.train, cfg.model.block_size)  # before anything is written
        run_dir.prepare(run, command, cfg, data)
        then = run_dir.afterwards(run, argv, cfg.train.steps)
        if finished := run_dir.finished(run, cfg):
            print(f"{finished}\n{then}")
            return 0
        outcome, sample = train(cfg, run, data, stop)
        if outcome.signal:
            again = f"go on with the same command: {config.command_again(argv)}"
            print(f"{outcome.signal.name}: saved step {outcome.step} of {cfg.train.steps} in {run}\n{again}")
            return processes.exit_code(outcome.signal)
        print(f"done in {outcome.seconds:.0f} s: validation loss {outcome.loss} at the last step")
        print(f"a sample:\n\n{sample}\n\n{then}")
        return 0


def train(cfg, directory, data, stop):
    """Train in the run directory -> how the run ended, and a sample of its text."""
    from nanogpt_jax.distributed.mesh import common_room, make_mesh, start
    from nanogpt_jax.inference.sampler import opening_and_continuation
    from nanogpt_jax.model import execution, gpt2
    from nanogpt_jax.run.checkpoint import load_params
    from nanogpt_jax.run.recording import Recording
    from nanogpt_jax.training import loop, optim
    from nanogpt_jax.training.language_model import headline, language_model
    from nanogpt_jax.training.step import make_train_step

    platform, mesh = start(), make_mesh(cfg.mesh)  # starts JAX's devices, which takes seconds
    cfg, how = execution.choose(cfg, platform, mesh.size, common_room(mesh))  # how it runs on this machine
    task = language_model(cfg, mesh, data)
    tx = optim.make_optimizer(cfg.optim, cfg.train.steps)
    step = make_train_step(cfg, tx, mesh, task, how)
    with Recording(directory, cfg.train) as run:
        state = loop.start_state(cfg, step, run)  # new, or the newest complete checkpoint
        print(headline(cfg, directory, data, mesh, run.step), flush=True)
        outcome = loop.fit(cfg, task, state, step, run, stop)
    if outcome.signal:
        return outcome, ""
    other = f"{config.program('sample')} {config.word(directory)}"
    params, _ = load_params(directory, gpt2.param_shapes(cfg.model), command=other)  # the best checkpoint
    return outcome, opening_and_continuation(cfg.model, params, data.tokenizer, data.val[:16], seed=cfg.train.seed)


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
