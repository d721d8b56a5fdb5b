"""Packed rows to batches on the devices, in layout order; the order of the rows is Grain's.

A process reads the rows, and makes the columns, that its own devices hold.
"""

import typing
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from .. import layouts
from ..ring import Ring
from .batch import Batch
from .packing import PackedRows, empty_row

__all__ = ["Batches", "held_out_batches"]

# Grain's range; of whole batches.
MANY = 2**62


class Placement:
    """Where a batch goes: its sharding, and the rows and columns of it that this process makes.

    Args:
        mesh: the devices.
        ring: how the sequence is distributed.
        batch_size: rows of the whole batch, `B`.
        length: of a row, `T`.

    Raises:
        ValueError: the batch does not divide over its mesh axes, or the length over the ring.
    """

    def __init__(self, mesh: Mesh, ring: Ring, batch_size: int, length: int):
        ring_size = ring.size(mesh)
        if length % (multiple := ring.multiple(ring_size)):
            raise ValueError(
                f"data.sequence_length {length} does not fit the mesh: {ring.layout} layout over a ring of "
                f"{ring_size} takes a multiple of {multiple}, such as {-(-length // multiple) * multiple}."
            )
        ways = int(np.prod([mesh.shape[name] for name in ring.batch_axes]))
        if batch_size % ways:
            raise ValueError(
                f"data.batch_size {batch_size} does not divide over the {ways} devices of mesh axes "
                f"{', '.join(ring.batch_axes)}."
            )
        self.shape = (batch_size, length)
        self.sharding = NamedSharding(mesh, Batch.spec(ring))
        mine = self.sharding.addressable_devices_indices_map(self.shape).values()
        indices = [index for index in mine if index is not None]
        self.rows = _union(indices, 0, batch_size)
        self.columns = _union(indices, 1, length)
        self.order = layouts.order(ring.layout, length, ring_size)[self.columns]

    def host_batch(self, rows: Sequence[Batch]) -> Batch:
        """This process's part: `rows` are those that it holds, in natural order."""
        return Batch(*(np.stack(arrays)[:, self.order] for arrays in zip(*rows, strict=True)))

    def put(self, part: Batch) -> Batch:
        """The whole batch on the devices, of which `part` is what this process holds."""
        return Batch(**{name: self._put(array) for name, array in part._asdict().items()})

    def _put(self, array: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return array[_within(self.rows, index[0]), _within(self.columns, index[1])]

        return jax.make_array_from_callback(self.shape, self.sharding, shard)


class Batches(Iterator[Batch]):
    """Endless batches for training: every epoch has every row once, in an order of its own.

    A batch may hold the last rows of an epoch and the first of the next. Which rows it has depends on the
    seed and its number alone, not on the mesh, the layout or the processes.

    Args:
        rows: the data.
        batch_size: rows of a batch.
        seed: of the order.
        mesh: the devices.
        ring: how the sequence is distributed.
        prefetch: batches that are made in advance, in threads.

    Raises:
        ValueError: as in `Placement`.
    """

    def __init__(
        self,
        rows: PackedRows,
        *,
        batch_size: int,
        seed: int,
        mesh: Mesh,
        ring: Ring = Ring(),
        prefetch: int = 2,
    ):
        self._placement = Placement(mesh, ring, batch_size, rows.length)
        shuffled = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
        place = self._placement

        def host_batch(number: int) -> Batch:
            return place.host_batch([shuffled[number * batch_size + row] for row in place.rows])

        numbers = grain.MapDataset.range(MANY // batch_size).map(host_batch)
        options = grain.ReadOptions(num_threads=min(prefetch, 4), prefetch_buffer_size=prefetch)
        self._batches = iter(numbers.to_iter_dataset(options))

    def __next__(self) -> Batch:
        """The next batch, on the devices."""
        return self._placement.put(next(self._batches))

    def get_state(self) -> dict[str, Any]:
        """Where the data stand, for JSON; it belongs to the rows, the batch size and the seed."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from where `get_state` was called."""
        self._batches.set_state(state)


def held_out_batches(
    rows: PackedRows, *, batch_size: int, mesh: Mesh, ring: Ring = Ring(), limit: int | None = None
) -> Iterator[Batch]:
    """Every row once, in a mixed order that is always the same; the last batch is filled up with padding.

    Args:
        rows: the data.
        batch_size: rows of a batch.
        mesh: the devices.
        ring: how the sequence is distributed.
        limit: most batches; None means all.

    Raises:
        ValueError: as in `Placement`.
    """
    place = Placement(mesh, ring, batch_size, rows.length)
    # Rows that follow each other are of the same documents, and the first ones of the longest.
    mixed = grain.MapDataset.source(rows).seed(0).shuffle()
    for start in range(0, len(rows), batch_size)[:limit]:
        wanted = [start + int(row) for row in place.rows]
        found = [mixed[row] if row < len(rows) else empty_row(rows.length) for row in wanted]
        yield place.put(place.host_batch(typing.cast(list[Batch], found)))


def _union(indices: Sequence[tuple[slice, ...]], axis: int, size: int) -> np.ndarray:
    """The places of one axis that any of the slices covers, in order."""
    covered = np.zeros(size, bool)
    for index in indices:
        covered[index[axis]] = True
    return np.flatnonzero(covered)


def _within(places: np.ndarray, wanted: slice) -> slice:
    """The slice of `places` that holds the places of `wanted`, all of which are there."""
    start = 0 if wanted.start is None else wanted.start
    first = int(np.searchsorted(places, start))
    last = len(places) if wanted.stop is None else int(np.searchsorted(places, wanted.stop))
    return slice(first, last)
