"""Many processes of one run: how they start together, what they share, and how they end.

One process is the usual case. Then nothing is started, and every function here does the obvious thing at once.
"""

# K steps in a call, B batch, W int32 numbers of a row

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nanogpt_jax.config import Command, MeshConfig, UserError
from nanogpt_jax.config.settings import items
from nanogpt_jax.distributed.meeting import AGAIN, GRACE, LOST_AFTER, Hub, Member
from nanogpt_jax.host.signals import StopRequest

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh, Sharding

Value = TypeVar("Value")
PREPARING = 24 * 3600.0  # seconds that others wait while process 0 prepares the data,
READING = 3600.0  # and while it compares a checkpoint with its checksums
OWN = frozenset({"mesh.process_id", "data.dir", "data.threads"})  # settings that may differ between processes


@dataclass
class _Group:
    """This process's place in the run. `member`: its connection to the others; None if it is alone."""

    number: int = 0
    count: int = 1
    member: Member | None = None


_group = _Group()  # one for a process, as jax.distributed is


def count() -> int:
    return _group.count


def is_first() -> bool:
    """Whether this is process 0, which alone writes logs and settings, and speaks."""
    return _group.number == 0


def meet(name: str, value: Any = None, seconds: float = 0) -> list[Any]:
    """Wait until every process is here -> what each brought, JSON, in their order. Within mesh.timeout or `seconds`."""
    return _group.member.meet(name, value, seconds) if _group.member else [value]


def first_alone(name: str, work: Callable[[], Value], seconds: float = 0) -> Value | None:
    """What `work` gives in process 0. The others wait until it is done, and get None."""
    value = work() if is_first() else None
    meet(name, seconds=seconds)
    return value


def in_turn(name: str, work: Callable[..., Value], *args: Any) -> Value:
    """What `work(*args)` gives here. Process 0 does it before the others, which find what it has prepared."""
    value = first_alone(name, lambda: work(*args), PREPARING)
    return work(*args) if value is None else value


def from_first(name: str, work: Callable[[], Value]) -> Value:
    """What `work` gives in process 0, JSON, in every process."""
    return meet(name, work() if is_first() else None)[0]


def check_same(name: str, mine: dict[str, Any]) -> None:
    """UserError in a process in which a value differs from process 0's."""
    first = meet(name, mine)[0]
    for key, value in mine.items():
        if value != first.get(key):
            raise UserError(
                f"{key} is {value} here, and {first.get(key)} in process 0\n"
                "       start all processes with the same command, code and data"
            )


def exit_code(stopped_by: signal.Signals) -> int:
    """Of a run that a signal has stopped."""
    return 128 + stopped_by if count() == 1 else AGAIN


@contextlib.contextmanager
def joined(command: Command) -> Iterator[None]:
    """Join the other processes of the run, if mesh.* asks for that, and jax.distributed with them.

    In here, only process 0 prints. An error of one process ends all: it is told once. If a process is lost, the others
    end with AGAIN. UserError if they do not meet.
    """
    global _group
    place = _place(command.cfg.mesh)
    if place is None:
        yield
        return
    host, port = place.host, place.port
    hub = Hub(host, port, place.count, command.cfg.mesh.timeout) if place.number == 0 else None
    member = Member(host, port, place.number, place.count, command.cfg.mesh.timeout)
    _group = _Group(place.number, place.count, member)
    try:
        with _told_once(member):
            member.meet("the start")
            flags = {"--run-dir": str(command.run_dir), "--resume": command.resume, "--overwrite": command.overwrite}
            check_same("the settings", {key: v for key, v in items(command.cfg) if key not in OWN} | flags)
            _start_jax(place, command.cfg.mesh)
            with _quiet() if place.number else contextlib.nullcontext():
                yield
            member.leave()
            _stop_jax()
    finally:
        _group = _Group()
    if hub:
        hub.close()


# ---- arrays ---------------------------------------------------------------------------------------------------------


def place_rows(layout: "Sharding", shape: tuple[int, int, int], rows_of: Callable[[Any], np.ndarray]) -> "jax.Array":
    """A global array [K, B, W] of which each process makes only the rows that its devices hold.

    `rows_of` (a slice or row numbers [n]) -> [K, n, W] int32.
    """
    import jax

    if count() == 1:
        return jax.device_put(rows_of(slice(None)), layout)
    held = {index[1].indices(shape[1])[:2] for index in layout.addressable_devices_indices_map(shape).values()}  # pyright: ignore
    mine = np.concatenate([np.arange(*part) for part in sorted(held)])
    return jax.make_array_from_process_local_data(layout, rows_of(mine), shape)


def put(value: np.ndarray, layout: "Sharding") -> "jax.Array":
    """A global array of a value that every process holds whole."""
    import jax

    if count() == 1:
        return jax.device_put(value, layout)
    return jax.make_array_from_callback(value.shape, layout, lambda index: value[index])


def together(name: str, jitted: Any) -> Callable[..., Any]:
    """`jitted`, compiled at its first call, for these shapes, and not started before all have compiled it.

    gloo, which carries a CPU's sums between processes, waits for 30 s, and a slow machine may compile for longer.
    """
    if count() == 1:
        return jitted
    compiled: dict[Any, Any] = {}

    def call(*args: Any) -> Any:
        import jax

        key = tuple(x.shape for x in jax.tree.leaves(args) if hasattr(x, "shape"))
        if key not in compiled:
            compiled[key] = jitted.lower(*args).compile()
            meet(f"{name}, compiled")
        return compiled[key](*args)

    return call


class AgreedStop:
    """A stop request that all processes see before the same call, whichever of them received the signal.

    Each call asks all processes, in a small program between two steps, and learns what the call before has asked. So
    the device does not wait, and a run ends at the end of the call that began next after the signal.
    """

    def __init__(self, own: StopRequest, mesh: "Mesh"):
        self.received: signal.Signals | None = None
        self._own, self._asked, self._mesh = own, None, mesh
        self._most: Any = None

    def poll(self) -> signal.Signals | None:
        if count() == 1:
            self.received = self._own.received
            return self.received
        if self._asked is not None and (heard := int(self._asked)):
            self.received = signal.Signals(heard)
            return self.received
        self._asked = self._ask(int(self._own.received or 0))
        return None

    def _ask(self, signal_: int) -> "jax.Array":
        import jax
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec as P

        split = NamedSharding(self._mesh, P(self._mesh.axis_names))
        if self._most is None:
            most = jax.jit(lambda x: x.max(), in_shardings=split, out_shardings=NamedSharding(self._mesh, P()))
            self._most = together("the question whether to stop", most)
        mine = jax.make_array_from_callback((self._mesh.size,), split, lambda _: np.array([signal_], np.int32))
        return self._most(mine)


# ---- starting and ending ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    host: str
    port: int
    number: int
    count: int
    devices: Any = None  # the local devices to use, where a scheduler says so; None: all


def _place(cfg: MeshConfig) -> _Place | None:
    """This process's place among many; None if it is alone."""
    if cfg.coordinator != "none":
        host, _, port = cfg.coordinator.rpartition(":")
        return _Place(host.strip("[]"), int(port), cfg.process_id, cfg.num_processes) if cfg.num_processes > 1 else None
    if cfg.processes != "auto":
        return None
    from jax._src import clusters  # where jax.distributed.initialize looks, too

    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(cfg.timeout))
    except (RuntimeError, OSError, ValueError, KeyError) as e:
        raise UserError(f"mesh.processes=auto: {e}\n       give {BY_HAND} instead") from None
    address, n, i, devices = found
    if address is None or n is None or i is None:
        raise UserError(
            "mesh.processes=auto, but there is no Slurm, Open MPI, GKE or TPU VM that started this process\n"
            f"       leave it out for one process, or give {BY_HAND}"
        )
    host, _, port = address.rpartition(":")
    return _Place(host.strip("[]"), int(port), i, n, devices) if n > 1 else None


BY_HAND = "--mesh.coordinator HOST:PORT --mesh.num-processes N --mesh.process-id I"


def _start_jax(place: _Place, cfg: MeshConfig) -> None:
    """jax.distributed, at a port of its own that process 0 chooses."""
    import jax

    # JAX's own service for signals would replace our handlers, and knows SIGTERM alone
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _end_on_abort()
    port = from_first("the port of jax.distributed", _free_port)
    jax.distributed.initialize(
        f"[{place.host}]:{port}" if ":" in place.host else f"{place.host}:{port}",
        place.count,
        place.number,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(cfg.timeout),
        heartbeat_timeout_seconds=int(10 * LOST_AFTER),  # ours come first
        shutdown_timeout_seconds=int(cfg.timeout),
    )


def _stop_jax() -> None:
    import jax

    jax.distributed.shutdown()


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def _told_once(member: Member) -> Iterator[None]:
    """An error ends all processes. The first that has it tells it, with its number."""
    try:
        yield
    except BaseException as e:
        is_ours = isinstance(e, UserError | KeyboardInterrupt | SystemExit)
        if not is_ours or isinstance(e.__context__, RuntimeError | ValueError):
            time.sleep(GRACE)  # what failed may be a sum with a lost process: then the member hears of that
        code = AGAIN if isinstance(e, KeyboardInterrupt) else e.code if isinstance(e, UserError) else 1
        if member.over or not member.end(code):
            os._exit(member.over or code)  # told already; JAX would now wait for the others
        if isinstance(e, UserError):
            raise type(e)(f"process {member.number}: {e}") from None
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that is printed is seen. Errors are told outside of this."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


_handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)


@_handler_type
def _aborted(_: int) -> None:
    """If JAX aborts since process 0 is gone, the member notices that too, and ends this process in its own words."""
    for _ in range(round(20 * GRACE)):  # 0.1 s each; a busy machine needs seconds
        time.sleep(0.1)
        if _group.member and _group.member.over:
            time.sleep(2 * GRACE)


def _end_on_abort() -> None:
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, _handler_type]
    libc.signal(signal.SIGABRT, _aborted)
