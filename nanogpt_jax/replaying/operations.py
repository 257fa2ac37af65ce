"""Evaluates a traced function one operation at a time, and finds where numbers stopped being finite.

`jax.make_jaxpr` gives the operations in order, each with the modules and the line of ours that it comes from. They are
computed one by one, as they stand: what compiling fuses or reorders, it does to the same operations.

Not every infinity is a fault: GELU's e^-2u may overflow, and x / (1 + e^-2u) is 0 all the same; the logits of the
vocabulary's padding are -inf. So each number that is not finite carries the operation that it goes back to, and what is
reported is where those of the *result* came from.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

import nanogpt_jax
from nanogpt_jax.distributed.sharding import path_name

PACKAGE = Path(nanogpt_jax.__file__).parent
BLOCK = "Block"  # the module of a layer, by whose name the loop over layers is known


@dataclass(frozen=True)
class Place:
    """Where an operation stands in the step."""

    modules: tuple[str, ...] = ()  # jvp() and transpose(jvp()) are JAX's, the others Flax's: Block, attn, c_attn
    layer: int | None = None  # from 0
    micro_batch: int | None = None  # from 0
    file: str = ""  # relative to the package, or to the folder of packages: model/gpt2.py, optax/...
    line: int = 0
    function: str = ""
    is_shared: bool = False  # inside a function that JAX traced once for all its callers: the line is that of the call

    @property
    def is_backward(self) -> bool:
        return any(name.startswith("transpose(") for name in self.modules)


@dataclass(frozen=True)
class Summary:
    """What an array of floating-point numbers holds."""

    shape: tuple[int, ...]
    dtype: str
    nan: int  # how many
    inf: int
    largest: float  # the largest distance from 0 of the finite ones

    @property
    def is_finite(self) -> bool:
        return not (self.nan or self.inf)


@dataclass(frozen=True)
class Origin:
    """The operation, or the input, in which numbers stopped being finite."""

    number: int  # in the order of the operations; below 0 for an input
    place: Place
    primitive: str  # JAX's name of the operation; "" for an input
    result: Summary
    inputs: tuple[Summary, ...]
    name: str = ""  # of an input


Mark = Origin | None
MEANT = Origin(1 << 60, Place(), "constant", Summary((), "", 0, 0, 0.0), ())  # -inf that stands in the program
OnResult = Callable[[Place, str, Summary], None]


def summary(x: Any) -> Summary | None:
    """None if `x` is no array of floating-point numbers."""
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    on_cpu = isinstance(x, np.ndarray) or all(device.platform == "cpu" for device in x.devices())
    nan, inf, largest = _counted(np, np.asarray(x)) if on_cpu else jax.device_get(_counted_there(x))
    return Summary(tuple(x.shape), str(x.dtype), int(nan), int(inf), float(largest))


def _counted(numpy: Any, x: Any) -> tuple[Any, Any, Any]:
    """How many are nan, how many infinite, and the largest of the others. `numpy`, which compiles nothing, or jax's."""
    wide = x.astype(numpy.float32)
    nan, inf = numpy.isnan(wide), numpy.isinf(wide)
    return nan.sum(), inf.sum(), numpy.max(abs(wide), initial=0, where=~(nan | inf))


_counted_there = jax.jit(functools.partial(_counted, jnp))


class Evaluation:
    """`function(*args)`, one operation at a time. `on_result` sees each result that holds floating-point numbers.

    `outputs` is what the function returns; `origins` has, for each of its leaves, the operation in which its numbers
    stopped being finite, or None. For an input that was not finite from the start, `shown` has the first operation
    that made something of it which is not: the input's number -> its place and JAX's name of it.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], on_result: OnResult | None = None):
        self._on_result, self._number = on_result or (lambda *_: None), 0
        self.shown: dict[int, tuple[Place, str]] = {}
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = [(path_name(path[1:]), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(args)]
        marks = [_of_input(i - len(leaves), name, leaf) for i, (name, leaf) in enumerate(leaves)]
        leaves = [leaf for _, leaf in leaves]
        outputs, found = self._evaluate(program, leaves, marks, Place())
        self.outputs: Any = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
        self.origins: list[Mark] = [None if mark is MEANT else mark for mark in found]

    # every value has a mark: None if it is finite

    def _evaluate(
        self, program: ClosedJaxpr | Jaxpr, values: list[Any], marks: list[Mark], place: Place
    ) -> tuple[list[Any], list[Mark]]:
        consts = program.consts if isinstance(program, ClosedJaxpr) else []
        jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
        known: dict[Any, tuple[Any, Mark]] = {}
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            known[variable] = (value, _meant(value))
        known |= dict(zip(jaxpr.invars, zip(values, marks, strict=True), strict=True))

        def read(atom: Any) -> tuple[Any, Mark]:
            return (atom.val, _meant(atom.val)) if isinstance(atom, Literal) else known[atom]

        for equation, done in _needed(jaxpr):
            inputs = [read(atom) for atom in equation.invars]
            results = self._apply(equation, [v for v, _ in inputs], [m for _, m in inputs], place)
            del inputs
            known |= dict(zip(equation.outvars, zip(*results, strict=True), strict=True))
            for variable in done:
                known.pop(variable, None)
        found = [read(atom) for atom in jaxpr.outvars]
        return [value for value, _ in found], [mark for _, mark in found]

    def _apply(
        self, equation: JaxprEqn, values: list[Any], marks: list[Mark], place: Place
    ) -> tuple[list[Any], list[Mark]]:
        kind, params = equation.primitive.name, equation.params
        inside = _inside(equation, place)
        if kind == "scan" and (loop := _loop(params["jaxpr"], place)):
            return self._scan(equation, values, marks, inside, loop)
        if kind == "cond":
            which = int(np.clip(int(values[0]), 0, len(params["branches"]) - 1))
            return self._evaluate(params["branches"][which], values[1:], marks[1:], inside)
        if called := _called(equation):
            return self._evaluate(called, values, marks, inside)
        with equation.ctx.manager:
            results = equation.primitive.bind(*values, **equation.primitive.get_bind_params(params))
        results = list(results) if equation.primitive.multiple_results else [results]
        self._number += 1
        found = [summary(x) for x in results]
        new = [bool(one) and not one.is_finite and _inherited(one, marks) is None for one in found]  # pyright: ignore
        if kind == "scan" and any(new):  # another loop, of attention's heads for example: which operation of its body?
            return self._scan(equation, values, marks, inside, "")
        for one in found:
            if one:
                self._on_result(inside, kind, one)
        return results, [self._marked(one, marks, values, inside, kind) for one in found]

    def _marked(self, found: Summary | None, marks: list[Mark], values: list[Any], place: Place, kind: str) -> Mark:
        if found is None or found.is_finite:
            return None
        if inherited := _inherited(found, marks):
            self.shown.setdefault(inherited.number, (place, kind))
            return inherited
        inputs = tuple(one for value in values if (one := summary(value)))
        return Origin(self._number, place, kind, found, inputs)

    def _scan(
        self, equation: JaxprEqn, values: list[Any], marks: list[Mark], place: Place, loop: str
    ) -> tuple[list[Any], list[Mark]]:
        """A loop, turn by turn: over layers, micro-batches, or something else.

        Its arrays are constants, then what is carried, then what has a part for each turn: only those have an axis that
        its body does not see. (Releases of JAX tell their numbers in different ways.)
        """
        params, body = equation.params, equation.params["jaxpr"]
        inner, n = body.jaxpr if isinstance(body, ClosedJaxpr) else body, params["length"]
        first = _as_in(equation.invars, inner.invars)
        consts = first - _as_in(equation.outvars, inner.outvars)
        carry, carry_marks = values[consts:first], marks[consts:first]
        rows: list[Any] = [None] * n
        row_marks: list[Any] = [None] * n
        for i in reversed(range(n)) if params["reverse"] else range(n):
            slices = _row(values[first:], np.int32(i))
            slice_marks = [_still(mark, x) for mark, x in zip(marks[first:], slices, strict=True)]
            where = replace(place, **{loop: i}) if loop else place
            out, out_marks = self._evaluate(
                body, [*values[:consts], *carry, *slices], [*marks[:consts], *carry_marks, *slice_marks], where
            )
            carry, carry_marks = out[: len(carry)], out_marks[: len(carry)]
            rows[i], row_marks[i] = out[len(carry) :], out_marks[len(carry) :]
        stacked = _stacked(rows)
        stacked_marks = [_earliest(each) for each in zip(*row_marks, strict=True)]
        return [*carry, *stacked], [*carry_marks, *stacked_marks]


def _as_in(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many of a loop's arrays its body sees whole."""
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))


@jax.jit
def _row(arrays: list[jax.Array], i: jax.Array) -> list[jax.Array]:
    return [jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in arrays]


@jax.jit
def _stacked(rows: list[list[jax.Array]]) -> list[jax.Array]:
    return [jnp.stack(each) for each in zip(*rows, strict=True)]


def first(origins: Sequence[Mark]) -> Mark:
    """The earliest; None if all are None."""
    return _earliest(origins)


def _earliest(marks: Sequence[Mark]) -> Mark:
    return min((mark for mark in marks if mark), key=lambda mark: mark.number, default=None)


def _inherited(found: Summary, marks: list[Mark]) -> Mark:
    """Where numbers that are not finite came from; None if from this operation itself, as NaN of a meant -inf is."""
    earliest = _earliest(marks)
    return None if earliest is MEANT and found.nan else earliest


def _still(mark: Mark, part: Any) -> Mark:
    """The mark of a part of an array."""
    found = summary(part) if mark else None
    return None if found is None or found.is_finite else mark


def _of_input(number: int, name: str, x: Any) -> Mark:
    found = summary(x)
    return None if found is None or found.is_finite else Origin(number, Place(), "", found, (), name)


def _meant(constant: Any) -> Mark:
    found = summary(constant)
    return None if found is None or found.is_finite else MEANT


def _needed(jaxpr: Jaxpr) -> list[tuple[JaxprEqn, list[Any]]]:
    """The operations that the outputs need, in order, each with the variables that no later one reads."""
    read = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    found: list[tuple[JaxprEqn, list[Any]]] = []
    for equation in reversed(jaxpr.eqns):
        if not equation.effects and not any(variable in read for variable in equation.outvars):
            continue
        inputs = {atom for atom in equation.invars if not isinstance(atom, Literal)}
        found.append((equation, [x for x in (*inputs, *equation.outvars) if x not in read]))
        read |= inputs
    return found[::-1]


# ---- where an operation stands --------------------------------------------------------------------------------------


def _loop(body: ClosedJaxpr, place: Place) -> str:
    """What a loop goes over, as a field of Place: the layers, the micro-batches; "" if it is neither."""
    if place.layer is not None:
        return ""
    if _is_layer(body.jaxpr):
        return "layer"
    return "micro_batch" if any(_is_layer(inner.jaxpr) for inner in _loops_in(body.jaxpr)) else ""


def _is_layer(jaxpr: Jaxpr) -> bool:
    """Whether this is the body of the loop over layers: it has the module's operations, and no loop in it has."""
    return _has_block(jaxpr) and not any(_is_layer(inner.jaxpr) for inner in _loops_in(jaxpr))


def _has_block(jaxpr: Jaxpr) -> bool:
    for equation in jaxpr.eqns:
        recomputed = equation.primitive.name == "remat2" and _has_block(equation.params["jaxpr"])
        if recomputed or BLOCK in str(equation.source_info.name_stack).split("/"):
            return True
    return False


def _loops_in(jaxpr: Jaxpr) -> list[ClosedJaxpr]:
    found: list[ClosedJaxpr] = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.append(equation.params["jaxpr"])
        if inner := _called(equation):
            found += _loops_in(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
    return found


def _is_shared(equation: JaxprEqn) -> bool:
    """Whether this calls a function that is not ours, like jnp.where: all its operations name one line of ours, that of
    whoever called it first, as JAX traces a function once."""
    inner = equation.params["branches"] if equation.primitive.name == "cond" else [_called(equation)]
    lines = {
        tuple(_source(one.source_info.traceback).values())
        for program in inner
        if program is not None
        for one in (program.jaxpr if isinstance(program, ClosedJaxpr) else program).eqns
    }
    return len(lines) == 1


def _called(equation: JaxprEqn) -> ClosedJaxpr | Jaxpr | None:
    """The program that an operation calls, if it does nothing else: jit, remat, custom_vjp_call."""
    if equation.primitive.name in ("scan", "while", "shard_map"):
        return None
    found = [equation.params.get(name) for name in ("jaxpr", "call_jaxpr")]
    return next((one for one in found if isinstance(one, ClosedJaxpr | Jaxpr)), None)


def _inside(equation: JaxprEqn, place: Place) -> Place:
    """The place of an operation, and of those that it calls."""
    names = str(equation.source_info.name_stack)
    modules = (*place.modules, *(names.split("/") if names else ()))
    source = {} if place.is_shared else _source(equation.source_info.traceback)
    is_shared = place.is_shared or _is_shared(equation)
    return replace(place, modules=modules, is_shared=is_shared, **source)


@functools.lru_cache(4096)
def _short(path: str) -> str:
    """A file of ours or of optax; "" for another."""
    file = Path(path)
    if file.is_relative_to(PACKAGE):
        inner = file.relative_to(PACKAGE)
        return "" if inner.parts[0] in ("replaying", "commands", "cli.py", "__main__.py") else inner.as_posix()
    if "optax" in file.parts:
        return "/".join(file.parts[file.parts.index("optax") :])
    return ""


def _source(traceback: Any) -> dict[str, Any]:
    """The file, the line and the function of ours that called for an operation, as fields of Place; {} without one."""
    for frame in traceback.frames if traceback else ():
        if short := _short(frame.file_name):
            return {"file": short, "line": frame.line_num, "function": frame.function_name.partition(".<locals>")[0]}
    return {}
