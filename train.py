"""Train a GPT-2: `python train.py [CONFIG.toml] [--SECTION.NAME VALUE ...]`, see `--help`.

The whole run, top to bottom. The same command again goes on where the run stopped.
"""

import sys
from dataclasses import replace

from nanogpt_jax import cli, config


def main(argv: list[str]) -> int:
    if cli.asks_for_help(argv):
        print(config.help_text())
        return 0
    command = config.load(argv)  # defaults, TOML file, command line -> settings, or an error with a hint
    cfg = command.cfg
    if command.print_config:
        print(config.render(cfg, command.origin))
        return 0

    from nanogpt_jax.training import run_dir

    with run_dir.claim(command) as run:  # locked: nobody else writes here
        from nanogpt_jax.data.prepare import open_data

        data = open_data(cfg.data)  # prepared on first use
        cfg = config.with_vocabulary(cfg, data.tokenizer.n_vocab, command.origin)
        run_dir.prepare(run, command, cfg, data)
        if run_dir.is_finished(run, cfg):
            print(f"{run} is finished: step {cfg.train.steps} of {cfg.train.steps}\n{run_dir.next_steps(run, command)}")
            return 0

        import jax  # takes seconds, so only now

        from nanogpt_jax.distributed.mesh import make_mesh
        from nanogpt_jax.inference.generate import Rules
        from nanogpt_jax.inference.sampler import generate_text
        from nanogpt_jax.model import gpt2
        from nanogpt_jax.training.checkpoint import Checkpointer, load_params
        from nanogpt_jax.training.loop import choose_steps_per_dispatch, fit, stop_on_signals
        from nanogpt_jax.training.metrics import MetricsLog
        from nanogpt_jax.training.optim import make_optimizer
        from nanogpt_jax.training.step import make_train_step

        with stop_on_signals() as stop, Checkpointer(run, cfg.train.keep) as checkpoints:
            platform = jax.default_backend()
            cfg = replace(cfg, model=gpt2.resolve(cfg.model, platform))
            mesh = make_mesh(cfg.mesh)
            tx = make_optimizer(cfg.optim, cfg.train.steps)
            state, meta = checkpoints.resume(cfg, tx, mesh)  # born sharded, or the newest whole checkpoint
            print(run_dir.headline(run, cfg, data, gpt2.n_params(cfg.model), meta["step"], f"{mesh.size} {platform}"))
            K = choose_steps_per_dispatch(cfg, platform)
            step = make_train_step(cfg, tx, mesh, K)
            with MetricsLog(run, cfg.train, meta["step"]) as log:
                outcome = fit(cfg, mesh, state, step, K, data, checkpoints, log, meta, stop)

        if outcome.signal:
            print(f"{outcome.signal.name}: saved step {outcome.step} of {cfg.train.steps} in {run}")
            print(f"go on with the same command: {run_dir.same_command(argv)}")
            return 128 + outcome.signal
        print(f"done in {outcome.seconds:.0f} s: validation loss {outcome.validation['val/loss']:.4f} at the last step")
        params, step = load_params(run, cfg)  # the best checkpoint, as sample.py takes it
        sample = generate_text(
            cfg.model, params, data.tokenizer, [""], rules=Rules(), max_new_tokens=300, seed=cfg.train.seed
        )[0]
        print(f"a sample from step {step}:\n\n{sample.strip()}\n\n{run_dir.next_steps(run, command)}")
        return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
