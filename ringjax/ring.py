"""`Ring`: how a sequence is distributed over a mesh axis, and the arrays in and out of that order."""

import dataclasses
import functools as ft
import importlib.metadata
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

from . import layouts
from .kernels.base import BlockSizes, Device, KernelName
from .layouts import Layout
from .payloads import PayloadName
from .strategies.base import Strategy

__all__ = ["Ring", "shard_sequence", "unshard_sequence"]

AxisNames = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Ring:
    """How to distribute attention over a mesh axis; a frozen, hashable value.

    Attributes:
        axis_name: the mesh axis that the sequence is split over, or several, taken as one long ring.
        layout: which tokens a rank holds. `"contiguous"` is the natural order. `"zigzag"` gives every rank
            an early and a late run of it, and so equal work under a causal mask; `"striped"` deals the tokens
            out one by one, which makes the work of each hop equal but for a token. Both want their arrays in
            that order (`shard_sequence`). Windows save no hops in striped layout.
        strategy: what travels, and how; the result is the same.

            - `"auto"`: what `ringjax.plan` picks for the call, forward and backward, on the GPUs of the mesh;
              `"ring"` on devices that it does not know.
            - `"ring"`: keys and values, from rank to rank.
            - `"ring_q"`: queries, with their results; for few queries against many keys.
            - `"double_ring"`: keys and values, round the second of two axes, and once a round along the
              first: `axis_name=("host", "device")`.
            - `"all_gather"`: keys and values at once; every rank then holds them all.
            - `"ulysses"`: heads; every rank then holds the whole sequence of N / P of them.
            - `"usp"`: heads over the last of several axes, keys and values round the others:
              `axis_name=("ring", "ulysses")`.
        bidirectional: half of the shards come from the other side, so that both directions of every link work
            and a ring takes half as many steps; with `"ring"` and `"ring_q"`.
        payload: the form in which keys and values travel: None is as they are, `"bfloat16"` rounds them,
            `"int8"` and `"float8"` (E4M3) send a byte for each and a scale for every token and head. Their
            gradients are as if nothing had been rounded, and travel in float32.
        head_groups: `"all_gather"` gathers keys and values in so many pieces, one after the other, and so
            needs as many times less memory for them.
        kernel: how one shard meets one shard. `"blockwise"` is plain XLA, for any device and feature;
            `"pallas"` is a fused kernel for NVIDIA GPUs, which a CPU interprets, slowly; `"cudnn"` leaves to
            cuDNN, in half precision, what meetings of shards are full or causal, and the rest to
            `"pallas"`, but its gradients may differ in their last bits from run to run; `"tokamax"` is the
            package of that name. `"auto"` takes `"pallas"` on GPUs, `"cudnn"` on Hopper, where they support
            the call.
        block_sizes: tiles inside the kernel; None takes the table's entry for the device. `"pallas"` rounds
            them down to powers of two.
        batch_axes: mesh axes that the batch is split over.
        head_axes: mesh axes that the heads are split over (keys' and queries' alike).

    Example:
        >>> import ringjax
        >>> ringjax.Ring("sp", layout="zigzag").positions(8, ring_size=2).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
        >>> ringjax.Ring("sp", layout="striped").positions(8, ring_size=2).tolist()
        [0, 2, 4, 6, 1, 3, 5, 7]
    """

    axis_name: AxisNames = "ring"
    _: dataclasses.KW_ONLY
    layout: Layout = "contiguous"
    strategy: Strategy | Literal["auto"] = "auto"
    bidirectional: bool = False
    payload: PayloadName | None = None
    head_groups: int = 1
    kernel: KernelName | Literal["auto"] = "auto"
    block_sizes: BlockSizes | None = None
    batch_axes: tuple[str, ...] = ()
    head_axes: tuple[str, ...] = ()

    def __post_init__(self):
        _require_one_of("layout", self.layout, get_args(Layout))
        _require_one_of("strategy", self.strategy, ("auto", *get_args(Strategy)))
        _require_one_of("payload", self.payload, (None, *get_args(PayloadName)))
        _require_one_of("kernel", self.kernel, ("auto", *get_args(KernelName)))
        for name in ("batch_axes", "head_axes"):
            axes = getattr(self, name)
            object.__setattr__(self, name, (axes,) if isinstance(axes, str) else tuple(axes))
        if isinstance(self.axis_name, list):
            object.__setattr__(self, "axis_name", tuple(self.axis_name))
        if not self.axis_names:
            raise ValueError(
                f"Ring(axis_name={self.axis_name!r}) names no mesh axis. Name the one, or the several, that "
                f"the sequence is split over."
            )
        used = (*self.axis_names, *self.batch_axes, *self.head_axes)
        if len(set(used)) != len(used):
            raise ValueError(
                f"Ring uses a mesh axis twice: axis_name={self.axis_name!r}, "
                f"batch_axes={self.batch_axes!r}, head_axes={self.head_axes!r}. Name each axis once."
            )
        self._check_strategy()

    def _check_strategy(self) -> None:
        """Raises where a field means nothing with this strategy."""
        strategy, axes = self.strategy, len(self.axis_names)
        if strategy == "double_ring" and axes != 2:
            raise ValueError(
                f"Ring(strategy='double_ring', axis_name={self.axis_name!r}) needs two mesh axes, that "
                f"between hosts and that within one, such as axis_name=('host', 'device')."
            )
        if strategy == "usp" and axes < 2:
            raise ValueError(
                f"Ring(strategy='usp', axis_name={self.axis_name!r}) needs two mesh axes, the last for "
                f"heads, such as axis_name=('ring', 'ulysses'). Over one axis that is 'ulysses' or 'ring'."
            )
        if self.bidirectional and strategy not in ("auto", "ring", "ring_q"):
            raise ValueError(
                f"Ring(strategy={strategy!r}, bidirectional=True): only 'ring' and 'ring_q' have a direction."
            )
        if self.head_groups < 1:
            raise ValueError(f"Ring(head_groups={self.head_groups}): a number from 1 on.")
        if self.head_groups > 1 and strategy != "all_gather":
            raise ValueError(
                f"Ring(strategy={strategy!r}, head_groups={self.head_groups}): only 'all_gather' gathers its "
                f"keys and values in pieces."
            )

    @classmethod
    def auto(
        cls,
        axis_name: AxisNames = "ring",
        *,
        mesh: Mesh | AbstractMesh | None = None,
        hardware: str | None = None,
        training: bool = False,
        layout: Layout | None = None,
        payload: PayloadName | None = None,
        batch_axes: tuple[str, ...] = (),
        head_axes: tuple[str, ...] = (),
        **call: Any,
    ) -> "Ring":
        """The ring that `ringjax.plan` picks for a call on a mesh: strategy, layout, directions, head groups.

        Args:
            axis_name: the mesh axis or axes that the sequence is split over.
            mesh: the mesh; None means the ambient one.
            hardware: a name of `ringjax.planning.HARDWARE`, or `"measured"`; None is that of the mesh.
            training: whether the backward pass counts too.
            layout: None leaves it to the plan.
            payload: the form in which keys and values travel.
            batch_axes: as in `Ring`.
            head_axes: as in `Ring`.
            **call: the whole call, as in `ringjax.plan`: `tokens`, `heads`, `head_dim`, and what is not as by
                default there.

        Raises:
            ValueError: no way fits, batch or heads do not split, or the hardware is not known.
        """
        from .planning.auto import hardware_of, planned
        from .planning.workload import Workload

        mesh = resolve_mesh(mesh)
        ring = cls(axis_name, payload=payload, batch_axes=batch_axes, head_axes=head_axes)
        ring.size(mesh)
        hardware = hardware or hardware_of(mesh)
        if hardware is None:
            raise ValueError(
                "Ring.auto knows nothing of these devices: name what to plan for, such as "
                "hardware='h100-sxm', or measure them with `ringjax plan --measure` and say "
                "hardware='measured'."
            )
        whole = Workload(payload=payload, **call)
        return planned(ring, mesh, whole, layout=layout, hardware=hardware, training=training)

    @property
    def axis_names(self) -> tuple[str, ...]:
        """`axis_name` as a tuple."""
        return (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name

    @property
    def spec(self) -> P:
        """Partition spec of `B T N H` arrays."""
        return P(self.batch_axes or None, self.axis_name, self.head_axes or None, None)

    def size(self, mesh: Mesh | AbstractMesh) -> int:
        """Number of ranks on `mesh`.

        Raises:
            ValueError: the mesh lacks an axis that the ring names, or has them in another order.
        """
        for name in (*self.axis_names, *self.batch_axes, *self.head_axes):
            if name not in mesh.shape:
                raise ValueError(
                    f"the mesh has no axis {name!r}; its axes are {dict(mesh.shape)}. Make one with "
                    f"jax.make_mesh((jax.device_count(),), ({name!r},)), or name another in Ring(...)."
                )
        in_order = tuple(name for name in mesh.axis_names if name in self.axis_names)
        if in_order != self.axis_names:
            # ppermute of JAX 0.10 numbers the ranks in the mesh's order without a word.
            raise ValueError(
                f"Ring(axis_name={self.axis_name!r}) names axes in another order than the mesh, whose "
                f"axes are {mesh.axis_names}. Write axis_name={in_order!r}."
            )
        return math.prod(self.axis_sizes(mesh))

    def axis_sizes(self, mesh: Mesh | AbstractMesh) -> tuple[int, ...]:
        """How many devices each of the ring's axes has."""
        return tuple(mesh.shape[name] for name in self.axis_names)

    def multiple(self, ring_size: int) -> int:
        """What the length of a sequence in this layout must divide by."""
        return ring_size * layouts.chunks(self.layout)

    def padded_length(self, length: int, ring_size: int) -> int:
        """`length`, rounded up to the layout's multiple."""
        multiple = self.multiple(ring_size)
        return -(-length // multiple) * multiple

    def positions(
        self, length: int, ring_size: int | None = None, *, mesh: Mesh | AbstractMesh | None = None
    ) -> np.ndarray:
        """Global position of each place in layout order, int32; -1 in the padding.

        For what goes token by token, such as position embeddings and losses. `ring_attention` knows these
        positions itself: given none, it skips the hops that no rank needs, which positions that are data do
        not allow.

        Args:
            length: number of real tokens.
            ring_size: number of ranks; None means that of the mesh.
            mesh: the mesh; None means the ambient one.
        """
        if ring_size is None:
            ring_size = self.size(resolve_mesh(mesh))
        padded = self.padded_length(length, ring_size)
        return layouts.positions(self.layout, length, padded, ring_size)


def _require_one_of(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(
            f"Ring({name}={value!r}) is not known; choose one of {', '.join(map(repr, choices))}."
        )


def resolve_mesh(mesh: Mesh | AbstractMesh | None) -> Mesh | AbstractMesh:
    """The mesh given, or the ambient one (`jax.set_mesh`).

    Raises:
        ValueError: there is neither.
    """
    ambient = jax.sharding.get_abstract_mesh()
    if mesh is None and ambient.empty:
        raise ValueError(
            "no mesh: set one around the call with jax.set_mesh(jax.make_mesh((jax.device_count(),), "
            "('ring',))), or pass it as mesh=..."
        )
    # Inside jit only the abstract mesh of the context may be named again.
    return ambient if mesh is None else mesh


def device_of(mesh: Mesh | AbstractMesh) -> Device:
    """What a mesh is made of, which need not be what JAX runs on: a mesh may be one to compile for."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    if device is None:
        device = jax.devices()[0]
    return Device(platform=device.platform, kind=device.device_kind, has_cudnn=_has_cudnn(device))


def _has_cudnn(device: Any) -> bool:
    """Whether a GPU is one of those here, not one to compile for, and cuDNN is here too."""
    if device.platform not in ("gpu", "cuda") or not _is_cudnn_installed():
        return False
    if isinstance(device, jax.Device):
        return device in jax.devices()
    return any(device.device_kind == found.device_kind for found in jax.devices())


@ft.cache
def _is_cudnn_installed() -> bool:
    """As it is with `jax[cuda12]` and `jax[cuda13]`."""
    found = importlib.metadata.distributions
    return any(True for cuda in (12, 13) for _ in found(name=f"nvidia-cudnn-cu{cuda}"))


def shard_sequence(
    x: Any, *, mesh: Mesh | AbstractMesh | None = None, ring: Ring = Ring(), axis: int = 1, pad_value=0
) -> Any:
    """Puts sequences into layout order, padded to fit, and places them on the mesh.

    Args:
        x: an array, or a pytree of arrays, with the sequence on `axis`, in natural order.
        mesh: the mesh; None means the ambient one.
        ring: how to distribute.
        axis: the sequence axis; axis 0 of the others, if before it, is taken as the batch.
        pad_value: what fills the padding. So that no token attends to it, pass `Ring.positions` on, which
            are -1 there, or `key_value_seq_lengths`; under a causal mask, giving it no loss is enough.

    Returns:
        The same structure, each leaf in layout order and sharded over the ring.

    Example:
        >>> import jax, jax.numpy as jnp, ringjax
        >>> mesh = jax.make_mesh((2,), ("ring",), devices=jax.devices()[:2])
        >>> ring = ringjax.Ring(layout="zigzag")
        >>> x = ringjax.shard_sequence(jnp.arange(8)[None], mesh=mesh, ring=ring)
        >>> x.tolist()
        [[0, 1, 6, 7, 2, 3, 4, 5]]
        >>> ringjax.unshard_sequence(x, length=8, mesh=mesh, ring=ring).tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    mesh = resolve_mesh(mesh)
    ring_size = ring.size(mesh)

    def shard(leaf):
        leaf = jnp.asarray(leaf)
        _require_axis(leaf, axis)
        length = leaf.shape[axis]
        padded = ring.padded_length(length, ring_size)
        if padded != length:
            widths = [(0, 0)] * leaf.ndim
            widths[axis] = (0, padded - length)
            leaf = jnp.pad(leaf, widths, constant_values=pad_value)
        if ring.layout != "contiguous":
            leaf = place(leaf, mesh, P())
            leaf = jnp.take(leaf, layouts.order(ring.layout, padded, ring_size), axis=axis)
        return place(leaf, mesh, _sequence_spec(ring, leaf.ndim, axis))

    return jax.tree.map(shard, x)


def unshard_sequence(
    x: Any,
    *,
    length: int,
    mesh: Mesh | AbstractMesh | None = None,
    ring: Ring = Ring(),
    axis: int = 1,
) -> Any:
    """Undoes `shard_sequence`: natural order, the padding dropped, whole on every device.

    Args:
        x: an array, or a pytree of arrays, in layout order on `axis`.
        length: number of real tokens.
        mesh: the mesh; None means the ambient one.
        ring: how it was distributed.
        axis: the sequence axis.

    Raises:
        ValueError: an array is not as long as `length` tokens are in this layout.
    """
    mesh = resolve_mesh(mesh)
    ring_size = ring.size(mesh)
    padded = ring.padded_length(length, ring_size)

    def unshard(leaf):
        leaf = jnp.asarray(leaf)
        _require_axis(leaf, axis)
        if leaf.shape[axis] != padded:
            raise ValueError(
                f"unshard_sequence(length={length}): axis {axis} has length {leaf.shape[axis]}, but "
                f"{length} tokens in {ring.layout} layout over {ring_size} ranks take {padded}. Pass "
                f"the length and the ring that shard_sequence() was given."
            )
        leaf = place(leaf, mesh, P())
        inverse = np.argsort(layouts.order(ring.layout, padded, ring_size))[:length]
        return jnp.take(leaf, inverse, axis=axis)

    return jax.tree.map(unshard, x)


def _require_axis(leaf: jax.Array, axis: int) -> None:
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(f"array of shape {leaf.shape} has no axis {axis} to shard the sequence on.")


def _sequence_spec(ring: Ring, ndim: int, axis: int) -> P:
    spec: list = [None] * ndim
    spec[axis] = ring.axis_name
    if axis % ndim > 0 and ring.batch_axes:
        spec[0] = ring.batch_axes
    return P(*spec)


def place(x: jax.Array, mesh: Mesh | AbstractMesh, spec: P) -> jax.Array:
    """`x`, distributed over the mesh as `spec` says; under a trace as well as outside."""
    if isinstance(x, Tracer):
        if AxisType.Explicit in mesh.axis_types:
            return reshard(x, mesh, spec)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    return jax.device_put(x, NamedSharding(mesh, spec) if isinstance(mesh, Mesh) else spec)


def reshard(x: jax.Array, mesh: Mesh | AbstractMesh, spec: P) -> jax.Array:
    """`x` with the sharding that its type must show: Explicit axes as in `spec`, others are XLA's."""
    explicit = {
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    }
    if not explicit:
        return x

    def keep(entry):
        names = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(name for name in names if name in explicit) or None

    return jax.reshard(x, NamedSharding(mesh, P(*map(keep, spec))))
