"""`ring_attention`, on whole arrays, and `ring_attention_local`, inside the caller's own `shard_map`."""

import dataclasses
import functools as ft
import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import layouts
from .kernels import BlockSizes
from .masks import Causal, Full, Mask, Tokens
from .ring import Ring, reshard, resolve_mesh
from .schedule import make_schedule
from .strategies import Problem, rotate_kv

__all__ = ["ring_attention", "ring_attention_local"]

PerSide = ArrayLike | tuple[ArrayLike | None, ArrayLike | None]
Implementation = Literal["xla", "cudnn"]
SIDES = ("query", "key")


@overload
def ring_attention(
    query: Float[Array, "*B T N H"], key: Float[Array, "*B S K H"], value: Float[Array, "*B S K Hv"],
    bias: ArrayLike | None = ..., mask: Mask | None = ..., *, scale: float | None = ...,
    is_causal: bool = ..., query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ..., local_window_size: int | tuple[int, int] | None = ...,
    implementation: Implementation | None = ..., return_residual: Literal[False] = ...,
    segment_ids: PerSide | None = ..., positions: PerSide | None = ...,
    mesh: Mesh | AbstractMesh | None = ..., ring: Ring = ...,
) -> jax.Array: ...  # fmt: skip


@overload
def ring_attention(
    query: Float[Array, "*B T N H"], key: Float[Array, "*B S K H"], value: Float[Array, "*B S K Hv"],
    bias: ArrayLike | None = ..., mask: Mask | None = ..., *, scale: float | None = ...,
    is_causal: bool = ..., query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ..., local_window_size: int | tuple[int, int] | None = ...,
    implementation: Implementation | None = ..., return_residual: Literal[True],
    segment_ids: PerSide | None = ..., positions: PerSide | None = ...,
    mesh: Mesh | AbstractMesh | None = ..., ring: Ring = ...,
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip


def ring_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K Hv"],
    bias: ArrayLike | None = None,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    segment_ids: PerSide | None = None,
    positions: PerSide | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    ring: Ring = Ring(),
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Exact attention over a sequence that is split over the devices of a mesh axis.

    A drop-in for `jax.nn.dot_product_attention`: the same arguments give the same result, on a mesh of any
    size. In contiguous layout (the default) arrays are in their natural order, and lengths that do not
    divide over the ring are padded here; the output of such a call is whole on every rank. In other layouts
    arrays are in the layout's order, as `shard_sequence` puts them.

    Args:
        query: `B T N H`, or `T N H`; float32, bfloat16 or float16 (float64 where x64 is on).
        key: `B S K H`, in the query's dtype; K divides N (GQA, MQA).
        value: `B S K Hv`.
        bias: not supported yet.
        mask: a mask spec such as `ringjax.Causal()`; boolean arrays are not supported yet.
        scale: factor of the logits, a Python number; None means `1 / sqrt(H)`.
        is_causal: query i attends to keys j ≤ i, positions counted from the start of both sequences.
        query_seq_lengths: integers `B`; queries from there on are padding.
        key_value_seq_lengths: integers `B`; keys from there on are padding.
        local_window_size: not supported yet.
        implementation: `"xla"` and None mean what `ring.kernel` says; `"cudnn"` is not supported.
        return_residual: also return the log-sum-exp, natural log, `B T N` in float32 (float64 for float64
            inputs). Its cotangent is exact.
        segment_ids: int32 `B T` or `T`, or a pair (query's, key's); tokens attend within their segment only.
        positions: int32, likewise; -1 marks padding. None means the layout's own.
        mesh: the mesh; None means the ambient one (`jax.set_mesh`).
        ring: how to distribute.

    Returns:
        `B T N Hv` in the query's dtype, split over the ring like the query. Rows that attend to nothing are
        zero, with a log-sum-exp of `-inf` and zero gradients.

    Raises:
        ValueError: shapes, dtypes, lengths or mesh axes that do not fit; the text says how to mend it.
        NotImplementedError: a feature that this version lacks.

    Example:
        >>> import jax, jax.numpy as jnp, ringjax
        >>> mesh = jax.make_mesh((4,), ("ring",), devices=jax.devices()[:4])
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
        >>> out = ringjax.ring_attention(q, k, v, is_causal=True, mesh=mesh)
        >>> bool(jnp.allclose(out, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-5))
        True

    References:
        Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers", arXiv:2310.01889.
    """
    _refuse_mask_as_bias(bias)
    _refuse_missing(bias=bias, local_window_size=local_window_size)
    _check_implementation(implementation)
    arrays = [jnp.asarray(x) for x in (query, key, value)]
    batched = arrays[0].ndim == 4
    q, k, v = arrays if batched else (x[None] for x in arrays)
    _check_arrays(q, k, v)
    mesh = resolve_mesh(mesh)
    ring_size = ring.size(mesh)
    _check_split(q, k, mesh, ring)
    lengths = (q.shape[1], k.shape[1])
    padded = tuple(map(ft.partial(_padded_length, ring=ring, ring_size=ring_size), lengths, SIDES))
    q_tokens, kv_tokens = _tokens(
        q.shape[0],
        [jnp.asarray(ring.positions(length, ring_size)[:length])[None] for length in lengths],
        segment_ids,
        positions,
        (query_seq_lengths, key_value_seq_lengths),
    )
    problem = _problem(q, padded, lengths, ring_size, mask, is_causal, scale, ring, q_tokens)

    def put(x, spec, side, fill=0):
        if missing := padded[side] - lengths[side]:
            widths = [(0, missing) if axis == 1 else (0, 0) for axis in range(x.ndim)]
            x = jnp.pad(x, widths, constant_values=fill)
        return reshard(x, mesh, spec)

    def token_spec(x):
        return P(ring.spec[0] if x.shape[0] > 1 else None, ring.spec[1])

    q, k, v = put(q, ring.spec, 0), put(k, ring.spec, 1), put(v, ring.spec, 1)
    q_tokens = jax.tree.map(lambda x: put(x, token_spec(x), 0, fill=-1), q_tokens)
    kv_tokens = jax.tree.map(lambda x: put(x, token_spec(x), 1, fill=-1), kv_tokens)
    in_specs = (ring.spec, ring.spec, ring.spec, *jax.tree.map(token_spec, (q_tokens, kv_tokens)))
    out, lse = _attend(q, k, v, q_tokens, kv_tokens, problem=problem, mesh=mesh, in_specs=in_specs)
    if padded[0] != lengths[0]:
        # A length that does not divide cannot stay split: JAX shards evenly only.
        whole = P(ring.spec[0], None, ring.spec[2])
        out, lse = (reshard(x, mesh, whole)[:, : lengths[0]] for x in (out, lse))
    if not batched:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


@ft.partial(jax.jit, static_argnames=("problem", "mesh", "in_specs"))
def _attend(*arrays, problem: Problem, mesh: Mesh | AbstractMesh, in_specs: tuple):
    """Compiled once per problem: outside jit, a `shard_map` alone would run operation by operation."""
    out_specs = (in_specs[0], P(*in_specs[0][:3]))
    return jax.shard_map(
        ft.partial(rotate_kv, problem=problem), mesh=mesh, in_specs=in_specs, out_specs=out_specs
    )(*arrays)


@overload
def ring_attention_local(
    query: Float[Array, "B T_local N H"], key: Float[Array, "B S_local K H"],
    value: Float[Array, "B S_local K Hv"], mask: Mask | None = ..., *, scale: float | None = ...,
    is_causal: bool = ..., return_residual: Literal[False] = ..., segment_ids: PerSide | None = ...,
    positions: PerSide | None = ..., ring: Ring = ...,
) -> jax.Array: ...  # fmt: skip


@overload
def ring_attention_local(
    query: Float[Array, "B T_local N H"], key: Float[Array, "B S_local K H"],
    value: Float[Array, "B S_local K Hv"], mask: Mask | None = ..., *, scale: float | None = ...,
    is_causal: bool = ..., return_residual: Literal[True], segment_ids: PerSide | None = ...,
    positions: PerSide | None = ..., ring: Ring = ...,
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip


def ring_attention_local(
    query: Float[Array, "B T_local N H"],
    key: Float[Array, "B S_local K H"],
    value: Float[Array, "B S_local K Hv"],
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_residual: bool = False,
    segment_ids: PerSide | None = None,
    positions: PerSide | None = None,
    ring: Ring = Ring(),
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`ring_attention` for use inside the caller's `shard_map`: every array is this rank's shard.

    Takes shards in the order of `ring.layout`, equally long on all ranks. `ring.batch_axes` and
    `ring.head_axes` have no meaning here: the caller has split those axes already. `check_vma=True` passes.

    Args:
        query: this rank's queries, `B T_local N H`.
        key: this rank's keys, `B S_local K H`.
        value: this rank's values, `B S_local K Hv`.
        mask: a mask spec.
        scale: factor of the logits, a Python number; None means `1 / sqrt(H)`.
        is_causal: also require key position ≤ query position.
        return_residual: also return the log-sum-exp, `B T_local N` in float32 (float64 for float64 inputs).
        segment_ids: of this rank's tokens, `B T_local` or `T_local`, or a pair (query's, key's).
        positions: likewise; -1 marks padding. None means the layout's own, with no padding.
        ring: how the sequence is distributed.

    Returns:
        This rank's output, `B T_local N Hv` in the query's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check_arrays(query, key, value)
    ring_size = dataclasses.replace(ring, batch_axes=(), head_axes=()).size(resolve_mesh(None))
    shards = (query.shape[1], key.shape[1])
    lengths = tuple(shard * ring_size for shard in shards)
    for length, side in zip(lengths, SIDES, strict=True):
        _check_length(length, side, ring, ring_size)
    rank = jax.lax.axis_index(ring.axis_name)
    q_tokens, kv_tokens = _tokens(
        query.shape[0],
        [
            layouts.local_positions(ring.layout, rank, ring_size, shard, length)[None]
            for shard, length in zip(shards, lengths, strict=True)
        ],
        segment_ids,
        positions,
        (None, None),
    )
    problem = _problem(query, lengths, lengths, ring_size, mask, is_causal, scale, ring, q_tokens)
    out, lse = rotate_kv(query, key, value, q_tokens, kv_tokens, problem)
    return (out, lse) if return_residual else out


def _problem(q, padded, lengths, ring_size, mask, is_causal, scale, ring, q_tokens) -> Problem:
    """Every default resolved."""
    mask = _resolve_mask(mask, is_causal)
    schedule = make_schedule(mask, ring.layout, ring_size, *(length // ring_size for length in padded))
    return Problem(
        axis_name=ring.axis_name,
        ring_size=ring_size,
        # Positions that are data may need any shard.
        steps=schedule.steps if q_tokens is None else ring_size,
        layout=ring.layout,
        q_length=lengths[0],
        kv_length=lengths[1],
        mask=mask,
        scale=_resolve_scale(scale, q.shape[-1]),
        kernel="blockwise" if ring.kernel == "auto" else ring.kernel,
        block_sizes=ring.block_sizes or BlockSizes(),
    )


def _resolve_scale(scale: float | None, head_size: int) -> float:
    if isinstance(scale, Tracer):
        raise ValueError(
            f"scale is {scale}, which is traced: it must be a Python number, for it is part of the compiled "
            f"program. Multiply the query by a scale that is computed, and pass scale=1.0."
        )
    return head_size**-0.5 if scale is None else float(scale)


def _resolve_mask(mask: Mask | None, is_causal: bool) -> Mask:
    match mask:
        case None | Full():
            return Causal() if is_causal else Full()
        case Mask():
            return mask & Causal() if is_causal else mask
        case jax.Array() | np.ndarray():
            raise NotImplementedError(
                f"ring_attention(mask={type(mask).__name__}): mask arrays are not supported yet. Pass a mask "
                f"spec such as ringjax.Causal(), or segment_ids for packed documents."
            )
        case type():
            raise ValueError(
                f"ring_attention(mask={mask.__name__}): this is a class; a mask spec is a value such as "
                f"ringjax.Causal(), with parentheses."
            )
        case _:
            raise ValueError(f"ring_attention(mask={mask!r}): pass a mask spec such as ringjax.Causal().")


def _tokens(batch, own_positions, segment_ids, positions, seq_lengths):
    """Both sides' tokens where the caller gave any, or (None, None) for the layout's own positions."""
    segments, given = _pair("segment_ids", segment_ids), _pair("positions", positions)
    if (segments[0] is None) != (segments[1] is None):
        raise ValueError(
            "segment_ids were given for one side only; pass one array for both sides, or a pair "
            "(query's, key's)."
        )
    if all(x is None for x in (*segments, *given, *seq_lengths)):
        return None, None
    sides = []
    for side, own, segment, position, seq_length in zip(
        SIDES, own_positions, segments, given, seq_lengths, strict=True
    ):
        length = own.shape[1]
        position = own if position is None else _token_array(f"{side} positions", position, batch, length)
        if seq_length is not None:
            seq_length = _length_array(f"{side} lengths", seq_length, batch)
            position = jnp.where(own < seq_length[:, None], position, jnp.int32(-1))
        if segment is not None:
            segment = _token_array(f"{side} segment_ids", segment, batch, length)
        sides.append(Tokens(position, segment))
    return tuple(sides)


def _pair(name: str, value: PerSide | None) -> tuple:
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(f"{name} is a tuple of {len(value)}; it must be (query's, key's).")
        return value
    return value, value


def _token_array(name: str, value: ArrayLike, batch: int, length: int) -> jax.Array:
    """As int32 `B T`, or `1 T` where all rows of the batch share it."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} have dtype {array.dtype}; they must be integers.")
    if array.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"{name} have shape {array.shape}; they must be ({batch}, {length}) or ({length},).")
    if isinstance(value, np.ndarray) and (value != value.astype(np.int32)).any():
        raise ValueError(
            f"{name} reach from {value.min()} to {value.max()}; they must fit into int32. Number documents "
            f"anew with np.unique(..., return_inverse=True)."
        )
    return array.reshape(-1, length).astype(jnp.int32)


def _length_array(name: str, value: ArrayLike, batch: int) -> jax.Array:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} have dtype {array.dtype}; they must be integers.")
    if array.shape != (batch,):
        raise ValueError(f"{name} have shape {array.shape}; they must be ({batch},).")
    return array.astype(jnp.int32)


def _check_arrays(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    shapes = f"query {q.shape}, key {k.shape}, value {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{shapes}: they must be B T N H, B S K H and B S K Hv (or all without the B).")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]):
        raise ValueError(f"{shapes}: batch sizes must agree, and lengths and heads of key and value.")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: query and key must have the same head size.")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}: the {k.shape[2]} key heads must divide the {q.shape[2]} query heads.")
    if 0 in q.shape + k.shape + v.shape:
        raise ValueError(f"{shapes}: every axis must have at least one element.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"query is {q.dtype}, key {k.dtype}, value {v.dtype}: they must agree. Cast them alike first."
        )
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise ValueError(
            f"query, key and value are {q.dtype}: they must be float32, bfloat16, float16 or float64."
        )


def _check_length(length: int, side: str, ring: Ring, ring_size: int) -> None:
    if remainder := length % (multiple := ring.multiple(ring_size)):
        raise ValueError(
            f"{side} length {length} does not divide over mesh axis {ring.axis_name!r} of size {ring_size} "
            f"(remainder {remainder}): {ring.layout} layout needs a multiple of {multiple}. Pad to "
            f"{ring.padded_length(length, ring_size)} with shard_sequence(), which puts the tokens into "
            f"layout order too."
        )


def _padded_length(length: int, side: str, *, ring: Ring, ring_size: int) -> int:
    """Natural order can be padded here; any other order was made by the caller, padding included."""
    if ring.layout != "contiguous":
        _check_length(length, side, ring, ring_size)
    return ring.padded_length(length, ring_size)


def _check_split(q: jax.Array, k: jax.Array, mesh: Mesh | AbstractMesh, ring: Ring) -> None:
    for what, count, axes in (
        ("batch size", q.shape[0], ring.batch_axes),
        ("number of query heads", q.shape[2], ring.head_axes),
        ("number of key heads", k.shape[2], ring.head_axes),
    ):
        size = math.prod(mesh.shape[name] for name in axes)
        if count % size:
            raise ValueError(f"{what} {count} does not divide over mesh axes {axes} of size {size}.")


def _check_implementation(implementation: Implementation | None) -> None:
    match implementation:
        case None | "xla":
            return
        case "cudnn":
            raise NotImplementedError(
                "ring_attention(implementation='cudnn') is not supported. Leave it out; Ring(kernel=...) "
                "chooses what computes on each device."
            )
        case _:
            raise ValueError(
                f"ring_attention(implementation={implementation!r}) is not known; choose one of None, 'xla'."
            )


def _refuse_mask_as_bias(bias: object) -> None:
    spec = bias if isinstance(bias, type) else type(bias)
    if issubclass(spec, Mask):
        raise ValueError(
            f"ring_attention: the mask spec {spec.__name__} came as the bias, which is the fourth argument. "
            f"Pass it as mask={spec.__name__}(...)."
        )


def _refuse_missing(**features: object) -> None:
    for name, value in features.items():
        if value is not None:
            raise NotImplementedError(
                f"ring_attention({name}=...) is not supported yet. Leave it out, or use "
                f"jax.nn.dot_product_attention on one device."
            )
