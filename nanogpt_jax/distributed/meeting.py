"""How the processes of a run meet, exchange small values, and notice that one of them is lost. No jax.

Process 0 listens at mesh.coordinator, and every process, process 0 too, holds a connection to it for the whole run. It
carries a JSON object a line, and an empty line a second as a heartbeat. So a killed process is noticed at once (its
connection closes), and one that is stuck after LOST_AFTER. JAX has heartbeats of its own, but ends a process by
abort(), with a stack trace and no word of which one was lost; it also waits without end for one that is stuck.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nanogpt_jax.config import TryAgain, UserError
from nanogpt_jax.host import runtime, terminal

AGAIN = TryAgain.code
LOST_AFTER = 40.0  # seconds without a heartbeat
BEAT = 1.0  # seconds between two
PATIENCE = 5.0  # seconds, before somebody who waits at the start says so
GRACE = 5.0  # seconds in which a process may tidy up after it has heard that the run is over
END = "the end"  # the last meeting: after it, nobody is lost
LONGEST_LINE = 1 << 20  # bytes; a stranger may connect

Message = dict[str, Any]


class Line:
    """A connection that carries messages and heartbeats."""

    def __init__(self, connection: socket.socket, silence: float):
        """Without a heartbeat for `silence` seconds, the other side is lost."""
        self._connection, self._sending, self._closed = connection, threading.Lock(), threading.Event()
        self._silence = min(LOST_AFTER, silence)
        connection.settimeout(self._silence)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self, hear: Callable[[Message], None], lost: Callable[[str], None]) -> None:
        """From now on, `hear(message)` and `lost(reason)` are called, in a thread of their own."""
        self._hear, self._lost = hear, lost
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name=runtime.SPARE, daemon=True).start()

    def send(self, message: Message | None = None) -> None:
        """Send a message, or a heartbeat. A broken connection is noticed by the thread that reads."""
        with self._sending, suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n" if message else b"\n")

    def close(self) -> None:
        self._closed.set()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            self.send()

    def _listen(self) -> None:
        rest, reason = b"", "its connection has closed"
        try:
            while not self._closed.is_set() and (block := self._connection.recv(1 << 16)) and len(rest) < LONGEST_LINE:
                *lines, rest = (rest + block).split(b"\n")
                for line in filter(None, lines):
                    self._hear(json.loads(line))
        except TimeoutError:
            reason = f"nothing was heard from it for {self._silence:g} s"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # reset, or no message of ours
            pass
        if not self._closed.is_set():
            self.close()
            self._lost(reason)


class Hub:
    """Process 0's side: it hears everybody, and answers once all have come to the same meeting."""

    def __init__(self, host: str, port: int, count: int, timeout: float):
        """UserError if nobody can listen there."""
        self._count, self._timeout, self._lock = count, timeout, threading.RLock()
        self._lines: dict[int, Line] = {}
        self._values: dict[str, dict[int, Any]] = {}  # meeting -> process -> value
        self._alarms: dict[str, threading.Timer] = {}
        self._ended = False  # the run has, well or not
        try:
            if host in ("localhost", "127.0.0.1", "::1"):  # nobody else's business
                family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
                self._server = socket.create_server(where[:2], family=family)
            else:
                both = socket.has_dualstack_ipv6()
                family = socket.AF_INET6 if both else socket.AF_INET
                self._server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
        except OSError as e:
            raise UserError(
                f"mesh.coordinator={host}:{port}: process 0 cannot listen there: {e.strerror or e}\n"
                "       is process 0 running already? else choose another port, the same for all processes"
            ) from None
        threading.Thread(target=self._accept, name=runtime.SPARE, daemon=True).start()
        self._wait = threading.Timer(PATIENCE, self._tell_who_is_missing, [f"{host}:{port}"])
        self._wait.name, self._wait.daemon = runtime.SPARE, True
        self._wait.start()

    def close(self) -> None:
        self._wait.cancel()
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._server.close()
        for line in self._lines.values():
            line.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._server.accept()
                line = Line(connection, self._timeout)
                newcomer = _Newcomer(self, line)
                line.start(newcomer.hear, newcomer.lost)

    def _tell_who_is_missing(self, address: str) -> None:
        with self._lock:
            missing = [str(i) for i in range(self._count) if i not in self._lines]
        if missing:
            words = f"waiting at {address} for process {', '.join(missing)} of {self._count}"
            print(words, file=sys.stderr, flush=True)

    def hear(self, number: int, message: Message) -> None:
        with self._lock:
            if "meet" in message:
                self._meet(number, message["meet"], message["value"], message["seconds"])
            elif "ended" in message:
                first, self._ended = not self._ended, True
                if first:
                    self._tell({"ended": number, "code": message["ended"]}, but=number)
                self._lines[number].send({"first": first})

    def lost(self, number: int, reason: str) -> None:
        with self._lock:
            if not self._ended:
                self._tell({"lost": number, "reason": reason})

    def enter(self, number: int, count: int, line: Line) -> str:
        """What is wrong with a newcomer; "" if nothing is."""
        with self._lock:
            if count != self._count:
                return f"mesh.num_processes={count} here, and {self._count} in process 0"
            if not 0 <= number < count:
                return f"there is no process {number} of {count}"
            if number in self._lines:
                return f"two processes have mesh.process_id={number}; give each its own"
            self._lines[number] = line
            return ""

    def refuse(self, wrong: str) -> None:
        """A process that may not enter. Once all others are here it disturbs nobody; before, one of them is missing."""
        with self._lock:
            if len(self._lines) < self._count:
                self._tell({"refused": wrong})

    def _meet(self, number: int, name: str, value: Any, seconds: float) -> None:
        values = self._values.setdefault(name, {})
        if not values:
            alarm = self._alarms[name] = threading.Timer(seconds, self._late, [name, values, seconds])
            alarm.name, alarm.daemon = runtime.SPARE, True
            alarm.start()
        values[number] = value
        if len(values) == self._count:
            del self._values[name]
            self._alarms.pop(name).cancel()
            self._ended = self._ended or name == END
            self._tell({"met": name, "values": [values[i] for i in range(self._count)]})

    def _late(self, name: str, values: dict[int, Any], seconds: float) -> None:
        with self._lock:
            if self._values.get(name) is values:
                missing = [i for i in range(self._count) if i not in values]
                self._tell({"late": missing, "name": name, "seconds": seconds})

    def _tell(self, message: Message, but: int = -1) -> None:
        for number in sorted(self._lines, reverse=True):  # process 0 last: it may end at that, and the hub with it
            if number != but:
                self._lines[number].send(message)


class _Newcomer:
    """A connection to the hub, whose first message says which process it is."""

    def __init__(self, hub: Hub, line: Line):
        self._hub, self._line, self._number = hub, line, -1

    def hear(self, message: Message) -> None:
        if self._number >= 0:
            self._hub.hear(self._number, message)
        elif wrong := self._hub.enter(int(message["process"]), int(message["of"]), self._line):
            self._line.send({"refused": wrong})
            self._hub.refuse(wrong)
        else:
            self._number = int(message["process"])

    def lost(self, reason: str) -> None:
        if self._number >= 0:
            self._hub.lost(self._number, reason)


class Member:
    """A process's side. Its thread ends the process as soon as another one is lost, with AGAIN, or has an error.

    `over` is then the exit code. The main thread raises SystemExit when it next waits for the others, and has GRACE to
    tidy up. If it is inside of XLA, waiting for a sum that never comes, the process ends after that.
    """

    def __init__(self, host: str, port: int, number: int, count: int, timeout: float):
        """Connects, for at most `timeout` seconds. TryAgain if process 0 does not answer."""
        self.number, self.count, self._timeout = number, count, timeout
        self._come = threading.Condition()
        self._met: dict[str, list[Any]] = {}
        self.over: int | None = None
        self._ending, self._first, self._refused = False, None, ""
        self._err = sys.stderr
        self._line = Line(_connect(host, port, timeout), timeout)
        self._line.start(self._hear, self._lost)
        self._line.send({"process": number, "of": count})

    def meet(self, name: str, value: Any = None, seconds: float = 0) -> list[Any]:
        """Wait until every process has come to the meeting `name` -> the values that they brought, JSON, in order.

        Within `seconds` (0: mesh.timeout): else all processes end with AGAIN.
        """
        seconds = seconds or self._timeout
        self._line.send({"meet": name, "value": value, "seconds": seconds})
        with self._come:
            self._come.wait_for(lambda: name in self._met or self._refused or self.over, seconds + LOST_AFTER)
            if self._refused:
                raise UserError(self._refused)
            if name not in self._met and not self.over:  # the hub itself is stuck, and its heartbeat is not
                self._end(f"process 0 did not answer at {name!r} for {seconds + LOST_AFTER:.0f} s")
            if self.over:
                sys.exit(self.over)
            return self._met.pop(name)

    def end(self, code: int) -> bool:
        """Tell the others that this process ends with an error -> whether it is the first that does."""
        with self._come:
            self._ending = True
            if self._refused:
                return True
            self._line.send({"ended": code})
            self._come.wait_for(lambda: self._first is not None, 5)
            return self._first is not False

    def leave(self) -> None:
        """Wait until all are at the end of the run, and disconnect."""
        self.meet(END)
        self._line.close()

    def _hear(self, message: Message) -> None:
        with self._come:
            if "met" in message:
                self._met[message["met"]] = message["values"]
                self._ending = self._ending or message["met"] == END
            elif "first" in message:
                self._first = message["first"]
            elif "refused" in message:
                self._refused, self._ending = message["refused"], True
            elif "lost" in message:
                self._end(f"process {message['lost']} of {self.count} is lost: {message['reason']}")
            elif "late" in message:
                missing = ", ".join(map(str, message["late"]))
                self._end(
                    f"process {missing} of {self.count} did not reach {message['name']!r} within "
                    f"{message['seconds']:g} s (mesh.timeout)"
                )
            elif "ended" in message:
                self._exit(
                    f"process {message['ended']} of {self.count} has ended; its own output says why",
                    message["code"],
                )
            self._come.notify_all()

    def _lost(self, reason: str) -> None:
        self._end(f"process 0 of {self.count} is lost: {reason}")

    def _end(self, why: str) -> None:
        self._exit(
            f"error: {why}\n       process {self.number} ends with code {AGAIN}; start all again, and the run goes on",
            AGAIN,
        )

    def _exit(self, words: str, code: int) -> None:
        with self._come:
            if self._ending:
                return
            self._ending, self.over = True, code
            self._come.notify_all()
        with suppress(OSError, ValueError):
            if self._err.isatty():
                terminal.unfiltered(self._err).write("\x1b[?25h")  # the cursor, which the progress bar hides
            print(words, file=self._err, flush=True)
        at_last = threading.Timer(GRACE, os._exit, [code])
        at_last.name, at_last.daemon = runtime.SPARE, True
        at_last.start()


def _connect(host: str, port: int, timeout: float) -> socket.socket:
    """A connection to process 0, which may start later than this one."""
    end, reason, told = time.monotonic() + timeout, "", time.monotonic() + PATIENCE
    while (left := end - time.monotonic()) > 0:
        try:
            return socket.create_connection((host, port), timeout=min(left, 10))
        except OSError as e:
            reason = e.strerror or str(e)
        if time.monotonic() > told:
            told = end
            print(f"waiting for process 0 at {host}:{port} ({reason})", file=sys.stderr, flush=True)
        time.sleep(min(0.2, max(left, 0)))
    raise TryAgain(
        f"mesh.coordinator={host}:{port}: process 0 did not answer within mesh.timeout={timeout:g} s ({reason})\n"
        "       start process 0 on that host, and let the others reach its port"
    )
