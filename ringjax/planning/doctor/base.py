"""A line of the report, and what both kinds of checks need."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

__all__ = ["MESSAGE", "Finding", "Verdict", "permute", "send"]

Verdict = Literal["ok", "wrong", "note"]

MESSAGE = 2**20  # elements of four bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A line of the report.

    Attributes:
        what: was looked at.
        verdict: `"wrong"` is a wrong result; `"note"` what a person should read.
        text: what was found.
        facts: the numbers in it.
    """

    what: str
    verdict: Verdict
    text: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def permute(mesh: Mesh, hops: int) -> Callable[[jax.Array], jax.Array]:
    """Sends rows so many places round the ring."""
    pairs = [(rank, (rank + hops) % mesh.size) for rank in range(mesh.size)]
    return send(mesh, pairs)


def send(mesh: Mesh, pairs: list[tuple[int, int]]) -> Callable[[jax.Array], jax.Array]:
    """Sends rows from the first of each pair of ranks to the second; others get zeros."""
    axis = mesh.axis_names[0]
    return jax.jit(
        jax.shard_map(
            ft.partial(lax.ppermute, axis_name=axis, perm=pairs),
            mesh=mesh,
            in_specs=P(axis),
            out_specs=P(axis),
        )
    )
