"""A bias function in two parts: numbers of each head, and elementwise work on these and on positions.

A kernel on a GPU cannot look into arrays. Most functions need not: their parameters enter by a few numbers
for each head, such as ALiBi's slope. These are computed beforehand, and the kernel reads them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

__all__ = ["HeadNumbers", "looks_into_arrays"]

Shape = tuple[int, ...]


def looks_into_arrays(jaxpr) -> bool:
    """Whether a traced function reads an array at computed places, for which a kernel has no word."""
    return any(map(_looks, jaxpr.eqns))


def _looks(eqn) -> bool:
    inner = (getattr(param, "jaxpr", None) for param in eqn.params.values())
    found = eqn.primitive.name in ("gather", "dynamic_slice", "sort")
    return found or any(looks_into_arrays(sub) for sub in inner if sub is not None)


class _Step(NamedTuple):
    """An operation; values are known by number, and so are constants."""

    eqn: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def run(self, values: dict[int, Any]) -> None:
        """Adds its outputs to `values`."""
        params = self.eqn.primitive.get_bind_params(self.eqn.params)
        result = self.eqn.primitive.bind(*(values[i] for i in self.inputs), **params)
        results = result if self.eqn.primitive.multiple_results else [result]
        values.update(zip(self.outputs, results, strict=True))


class _Program:
    """The steps of a traced function, with those of the functions that it calls."""

    def __init__(self, closed: ClosedJaxpr):
        self.ids = itertools.count()
        self.avals: dict[int, Any] = {}
        self.constants: dict[int, Any] = {}
        self.inputs = [self._value(var.aval) for var in closed.jaxpr.invars]
        self.steps: list[_Step] = []
        (self.output,) = self._take_in(closed, self.inputs)

    def _value(self, aval) -> int:
        new = next(self.ids)
        self.avals[new] = aval
        return new

    def _constant(self, value) -> int:
        new = self._value(jax.typeof(value))
        self.constants[new] = value
        return new

    def made_of(self, *sources: int) -> set[int]:
        """The values that depend on any of the sources, these included."""
        found = set(sources)
        for step in self.steps:
            if found.intersection(step.inputs):
                found.update(step.outputs)
        return found

    def _take_in(self, closed: ClosedJaxpr, inputs: list[int]) -> list[int]:
        jaxpr = closed.jaxpr
        names = dict(zip(jaxpr.invars, inputs, strict=True))
        names |= zip(jaxpr.constvars, map(self._constant, closed.consts), strict=True)

        def read(x: Any) -> int:
            if isinstance(x, Literal):
                return self._constant(np.asarray(x.val, getattr(x.aval, "dtype", None)))
            return names[x]

        for eqn in jaxpr.eqns:
            arguments = [read(x) for x in eqn.invars]
            if eqn.primitive.name in ("jit", "pjit"):
                results = self._take_in(eqn.params["jaxpr"], arguments)
            else:
                results = [self._value(var.aval) for var in eqn.outvars]
                self.steps.append(_Step(eqn, tuple(arguments), tuple(results)))
            names |= zip(eqn.outvars, results, strict=True)
        return [read(x) for x in jaxpr.outvars]


@dataclasses.dataclass(frozen=True)
class HeadNumbers:
    """A bias function, split.

    Attributes:
        program: all of it.
        numbers: which of its values are the numbers of a head.
        differentiable: places among these of what depends on the parameters, and is real.
        inside: which of its steps remain for the kernel.
    """

    program: _Program
    numbers: tuple[int, ...]
    differentiable: tuple[int, ...]
    inside: tuple[_Step, ...]

    @classmethod
    def of(
        cls, fn: Callable[..., jax.Array], parameters: Any, q_shape: Shape, kv_shape: Shape
    ) -> "HeadNumbers | None":
        """The split of `fn(parameters, head, q_position, kv_position)`; None if it looks into arrays."""
        shape = jnp.broadcast_shapes(q_shape, kv_shape)
        like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        integers = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 1), q_shape, kv_shape)]
        whole = lambda *arguments: jnp.broadcast_to(fn(*arguments), shape).astype(jnp.float32)
        program = _Program(jax.make_jaxpr(whole)(jax.tree.map(like, parameters), *integers))
        *given, head, q, kv = program.inputs
        by_position, by_parameter = program.made_of(q, kv), program.made_of(*given)
        by_head = by_parameter | program.made_of(head)
        needed, numbers, inside = {program.output}, [], []
        for step in reversed(program.steps):
            found = [x for x in step.outputs if x in needed]
            if found and all(x in by_head - by_position and program.avals[x].size == 1 for x in step.outputs):
                numbers += found
            elif found:
                if _looks(step.eqn):
                    return None
                inside.append(step)
                needed.update(step.inputs)
        arrays = [x for x, value in program.constants.items() if jnp.ndim(value)]
        for value in needed.intersection((*given, *arrays)):
            if program.avals[value].size != 1:
                return None
            numbers.append(value)
        real = [x in by_parameter and jnp.issubdtype(program.avals[x].dtype, np.floating) for x in numbers]
        places = tuple(place for place, is_real in enumerate(real) if is_real)
        return cls(program, tuple(numbers), places, tuple(reversed(inside)))

    def of_heads(self, parameters: Any, heads: jax.Array) -> tuple[jax.Array, ...]:
        """The numbers of each head, `N` each."""

        def of_head(head):
            values = dict(self.program.constants)
            given = (*jax.tree.leaves(parameters), head.reshape(1, 1))
            values.update(zip(self.program.inputs, given, strict=False))
            for step in self._before():
                step.run(values)
            return tuple(values[x].reshape(()) for x in self.numbers)

        return jax.vmap(of_head)(heads)

    def _before(self) -> Iterator[_Step]:
        """The steps that make the numbers."""
        needed, steps = set(self.numbers), []
        for step in reversed(self.program.steps):
            if needed.intersection(step.outputs):
                steps.append(step)
                needed.update(step.inputs)
        return reversed(steps)

    def bias(self, numbers, head: jax.Array, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """The bias of a block, from the numbers of its head (scalars) and positions."""
        values = {at: x for at, x in self.program.constants.items() if not jnp.ndim(x)}
        values.update(zip(self.program.inputs[-3:], (head, q_position, kv_position), strict=True))
        for at, number in zip(self.numbers, numbers, strict=True):
            values[at] = jnp.broadcast_to(number, self.program.avals[at].shape)
        for step in self.inside:
            step.run(values)
        return values[self.program.output]

    def slopes(self, numbers, *where: jax.Array) -> list[jax.Array]:
        """The derivative of the bias of a block by each of the differentiable numbers; as for `bias`."""

        def slope(place: int) -> jax.Array:
            def bias(number):
                return self.bias((*numbers[:place], number, *numbers[place + 1 :]), *where)

            return jax.jvp(bias, (numbers[place],), (jnp.ones_like(numbers[place]),))[1]

        return [slope(place) for place in self.differentiable]
