"""`ring_attention` and `latent_attention`, on whole arrays, and `ring_attention_local`, in a `shard_map`."""

import dataclasses
import functools as ft
import math
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import layouts
from .arguments import (
    SIDES,
    Implementation,
    MaskLike,
    PerSide,
    check_arrays,
    check_heads,
    check_implementation,
    check_latents,
    check_length,
    check_mesh,
    check_split,
    padded_length_of,
    rule_and_operands,
    tokens_of_both,
)
from .biases import BiasFn
from .kernels import Device, Operands, choose_kernel, default_block_sizes, prepare_kernel
from .kernels.base import accumulator_dtype
from .payloads import Latent, make_payload
from .planning.auto import with_strategy
from .ring import Ring, device_of, reshard, resolve_mesh
from .schedule import Schedule, make_schedule
from .strategies import Problem, attend, get_strategy

__all__ = ["latent_attention", "ring_attention", "ring_attention_local"]


@overload
def ring_attention(
    query: Float[Array, "*B T N H"], key: Float[Array, "*B S K H"], value: Float[Array, "*B S K Hv"],
    bias: BiasFn | ArrayLike | None = ..., mask: MaskLike | None = ..., *,
    scale: float | None = ..., is_causal: bool = ..., query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ..., local_window_size: int | tuple[int, int] | None = ...,
    implementation: Implementation | None = ..., return_residual: Literal[False] = ...,
    segment_ids: PerSide | None = ..., positions: PerSide | None = ...,
    logits_soft_cap: float | None = ..., sinks: ArrayLike | None = ..., dropout_rate: float = ...,
    dropout_rng: ArrayLike | None = ..., broadcast_dropout: bool = ...,
    mesh: Mesh | AbstractMesh | None = ..., ring: Ring = ...,
) -> jax.Array: ...  # fmt: skip


@overload
def ring_attention(
    query: Float[Array, "*B T N H"], key: Float[Array, "*B S K H"], value: Float[Array, "*B S K Hv"],
    bias: BiasFn | ArrayLike | None = ..., mask: MaskLike | None = ..., *,
    scale: float | None = ..., is_causal: bool = ..., query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ..., local_window_size: int | tuple[int, int] | None = ...,
    implementation: Implementation | None = ..., return_residual: Literal[True],
    segment_ids: PerSide | None = ..., positions: PerSide | None = ...,
    logits_soft_cap: float | None = ..., sinks: ArrayLike | None = ..., dropout_rate: float = ...,
    dropout_rng: ArrayLike | None = ..., broadcast_dropout: bool = ...,
    mesh: Mesh | AbstractMesh | None = ..., ring: Ring = ...,
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip


def ring_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K Hv"],
    bias: BiasFn | ArrayLike | None = None,
    mask: MaskLike | None = None,
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
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    broadcast_dropout: bool = False,
    mesh: Mesh | AbstractMesh | None = None,
    ring: Ring = Ring(),
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Exact attention over a sequence that is split over the devices of a mesh axis.

    A drop-in for `jax.nn.dot_product_attention`: the same arguments give the same result, on a mesh of any
    size. In contiguous layout (the default) arrays are in their natural order, and lengths that do not
    divide over the ring are padded here; the output of such a call is whole on every rank. In other layouts
    arrays are in the layout's order, as `shard_sequence` puts them, and a bias or mask array is so on both of
    its sequence axes.

    Logits are scaled, then biased, then capped, then masked.

    Args:
        query: `B T N H`, or `T N H` for a batch of one; float32, bfloat16 or float16 (float64 where x64 is
            on).
        key: `B S K H`, in the query's dtype; K divides N (GQA, MQA).
        value: `B S K Hv`.
        bias: added to the logits: an array `B N T S`, any axis of which may be 1, or a `BiasFn`, which needs
            no such array. Gradients reach both. Each device holds the rows of its own queries. Where it is
            -1e8 or less it hides the key, as -inf does, also where logits are capped.
        mask: a mask spec such as `ringjax.Causal()`, or a boolean array `B N T S`, any axis of which may be
            1; True where the query attends to the key; or a pair of both. A spec skips work and takes no
            memory.
        scale: factor of the logits, a Python number; None means `1 / sqrt(H)`.
        is_causal: query i attends to keys j ≤ i, positions counted from the start of both sequences.
        query_seq_lengths: integers `B`; queries from there on are padding.
        key_value_seq_lengths: integers `B`; keys from there on are padding.
        local_window_size: query i attends to keys i - left ≤ j ≤ i + right; a pair, or one number for both.
        implementation: `"xla"` and None mean what `ring.kernel` says; `"cudnn"` is not supported.
        return_residual: also return the log-sum-exp, natural log, `B T N` in float32 (float64 for float64
            inputs). Its cotangent is exact.
        segment_ids: int32 `B T` or `T`, or a pair (query's, key's); tokens attend within their segment only.
        positions: int32, likewise; -1 marks padding. None means the layout's own.
        logits_soft_cap: logits become `cap * tanh(logits / cap)`, a Python number.
        sinks: floats `N`: for each query head the logit of one more key, which takes weight and gives no
            value. It counts in the log-sum-exp, so a query that attends to no key has that of its sink.
        dropout_rate: probability with which an attention weight is dropped, a Python number below 1; the
            others are divided by `1 - dropout_rate`. The log-sum-exp is that before dropout.
        dropout_rng: a PRNG key, needed if `dropout_rate` is not 0. What is dropped depends on it, the row of
            the batch, the head, and the positions (and segment) of query and key, and on nothing else.
        broadcast_dropout: drop alike in every head and every row of the batch.
        mesh: the mesh; None means the ambient one (`jax.set_mesh`).
        ring: how to distribute.

    Returns:
        `B T N Hv` in the query's dtype, split over the ring like the query. Rows that attend to nothing are
        zero, with a log-sum-exp of `-inf` and zero gradients; where there are no keys, that is all of them.

    Raises:
        ValueError: shapes, dtypes, lengths or mesh axes that do not fit; the text says how to mend it.
        NotImplementedError: a feature that this version lacks; and when differentiated twice.
        TypeError: of JAX, when differentiated in forward mode.

    Example:
        >>> import jax, jax.numpy as jnp, ringjax
        >>> mesh = jax.make_mesh((4,), ("ring",), devices=jax.devices()[:4])
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
        >>> out = ringjax.ring_attention(q, k, v, is_causal=True, mesh=mesh)
        >>> bool(jnp.allclose(out, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-5))
        True

    References:
        Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers", arXiv:2310.01889.
        Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453.
    """
    check_implementation(implementation)
    arrays = [jnp.asarray(x) for x in (query, key, value)]
    alone = all(x.ndim == 3 or x.shape[:1] == (1,) for x in arrays)
    q, k, v = (x[None] if alone and x.ndim == 3 else x for x in arrays)
    check_arrays(q, k, v)
    out, lse = _over_mesh(
        q, k, v, None, make_payload(ring.payload, q.shape[3]), bias, mask, segment_ids, positions,
        (query_seq_lengths, key_value_seq_lengths), mesh, ring, scale=scale, is_causal=is_causal,
        local_window_size=local_window_size, logits_soft_cap=logits_soft_cap, sinks=sinks,
        dropout_rate=dropout_rate, dropout_rng=dropout_rng, broadcast_dropout=broadcast_dropout,
    )  # fmt: skip
    if arrays[0].ndim == 3:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def latent_attention(
    query: Float[Array, "B T N H"],
    latent: Float[Array, "B S R"],
    rotary_key: Float[Array, "B S Hr"],
    key_up: Float[Array, "R K Hk"],
    value_up: Float[Array, "R K Hv"],
    bias: BiasFn | ArrayLike | None = None,
    mask: MaskLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    segment_ids: PerSide | None = None,
    positions: PerSide | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    broadcast_dropout: bool = False,
    mesh: Mesh | AbstractMesh | None = None,
    ring: Ring = Ring(),
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Multi-head latent attention (MLA), of which only the latent and the rotary key travel.

    The result is that of `ring_attention` with `key = [latent @ key_up, rotary_key]` and
    `value = latent @ value_up`, which each rank makes of a shard when it arrives: R + Hr numbers a token on
    the wire in place of K (Hk + Hr + Hv). The gradients of the latent travel as compressed, and those of
    both expansions are summed in float32.

    Args:
        query: `B T N H`, `H = Hk + Hr`, the last Hr of them rotary.
        latent: the compressed keys and values, `B S R`, in the query's dtype.
        rotary_key: the part of the keys that carries position, one for all heads, `B S Hr`; Hr may be 0.
        key_up: expands the latent to keys, `R K Hk`; K divides N.
        value_up: expands it to values, `R K Hv`.
        bias: this and all that follows, as in `ring_attention`.
        mask: as there.
        scale: as there; None means `1 / sqrt(H)`.
        is_causal: as there.
        query_seq_lengths: as there.
        key_value_seq_lengths: as there.
        local_window_size: as there.
        return_residual: as there.
        segment_ids: as there.
        positions: as there.
        logits_soft_cap: as there.
        sinks: as there.
        dropout_rate: as there.
        dropout_rng: as there.
        broadcast_dropout: as there.
        mesh: as there.
        ring: as there; strategies that split heads are not supported, nor is a payload.

    Returns:
        `B T N Hv` in the query's dtype, split over the ring like the query.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: a strategy that splits heads.

    References:
        DeepSeek-AI, "DeepSeek-V2", arXiv:2405.04434, section 2.1.
    """
    q, c, r, *constants = (jnp.asarray(x) for x in (query, latent, rotary_key, key_up, value_up))
    check_latents(q, c, r, *constants)
    if ring.payload is not None or ring.head_groups > 1:
        raise ValueError(
            f"latent_attention(ring=Ring(payload={ring.payload!r}, head_groups={ring.head_groups})): the "
            f"latent is what travels, and it has no heads. Leave both out."
        )
    out, lse = _over_mesh(
        q, c[:, :, None], r[:, :, None], tuple(constants), Latent(c.shape[2]), bias, mask, segment_ids,
        positions, (query_seq_lengths, key_value_seq_lengths), mesh, ring, scale=scale, is_causal=is_causal,
        local_window_size=local_window_size, logits_soft_cap=logits_soft_cap, sinks=sinks,
        dropout_rate=dropout_rate, dropout_rng=dropout_rng, broadcast_dropout=broadcast_dropout,
    )  # fmt: skip
    return (out, lse) if return_residual else out


def _over_mesh(
    q, k, v, constants, payload, bias, mask, segment_ids, positions, seq_lengths, mesh, ring, **options
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of whole arrays; `k` and `v` are what the payload takes."""
    mesh = resolve_mesh(mesh)
    ring_size = ring.size(mesh)
    check_mesh(mesh, ring, (q, k, v))
    num_kv_heads, value_size, latent = k.shape[2], v.shape[3], None
    if constants is not None:
        latent = k.shape[3], v.shape[3]
        num_kv_heads, value_size = constants[1].shape[1:]
    check_split(q, num_kv_heads, mesh, ring)
    rule, operands = rule_and_operands(q.shape, k.shape[1], bias, mask, **options)
    lengths = (q.shape[1], k.shape[1])
    padded = tuple(map(ft.partial(padded_length_of, ring=ring, ring_size=ring_size), lengths, SIDES))
    tokens = tokens_of_both(
        q.shape[0],
        [jnp.asarray(ring.positions(length, ring_size)[:length])[None] for length in lengths],
        segment_ids,
        positions,
        seq_lengths,
    )
    # A length that does not divide cannot stay split: JAX shards evenly only.
    whole = P(ring.spec[0], None, ring.spec[2])
    if 0 in q.shape[:2]:
        return _no_rows(q, value_size, mesh, whole)
    kv_shape = max(lengths[1], 1), num_kv_heads, value_size
    ring = with_strategy(ring, mesh, q.shape, kv_shape, q.dtype, rule.mask, latent=latent)
    sizes = ring.axis_sizes(mesh)
    splits = math.prod(mesh.shape[name] for name in ring.head_axes)
    check_heads(q.shape[2] // splits, num_kv_heads // splits, ring, sizes)
    device = device_of(mesh)
    ring = _with_kernel(ring, rule, operands, q.dtype, (q.shape[3], value_size), device)
    problem = _problem(
        rule, operands, tokens, positions is None, padded, lengths, ring, sizes, payload, device
    )
    tensors = _Tensors(q, k, v, constants, tokens[0], tokens[1], operands)
    missing = (padded[0] - lengths[0], padded[1] - lengths[1])
    tensors = _padded(tensors, missing, _specs(tensors, ring), mesh)
    tensors = jax.tree.map(lambda x, spec: reshard(x, mesh, spec), tensors, _specs(tensors, ring))
    out, lse = _attend(tensors, problem=problem, mesh=mesh, ring=ring)
    if padded[0] != lengths[0]:
        out, lse = (reshard(x, mesh, whole)[:, : lengths[0]] for x in (out, lse))
    return out, lse


def _no_rows(q: jax.Array, value_size: int, mesh: Mesh | AbstractMesh, spec: P):
    """Output and log-sum-exp without elements; not split by tokens, for of such arrays JAX cuts no shards."""

    def local(q):
        lse = jnp.zeros(q.shape[:3], accumulator_dtype(q.dtype))
        return jnp.zeros((*lse.shape, value_size), q.dtype), lse

    q = reshard(q, mesh, spec)
    return jax.shard_map(local, mesh=mesh, in_specs=(spec,), out_specs=(spec, spec))(q)


class _Tensors(NamedTuple):
    """All arrays of a call, whole, or how each of them is split; arguments of `strategies.attend`."""

    q: Any
    k: Any
    v: Any
    constants: Any
    q_tokens: Any
    kv_tokens: Any
    operands: Any


def _padded(
    tensors: _Tensors, missing: tuple[int, int], specs: _Tensors, mesh: Mesh | AbstractMesh
) -> _Tensors:
    """With the sequences of queries and keys longer by `missing`, marked as padding by their positions."""

    def pad(x, spec, *more, fill=0):
        widths = [(0, 0)] * x.ndim
        for axis, count in more:
            widths[axis] = (0, count)
        if not any(map(any, widths)):
            return x
        # JAX shards evenly only, so in the gradient too the axis is whole before the padding is cut off.
        whole = (None if any(width) else name for name, width in zip(spec, widths, strict=True))
        return jnp.pad(reshard(x, mesh, P(*whole)), widths, constant_values=fill)

    def pad_logits(x, spec):
        # An axis of 1 is broadcast.
        return pad(x, spec, *((axis, count) for axis, count in ((2, on_q), (3, on_kv)) if x.shape[axis] != 1))

    q, k, v, constants, q_tokens, kv_tokens, operands = tensors
    on_q, on_kv = missing
    return _Tensors(
        pad(q, specs.q, (1, on_q)),
        pad(k, specs.k, (1, on_kv)),
        pad(v, specs.v, (1, on_kv)),
        constants,
        jax.tree.map(lambda x, spec: pad(x, spec, (1, on_q), fill=-1), q_tokens, specs.q_tokens),
        jax.tree.map(lambda x, spec: pad(x, spec, (1, on_kv), fill=-1), kv_tokens, specs.kv_tokens),
        operands._replace(
            bias=jax.tree.map(pad_logits, operands.bias, specs.operands.bias),
            mask=jax.tree.map(pad_logits, operands.mask, specs.operands.mask),
        ),
    )


def _specs(tensors: _Tensors, ring: Ring) -> _Tensors:
    """How the arrays of a call are split; axes of 1 are whole everywhere."""
    batch, axis_name, heads, _ = ring.spec

    def of_tokens(x):
        return P(batch if x.shape[0] > 1 else None, axis_name)

    def of_logits(x):
        whole = (batch, heads, axis_name)
        return P(*(name if size > 1 else None for name, size in zip(whole, x.shape, strict=False)), None)

    operands = tensors.operands
    specs: Any = Operands  # of the same form
    kv = ring.spec if tensors.constants is None else P(batch, axis_name, None, None)  # latents have no heads
    return _Tensors(
        ring.spec,
        kv,
        kv,
        jax.tree.map(lambda x: P(None, heads), tensors.constants),
        jax.tree.map(of_tokens, tensors.q_tokens),
        jax.tree.map(of_tokens, tensors.kv_tokens),
        specs(
            bias=None if operands.bias is None else of_logits(operands.bias),
            mask=None if operands.mask is None else of_logits(operands.mask),
            bias_parameters=jax.tree.map(lambda x: P(), operands.bias_parameters),
            sinks=None if operands.sinks is None else P(heads),
            seed=None if operands.seed is None else P(),
        ),
    )


@ft.partial(jax.jit, static_argnames=("problem", "mesh", "ring"))
def _attend(tensors: _Tensors, *, problem: Problem, mesh: Mesh | AbstractMesh, ring: Ring):
    """Compiled once per problem: outside jit, a `shard_map` alone would run operation by operation."""
    return jax.shard_map(
        lambda tensors: _attend_local(tensors, problem=problem, ring=ring),
        mesh=mesh,
        in_specs=(_specs(tensors, ring),),
        out_specs=(ring.spec, P(*ring.spec[:3])),
    )(tensors)


def _attend_local(tensors: _Tensors, *, problem: Problem, ring: Ring):
    q, k, v, *others = tensors
    kv = jnp.swapaxes(jnp.concatenate([k, v], axis=-1), 1, 2)
    return attend(get_strategy(ring.strategy), ring.strategy, q, kv, *others, problem=problem)


@overload
def ring_attention_local(
    query: Float[Array, "B T_local N H"], key: Float[Array, "B S_local K H"],
    value: Float[Array, "B S_local K Hv"], bias: BiasFn | ArrayLike | None = ...,
    mask: MaskLike | None = ..., *, scale: float | None = ..., is_causal: bool = ...,
    local_window_size: int | tuple[int, int] | None = ..., return_residual: Literal[False] = ...,
    segment_ids: PerSide | None = ..., positions: PerSide | None = ...,
    logits_soft_cap: float | None = ..., sinks: ArrayLike | None = ..., dropout_rate: float = ...,
    dropout_rng: ArrayLike | None = ..., broadcast_dropout: bool = ..., ring: Ring = ...,
) -> jax.Array: ...  # fmt: skip


@overload
def ring_attention_local(
    query: Float[Array, "B T_local N H"], key: Float[Array, "B S_local K H"],
    value: Float[Array, "B S_local K Hv"], bias: BiasFn | ArrayLike | None = ...,
    mask: MaskLike | None = ..., *, scale: float | None = ..., is_causal: bool = ...,
    local_window_size: int | tuple[int, int] | None = ..., return_residual: Literal[True],
    segment_ids: PerSide | None = ..., positions: PerSide | None = ...,
    logits_soft_cap: float | None = ..., sinks: ArrayLike | None = ..., dropout_rate: float = ...,
    dropout_rng: ArrayLike | None = ..., broadcast_dropout: bool = ..., ring: Ring = ...,
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip


def ring_attention_local(
    query: Float[Array, "B T_local N H"],
    key: Float[Array, "B S_local K H"],
    value: Float[Array, "B S_local K Hv"],
    bias: BiasFn | ArrayLike | None = None,
    mask: MaskLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    segment_ids: PerSide | None = None,
    positions: PerSide | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    broadcast_dropout: bool = False,
    ring: Ring = Ring(),
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`ring_attention` for use inside the caller's `shard_map`: every array is this rank's shard.

    Takes shards in the order of `ring.layout`, equally long on all ranks. The caller has split batch and
    heads already; where dropout or a `BiasFn` asks which ones these are, `ring.batch_axes` and
    `ring.head_axes` must say over which mesh axes. `check_vma=True` passes.

    Args:
        query: this rank's queries, `B T_local N H`.
        key: this rank's keys, `B S_local K H`.
        value: this rank's values, `B S_local K Hv`.
        bias: the rows of this rank's queries, `B N T_local S` with the keys of all ranks in layout order, any
            axis 1; or a `BiasFn`.
        mask: a mask spec, or booleans like the bias, or a pair of both.
        scale: factor of the logits, a Python number; None means `1 / sqrt(H)`.
        is_causal: also require key position ≤ query position.
        local_window_size: as in `ring_attention`.
        return_residual: also return the log-sum-exp, `B T_local N` in float32 (float64 for float64 inputs).
        segment_ids: of this rank's tokens, `B T_local` or `T_local`, or a pair (query's, key's).
        positions: likewise; -1 marks padding. None means the layout's own, with no padding.
        logits_soft_cap: as in `ring_attention`.
        sinks: a logit for each of this rank's heads, `N`.
        dropout_rate: as in `ring_attention`.
        dropout_rng: the same key on every rank.
        broadcast_dropout: as in `ring_attention`.
        ring: how the sequence is distributed.

    Returns:
        This rank's output, `B T_local N Hv` in the query's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: when differentiated twice.
    """
    check_arrays(query, key, value)
    if 0 in query.shape + key.shape:
        raise ValueError(
            f"query {query.shape}, key {key.shape}: every rank must have something of each axis; "
            f"ring_attention takes empty ones."
        )
    mesh = resolve_mesh(None)
    ring_size = dataclasses.replace(ring, batch_axes=(), head_axes=()).size(mesh)
    sizes = ring.axis_sizes(mesh)
    shards = (query.shape[1], key.shape[1])
    lengths = (shards[0] * ring_size, shards[1] * ring_size)
    for length, side in zip(lengths, SIDES, strict=True):
        check_length(length, side, ring, ring_size)
    rank = jax.lax.axis_index(ring.axis_name)
    tokens = tokens_of_both(
        query.shape[0],
        [
            layouts.local_positions(ring.layout, rank, ring_size, shard, length)[None]
            for shard, length in zip(shards, lengths, strict=True)
        ],
        segment_ids,
        positions,
        (None, None),
    )
    rule, operands = rule_and_operands(
        query.shape, lengths[1], bias, mask, scale=scale, is_causal=is_causal,
        local_window_size=local_window_size, logits_soft_cap=logits_soft_cap, sinks=sinks,
        dropout_rate=dropout_rate, dropout_rng=dropout_rng, broadcast_dropout=broadcast_dropout,
    )  # fmt: skip
    q_shape = (query.shape[0], lengths[0], *query.shape[2:])
    kv_shape = (lengths[1], key.shape[2], value.shape[3])
    # Heads and batch are this rank's already.
    here = dataclasses.replace(ring, batch_axes=(), head_axes=())
    strategy = with_strategy(here, mesh, q_shape, kv_shape, query.dtype, rule.mask)
    ring = dataclasses.replace(strategy, batch_axes=ring.batch_axes, head_axes=ring.head_axes)
    check_heads(query.shape[2], key.shape[2], ring, sizes)
    payload = make_payload(ring.payload, query.shape[3])
    device = device_of(mesh)
    ring = _with_kernel(ring, rule, operands, query.dtype, (query.shape[3], value.shape[3]), device)
    problem = _problem(
        rule, operands, tokens, positions is None, lengths, lengths, ring, sizes, payload, device
    )
    tensors = _Tensors(query, key, value, None, tokens[0], tokens[1], operands)
    out, lse = _attend_local(tensors, problem=problem, ring=ring)
    return (out, lse) if return_residual else out


def _with_kernel(ring: Ring, rule, operands, dtype, head_sizes: tuple[int, int], device: Device) -> Ring:
    """`ring`, with a kernel and its block sizes in place of defaults; `head_sizes` are H and Hv."""
    kernel = ring.kernel
    if kernel == "auto":
        kernel, _ = choose_kernel(rule, operands, dtype, head_sizes, device)
    prepare_kernel(kernel)
    block_sizes = ring.block_sizes or default_block_sizes(kernel, device, dtype, head_sizes)
    return dataclasses.replace(ring, kernel=kernel, block_sizes=block_sizes)


def _problem(
    rule, operands, tokens, own_positions, padded, lengths, ring, axis_sizes, payload, device
) -> Problem:
    """Every default resolved."""
    return Problem(
        axis_names=ring.axis_names,
        axis_sizes=axis_sizes,
        schedule=_schedule(rule.mask, own_positions, padded, ring, axis_sizes),
        layout=ring.layout,
        q_length=lengths[0],
        kv_length=lengths[1],
        rule=rule,
        # Extremes tell all there is to know of a run of consecutive positions, and of nothing else.
        refine=(
            tokens[0] is not None
            or operands.mask is not None
            or not rule.mask.is_exact(consecutive=ring.layout != "striped")
        ),
        payload=payload,
        head_groups=ring.head_groups,
        kernel=ring.kernel,
        block_sizes=ring.block_sizes,
        device=device,
        batch_axes=ring.batch_axes,
        head_axes=ring.head_axes,
        halves_own=_sends_meanwhile(device),
    )


def _sends_meanwhile(device: Device) -> bool:
    """Whether the links work while the device computes; on CPUs both take the same cores."""
    return device.platform != "cpu"


def _schedule(mask, own_positions: bool, padded, ring: Ring, axis_sizes: tuple[int, ...]) -> Schedule:
    """The hops of what travels from rank to rank."""
    ring_size = math.prod(axis_sizes)
    match ring.strategy:
        case "ulysses" | "all_gather":
            group = ring_size
        case "usp":
            group = axis_sizes[-1]
        case _:
            group = 1
    if not own_positions:
        return Schedule.every_shard(ring_size // group, bidirectional=ring.bidirectional)
    shards = tuple(length // ring_size for length in padded)
    return make_schedule(mask, ring.layout, ring_size, *shards, group=group, bidirectional=ring.bidirectional)
