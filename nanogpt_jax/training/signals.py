"""Ctrl-C and SIGTERM as a wish that the loop grants. No jax here: it listens before jax is imported."""

import contextlib
import os
import select
import signal
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

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    woken = signal.set_wakeup_fd(writing)
    threading.Thread(target=_answer, args=[reading], daemon=True).start()
    for s in previous:
        signal.signal(s, listen)
    try:
        yield request
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(woken)
        os.close(writing)


def _answer(reading: int) -> None:
    """Speak, and in the end act, for a main thread that hears nothing.

    Python calls a handler between two of its instructions, and a step is one of them: on a CPU it may take an hour.
    The pipe gets a signal's number when it comes, whatever the main thread does, and is closed when the run has ended.
    """
    with contextlib.suppress(EOFError), open(reading, "rb", buffering=0) as pipe:

        def heard(seconds: float | None) -> int:
            while select.select([pipe], [], [], seconds)[0]:
                if not (number := pipe.read(1)):
                    raise EOFError
                if number[0] in LISTENED:
                    return number[0]
            return 0

        number = heard(None)
        if not heard(PATIENCE):
            name = signal.Signals(number).name
            print(
                f"{name}: saves and ends when the step under way is done; once more ends at once, as last saved",
                file=sys.stderr,
            )
            heard(None)
        heard(PATIENCE)
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")  # the cursor, which the progress bar hides
        os.write(2, b"ended at once; what was saved before is kept\n")
        os._exit(128 + number)
