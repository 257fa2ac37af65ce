"""What the devices of a mesh send each other in a step, and how long that takes, in closed form."""

from nanogpt_jax.config import Config
from nanogpt_jax.model import memory
from nanogpt_jax.model.memory import Ways
from nanogpt_jax.planning.targets import Target


def sent(cfg: Config, ways: Ways) -> dict[str, float]:
    """Kind of collective -> bytes that a device sends in a step, if XLA did it as is usual, and no better.

    fsdp: the weights are gathered for the forward and again for the backward pass of each micro-batch, and their
    gradients are summed and scattered. data: what is left of the gradients is summed once a step. tensor: two sums of
    [B, T, C] a layer, forwards and backwards. A ring of n sends (n-1)/n of what is gathered or scattered, twice that
    for a sum.
    """
    m, (data, fsdp, tensor) = cfg.model, ways
    micro = cfg.train.micro_batch or cfg.train.batch_size
    turns, item = cfg.train.batch_size // micro, 2 if m.dtype == "bfloat16" else 4
    here, _ = memory.stored(cfg, ways)  # bytes of the parameters, float32
    share = {n: (n - 1) / n for n in ways}
    x = micro * m.block_size / (data * fsdp) * m.n_embd * item
    found = {
        "all-gather": turns * 2 * here * item / 4 * fsdp * share[fsdp],
        "reduce-scatter": turns * here * fsdp * share[fsdp],
        "all-reduce": 2 * here * share[data] + turns * 4 * m.n_layer * 2 * x * share[tensor],
    }
    return {kind: n for kind, n in found.items() if n}


def seconds(each: dict[str, float], target: Target, ways: Ways) -> float:
    """The time to send what `sent` says, one after the other, at the makers' bandwidths.

    On GPUs the axes fill a host from the right: tensor, fsdp, data. Between hosts each device has a network link of its
    own, and the devices of a host that hold the same share what they send.
    """
    kind, (data, fsdp, tensor) = target.kind, ways
    inner = fsdp * tensor
    if kind.host == 0 or data * inner <= kind.host:
        return sum(each.values()) / kind.link
    over_network = kind.network * kind.host
    within = kind.link if inner <= kind.host else over_network
    sums = over_network / min(inner, kind.host) if data > 1 else within
    return sum(n / (sums if name == "all-reduce" else within) for name, n in each.items())
