"""--halve: successive halving over complete, shortened schedules (Jamieson and Talwalkar 2016, but for that).

A round trains all configurations that are left, for the fewer steps the more they are, with a schedule that is
complete: warm-up, peak and decay. The early loss of a long schedule says little, since its learning rate is still high.
The better half goes on to the next round, from new weights. The last two are trained in full.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from nanogpt_jax.config import UserError
from nanogpt_jax.config.settings import Settings

FEWEST_STEPS = 10  # of a shortened schedule
LEAST = 3  # configurations; of two, both are trained in full


def share(n: int) -> int:
    """Of n configurations each trains for 1/share of the steps: all together, about as long as one in full."""
    return 1 if n <= 2 else 2 ** math.ceil(math.log2(n))


def rounds(n: int) -> list[int]:
    """The number of configurations in each round, if none diverges: 8, 4, 2."""
    return [n] if n <= 2 else [n, *rounds(math.ceil(n / 2))]


def shortened(cfg: Settings, share: int) -> Settings:
    """`cfg` with 1/share of the steps, and with what depends on them. UserError if too few steps are left.

    Warm-up, and the steps between evaluations and saves, keep their share of the whole. 0 stays 0.
    """
    t, o = cfg.train, cfg.optim
    if t.steps // share < FEWEST_STEPS:
        raise UserError(
            f"train.steps={t.steps} is too short for --halve: in the first round it is {t.steps // share}, and at "
            f"least {FEWEST_STEPS} are needed\n       give train.steps at least {FEWEST_STEPS * share}"
        )

    def less(n: int) -> int:
        return max(round(n / share), 1) if n else 0

    shorter = replace(t, steps=t.steps // share, eval_every=less(t.eval_every), save_every=less(t.save_every))
    return replace(
        cfg,
        train=replace(shorter, log_every=less(t.log_every)),
        optim=replace(o, warmup_steps=less(o.warmup_steps)),
    )


def correlation(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Spearman's rank correlation of two rounds' losses, of the same configurations; None if they are too few or equal.

    Near 1, the short round has ranked as the longer one does; near 0, it was no guide.
    """
    a, b = _ranks(before), _ranks(after)
    middle = (len(a) + 1) / 2
    products = [
        sum((x - middle) * (y - middle) for x, y in zip(p, q, strict=True)) for p, q in ((a, b), (a, a), (b, b))
    ]
    return products[0] / math.sqrt(products[1] * products[2]) if products[1] and products[2] else None


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal ones share the mean of their ranks."""
    return [sum(x < v for x in values) + (sum(x == v for x in values) + 1) / 2 for v in values]
