"""Ctrl-C and SIGTERM as a wish that the loop grants. No jax here: it listens before jax is imported."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

LISTENED = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 2.0  # seconds, in which most steps end, and most commands after a second signal


class StopRequest:
    """Set by the first SIGINT or SIGTERM. A second one acts as if nobody had listened."""

    received: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the loop honours after the dispatch under way."""
    request = StopRequest()
    previous = {s: signal.getsignal(s) for s in LISTENED}

    def listen(number: int, _frame: object) -> None:
        request.received = signal.Signals(number)
        for s, handler in previous.items():
            signal.signal(s, handler)

    reading, writing = socket.socketpair()
    writing.setblocking(False)
    woken = signal.set_wakeup_fd(writing.fileno())
    threading.Thread(target=_answer, args=[reading], daemon=True).start()
    for s in previous:
        signal.signal(s, listen)
    try:
        yield request
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(woken)
        writing.close()


def _answer(reading: socket.socket) -> None:
    """Speak, and in the end act, for a main thread that hears nothing.

    Python calls a handler between two of its instructions, and a step is one of them: on a CPU it may take an hour.
    `reading` gets a signal's number when it comes, whatever the main thread does, and is closed when the run has ended.
    """

    def heard(seconds: float | None) -> int:
        """The next of our signals, or 0 if none comes within `seconds`."""
        reading.settimeout(seconds)
        with contextlib.suppress(TimeoutError):
            while number := reading.recv(1):
                if number[0] in LISTENED:
                    return number[0]
            raise EOFError
        return 0

    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # `train.py 2>&1 | tee log`: Ctrl-C ends tee first
            print(text, file=sys.stderr, flush=True)

    with reading, contextlib.suppress(EOFError):
        number = heard(None)
        if not heard(PATIENCE):
            say(
                f"{signal.Signals(number).name}: saves and ends when the step under way is done; once more ends at once"
            )
            heard(None)
        heard(PATIENCE)
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # which the progress bar hides
        say(
            f"{cursor}ended at once; the same command goes on from the last checkpoint, or starts over if there is none"
        )
        os._exit(128 + number)
