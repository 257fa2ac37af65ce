"""Turns Ctrl-C, SIGTERM and a terminal that is closed into a stop request that the loop honours.

Nothing here imports jax, because signals are handled before jax is imported.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from nanogpt_jax.host import terminal

LISTENED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
PATIENCE = 2.0  # seconds. Most steps end sooner, and so do most commands after a second signal


class StopRequest:
    """Set by the first SIGINT, SIGTERM or SIGHUP. A second one has its default effect, except SIGHUP: a closed terminal
    sends two, one from the shell and one of its own."""

    received: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signals(standing: Callable[[], str]) -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP into a request that the loop honours after the current dispatch.

    If a second signal ends the run at once, the KeyboardInterrupt carries `standing()`: where the run stands. A signal
    that our parent set to be ignored stays ignored: SIGHUP by nohup, SIGINT by a script with `&`. In this context, a
    closed terminal or reader is no error.

    In a notebook or another interactive Python, a second signal raises KeyboardInterrupt as soon as the step is done,
    but the process is never ended. In a thread, which hears no signals, this does nothing.
    """

    def last_words() -> str:
        return f"ended at once; {standing()}"

    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {s: signal.getsignal(s) for s in LISTENED}
    previous = {s: handler for s, handler in previous.items() if handler not in (signal.SIG_IGN, None)}

    def listen(number: int, frame: object) -> None:
        if not request.received:
            request.received = signal.Signals(number)
        elif number != HANGUP:  # the default effect
            handler = previous[signal.Signals(number)]
            if callable(handler):
                handler(number, frame)  # pyright: ignore[reportArgumentType]
            else:
                signal.signal(number, handler)
                os.kill(os.getpid(), number)

    interactive = hasattr(sys, "ps1")  # has a prompt
    with contextlib.nullcontext() if interactive else _answered_at_once(last_words):
        for s in previous:
            signal.signal(s, listen)
        try:
            with terminal.outlived():
                yield request
        except KeyboardInterrupt:
            raise KeyboardInterrupt(last_words()) from None
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)


@contextlib.contextmanager
def _answered_at_once(last_words: Callable[[], str]) -> Iterator[None]:
    """Signals are answered by a thread: see `_answer`."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    woken = signal.set_wakeup_fd(writing.fileno())
    threading.Thread(target=_answer, args=[reading, last_words], daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        writing.close()


def _answer(reading: socket.socket, last_words: Callable[[], str]) -> None:
    """Answer signals, and end the process if need be, while the main thread is busy.

    Python calls handlers between two of its instructions, and a step, which may take an hour on a CPU, is a single one.
    `reading` receives a signal's number at once, whatever the main thread does, and is closed when the run has ended.
    This thread prints `last_words()` before it ends the process.
    """

    def heard(seconds: float | None, signals: list[signal.Signals]) -> int:
        """The next of `signals`, or 0 if none comes within `seconds`."""
        reading.settimeout(seconds)
        with contextlib.suppress(TimeoutError):
            while number := reading.recv(1):
                if number[0] in signals:
                    return number[0]
            raise EOFError
        return 0

    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # `train.py 2>&1 | tee log`: Ctrl-C ends tee first
            print(text, file=sys.stderr, flush=True)

    insisting = [s for s in LISTENED if s != HANGUP]
    with reading, contextlib.suppress(EOFError):
        number = heard(None, LISTENED)
        if not heard(PATIENCE, insisting):
            say(
                f"{signal.Signals(number).name}: saves and ends when the step under way is done; once more ends at once"
            )
            heard(None, insisting)
        heard(PATIENCE, insisting)
        try:
            if sys.stderr.isatty():
                terminal.unfiltered(sys.stderr).write("\x1b[?25h")  # the cursor, which the progress bar hides
            say(last_words())
        finally:
            os._exit(128 + number)
