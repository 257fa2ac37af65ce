"""What training would do on this machine, before it does anything."""

import dataclasses

from nanogpt_jax.config import Command, Config, UserError, parse
from nanogpt_jax.host import runtime
from nanogpt_jax.model import execution
from nanogpt_jax.model.execution import Execution


def execution_here(cfg: Config) -> Execution:
    """How `cfg` would run here. Starts JAX's devices. UserError if it cannot."""
    from nanogpt_jax.distributed.mesh import make_mesh, room, start

    platform = start()
    mesh = make_mesh(cfg.mesh)
    _, how = execution.choose(cfg, platform, mesh.size, room(mesh))
    return how


def describe(command: Command) -> str:
    """What training would do, as TOML with comments: the settings and where they came from, JAX, this machine.

    If it cannot run here, the reason stands in the place of how it runs: the settings may be for another machine.
    """
    settings = parse.render(command.cfg, command.origin)
    try:
        how = dataclasses.asdict(execution_here(command.cfg))
        known = "" if command.cfg.model.vocab_size else ", if its vocabulary, which is not known yet, is small"
        shown = [f"how it runs on this machine{known}:", *(f"{key}={str(value).lower()}" for key, value in how.items())]
    except UserError as e:
        shown = ["it cannot run on this machine:", *str(e).splitlines()]
    here = "\n".join(f"# {line}" for line in shown)
    return f"{settings}\n\n{runtime.describe()}\n\n{here}"
