"""Checkpoints of a run: written in the background, whole or not at all, and checked when read.

A checkpoint has the state's arrays by name, so that it can be read onto any mesh, and a JSON of what else the
run must know to go on. A sum over the bits of every array, made on the devices, and a digest of the JSON tell
whether a file was damaged.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import inspect
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import lax

from .processes import highest

__all__ = ["Checkpoints", "DamagedError", "OtherModelError", "Restored", "bit_sums"]

DAMAGED = "damaged"
# Of what the reader says of a damaged file, which goes on for pages.
REASON_LENGTH = 120
# Odd, so that multiplication loses no bit; the golden ratio, so that neighbours' weights differ much.
WEYL = 0x9E3779B9


class DamagedError(Exception):
    """A checkpoint that is not what was written."""


class OtherModelError(Exception):
    """A checkpoint whose arrays are not those that were asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint held.

    Attributes:
        step: its number.
        state: as it was saved, in the shardings of the state that was asked for.
        extra: the JSON that was saved with it.
    """

    step: int
    state: Any
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: is made if need be.
        keep: how many of the latest are kept.
        keep_every: besides those, the multiples of this step are kept; None keeps no others.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     checkpoints.save(3, {"weights": jnp.arange(4.0)}, {"epoch": 1})
        ...     checkpoints.wait()
        ...     found = checkpoints.restore({"weights": jnp.zeros(4)})
        >>> found.step, found.state["weights"].tolist(), found.extra
        (3, [0.0, 1.0, 2.0, 3.0], {'epoch': 1})
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2, keep_every: int | None = None):
        # Orbax tells at length of every save.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, item_names=("state", "extra"), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Those that are whole, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Copies the state and returns; it is written while the run goes on.

        Waits for the save before it. `state` may be donated as soon as this returns.
        """
        arrays = _by_name(state)
        sums = {name: int(value) for name, value in bit_sums(arrays).items()}
        meta = {"extra": extra, "bit_sums": sums, "shapes": _shapes(arrays)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays),  # pyright: ignore[reportCallIssue]
                extra=ocp.args.JsonSave(  # pyright: ignore[reportCallIssue]
                    meta | {"digest": _digest(meta)}
                ),
            ),
        )

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        self._manager.wait_until_finished()

    def restore(self, like: Any, tell: Callable[[str], None] = lambda message: None) -> Restored | None:
        """The newest checkpoint that is whole; None if there are none at all.

        A damaged one is set aside, under another name, and told of.

        Args:
            like: a state, or its shapes, dtypes and shardings: where the arrays go.
            tell: is given a message for every checkpoint passed over.

        Raises:
            DamagedError: there are checkpoints, and all are damaged, or were when they were last read.
            OtherModelError: a checkpoint has arrays of other names, shapes or dtypes than `like`.
        """
        for step in reversed(self.steps):
            aside = self._name_aside(step)
            found, reason = self._try(step, like)
            if found is not None:
                return found
            self._rename(step, aside)
            tell(f"checkpoint {step} is damaged and now called {aside.name}: {reason}")
        if damaged := len(list(self.folder.glob(f"{DAMAGED}-*"))):
            raise DamagedError(
                f"all {damaged} checkpoints in {self.folder} are damaged. Remove the run to start anew."
            )
        return None

    def _try(self, step: int, like: Any) -> tuple[Restored | None, str | None]:
        """What the checkpoint holds, or what is wrong with it; the processes agree on which."""
        abstract = {name: _abstract(leaf) for name, leaf in _by_name(like).items()}
        meta, arrays, reason = {}, {}, None
        try:
            with _quiet():
                meta, arrays = self._read(step, abstract)
        except OtherModelError:
            raise
        # A damaged file can make the reader raise anything.
        except Exception as error:
            reason = " ".join(str(error).split())[:REASON_LENGTH]
        if highest(reason is not None):
            return None, reason or "another process cannot read it"
        for name, value in bit_sums(arrays).items():
            if int(value) != meta["bit_sums"][name]:
                return None, f"the bits of {name} are not those that were saved"
        state = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in abstract])
        return Restored(step=step, state=state, extra=meta["extra"]), None

    def _read(
        self, step: int, like: dict[str, jax.ShapeDtypeStruct]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The JSON and the arrays. Waits for no other process, which may be unable to read its part."""
        folder = self.folder / str(step)
        meta = json.loads((folder / "extra" / "metadata").read_text())
        if meta.pop("digest", None) != _digest(meta):
            raise DamagedError("what was saved beside the arrays was altered")
        saved, wanted = meta["shapes"], _shapes(like)
        for name in sorted({*saved, *wanted}):
            if saved.get(name) != wanted.get(name):
                raise OtherModelError(
                    f"checkpoint {folder} is of another model: its {name} is {saved.get(name, 'missing')}, "
                    f"but that of this one {wanted.get(name, 'missing')}."
                )
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            return meta, handler.restore(
                folder / "state",  # pyright: ignore[reportArgumentType]
                args=ocp.args.StandardRestore(like),  # pyright: ignore[reportCallIssue]
            )

    def _name_aside(self, step: int) -> pathlib.Path:
        aside, number = self.folder / f"{DAMAGED}-{step}", 1
        while aside.exists():
            number += 1
            aside = self.folder / f"{DAMAGED}-{step}-{number}"
        return aside

    def _rename(self, step: int, aside: pathlib.Path) -> None:
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(aside)
        highest(0)  # all wait until it is done
        self._manager.reload()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what the reader's threads have to say of a read that failed and was given up."""
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook = sys.unraisablehook = lambda *_: None
    tasks = logging.getLogger("asyncio")
    tasks.addFilter(_is_not_of_a_read)
    try:
        yield
    except Exception:
        gc.collect()
        # Other parts of that read may yet end, at any later time.
        hooks = hooks[0], functools.partial(_tell_but_late_reads, hooks[1])
        raise
    else:
        tasks.removeFilter(_is_not_of_a_read)
    finally:
        sys.excepthook, sys.unraisablehook = hooks


def _tell_but_late_reads(tell: Callable[[Any], object], event: Any) -> None:
    """A hook for what cannot be raised, without what parts of a read say that end after it was given up."""
    closed = isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"
    if not closed and not (inspect.iscoroutine(event.object) and "orbax" in event.object.cr_code.co_filename):
        tell(event)


def _is_not_of_a_read(record: logging.LogRecord) -> bool:
    """Whether a message of asyncio is not of a task of the reader whose error nobody waits for any more."""
    text = record.getMessage()
    return not ("never retrieved" in text and "orbax" in text)


@jax.jit
def bit_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A sum modulo 2³² over each array's bits and their places, the same however the array is split."""
    return {name: _bit_sum(array) for name, array in arrays.items()}


def _bit_sum(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool:
        array = array.astype(jnp.uint8)
    width = array.dtype.itemsize * 8
    bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (place * jnp.uint32(2) + jnp.uint32(WEYL)), dtype=jnp.uint32)


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16).hexdigest()


def _by_name(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _shapes(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}
