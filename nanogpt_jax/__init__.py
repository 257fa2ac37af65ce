"""Train, stop, resume and sample a GPT-2 in JAX.

    run = nanogpt_jax.load("runs/default")
    run.generate("The ", max_new_tokens=50)

Importing this imports no JAX and changes nothing. The first use of a name below imports JAX (api.py). If nobody has
before, it sets JAX's environment as our commands do, except what you have set: host/runtime.py.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt_jax.api import forward, load, train

__version__ = "0.1.0"
__all__ = ["forward", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if "jax" not in sys.modules:  # which reads its environment once
        from nanogpt_jax.host import runtime

        runtime.set_up()
    from nanogpt_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
