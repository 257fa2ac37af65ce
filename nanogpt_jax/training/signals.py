"""Ctrl-C and SIGTERM as a wish that the loop grants. No jax here: it listens before jax is imported."""

import contextlib
import signal
from collections.abc import Iterator


class StopRequest:
    """Set by the first SIGINT or SIGTERM. A second one acts as if nobody had listened."""

    received: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the loop honours after the dispatch under way."""
    request = StopRequest()
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def listen(number: int, _frame: object) -> None:
        request.received = signal.Signals(number)
        for s, handler in previous.items():
            signal.signal(s, handler)

    for s in previous:
        signal.signal(s, listen)
    try:
        yield request
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
