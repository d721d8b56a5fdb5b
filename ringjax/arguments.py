"""What callers may pass, checked before anything is traced and brought to one form."""

import math
import operator
import reprlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from .biases import BiasFn
from .dropout import seed_of
from .kernels import Operands, Rule
from .masks import Causal, Full, Mask, SlidingWindow, Tokens
from .ring import Ring

__all__ = [
    "SIDES",
    "Implementation",
    "MaskLike",
    "PerSide",
    "check_arrays",
    "check_implementation",
    "check_length",
    "check_mesh",
    "check_split",
    "padded_length_of",
    "rule_and_operands",
    "tokens_of_both",
]

PerSide = ArrayLike | tuple[ArrayLike | None, ArrayLike | None]
MaskLike = Mask | ArrayLike | tuple[Mask, ArrayLike | None]
Implementation = Literal["xla", "cudnn"]
SIDES = ("query", "key")


def rule_and_operands(
    q_shape: tuple[int, ...],
    num_keys: int,
    bias: BiasFn | ArrayLike | None,
    mask: MaskLike | None,
    *,
    scale: float | None,
    is_causal: bool,
    local_window_size: int | tuple[int, int] | None,
    logits_soft_cap: float | None,
    sinks: ArrayLike | None,
    dropout_rate: float,
    dropout_rng: ArrayLike | None,
    broadcast_dropout: bool,
) -> tuple[Rule, Operands]:
    """The arguments that say how logits become weights."""
    batch, num_q, num_heads, head_size = q_shape
    _refuse_as_bias(bias)
    logits = (batch, num_heads, num_q, num_keys)
    spec, mask_array = _split_mask(mask, logits)
    if is_causal:
        spec &= Causal()
    if local_window_size is not None:
        spec &= _window(local_window_size)
    bias_fn = bias_array = parameters = None
    if isinstance(bias, BiasFn):
        bias_fn, parameters = bias.fn, jax.tree.map(_bias_parameter, bias.parameters)
    elif bias is not None:
        bias_array = _logits_array("bias", bias, logits)
    if sinks is not None:
        sinks = _sinks_array(sinks, num_heads)
    rate = _python_number("dropout_rate", dropout_rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate is {rate}; it must be at least 0 and below 1.")
    if rate and dropout_rng is None:
        raise ValueError(f"dropout_rate is {rate}, but there is no dropout_rng; pass jax.random.key(...).")
    cap = logits_soft_cap
    if cap is not None and not (cap := _python_number("logits_soft_cap", cap)) > 0:
        raise ValueError(f"logits_soft_cap is {cap}; it must be above 0, or None for no cap.")
    rule = Rule(
        mask=spec,
        scale=head_size**-0.5 if scale is None else _python_number("scale", scale),
        soft_cap=cap,
        bias_fn=bias_fn,
        dropout_rate=rate,
        broadcast_dropout=broadcast_dropout,
    )
    seed = seed_of(jnp.asarray(dropout_rng)) if rate else None
    return rule, Operands(bias_array, mask_array, parameters, sinks, seed)


def _python_number(name: str, value: float) -> float:
    if isinstance(value, Tracer):
        hint = (
            " Multiply the query by a scale that is computed, and pass scale=1.0." if name == "scale" else ""
        )
        raise ValueError(
            f"{name} is {value}, which is traced: it must be a Python number, for it is part of the compiled "
            f"program.{hint}"
        )
    if np.ndim(value):
        raise ValueError(f"{name} is an array of shape {np.shape(value)}; it must be one number.")
    return float(value)


def _split_mask(mask: MaskLike | None, logits: tuple[int, ...]) -> tuple[Mask, jax.Array | None]:
    """The mask spec, and the array if there is one."""
    match mask:
        case None:
            return Full(), None
        case Mask():
            return mask, None
        case type() if issubclass(mask, Mask):
            raise ValueError(
                f"ring_attention(mask={mask.__name__}): this is a class; a mask spec is a value such as "
                f"ringjax.Causal(), with parentheses."
            )
        case (Mask() as spec, array):
            return spec, None if array is None else _logits_array("mask", array, logits)
    try:
        array = jnp.asarray(mask)
    except (TypeError, ValueError):
        raise ValueError(
            f"ring_attention(mask={reprlib.repr(mask)}): pass a mask spec such as ringjax.Causal(), a "
            f"boolean array, or a pair of both."
        ) from None
    return Full(), _logits_array("mask", array, logits)


def _window(size: int | tuple[int, int]) -> Mask:
    left, right = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    try:
        return SlidingWindow(operator.index(left), operator.index(right))
    except (TypeError, ValueError):
        raise ValueError(
            f"local_window_size={size!r}: it must be one integer from 0 on, or a pair (left, right) of such. "
            f"For a side without a limit pass mask=ringjax.SlidingWindow(left, None)."
        ) from None


def _logits_array(name: str, value: ArrayLike, logits: tuple[int, ...]) -> jax.Array:
    """A bias or mask as `B N T S`, any axis of which may be 1."""
    array = jnp.asarray(value)
    given = array.shape
    if array.ndim < 4:
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    if array.ndim > 4 or any(size not in (1, whole) for size, whole in zip(array.shape, logits, strict=True)):
        raise ValueError(
            f"{name} has shape {given}; it must broadcast to B N T S = {logits}"
            f"{', in layout order on both sequence axes, padding included' if name == 'mask' else ''}."
        )
    if name == "mask" and array.dtype != jnp.bool_:
        raise ValueError(
            f"mask has dtype {array.dtype}; it must be boolean, True where the query attends to the key. An "
            f"additive mask goes into bias."
        )
    if name == "bias" and jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(jnp.float32)
    if name == "bias" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"bias has dtype {array.dtype}; it must be real. A boolean array goes into mask.")
    return array


def _bias_parameter(value: ArrayLike) -> jax.Array:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"BiasFn has a parameter of dtype {array.dtype}; parameters must be floating. What is constant "
            f"belongs into the function."
        )
    return array


def _sinks_array(value: ArrayLike, num_heads: int) -> jax.Array:
    array = jnp.asarray(value)
    if array.shape != (num_heads,) or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"sinks are {array.dtype} of shape {array.shape}; they must be floating, one for each of the "
            f"{num_heads} query heads."
        )
    return array


def tokens_of_both(batch, own_positions, segment_ids, positions, seq_lengths):
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
    # JAX would cut the int64 of a NumPy array down.
    array = value if isinstance(value, np.ndarray) else jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} have dtype {array.dtype}; they must be integers.")
    if array.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"{name} have shape {array.shape}; they must be ({batch}, {length}) or ({length},).")
    known = None if np.can_cast(array.dtype, np.int32) else _known(array)
    if known is not None and (known != known.astype(np.int32)).any():
        raise ValueError(
            f"{name} reach from {known.min()} to {known.max()}; they must fit into int32. Number documents "
            f"anew with np.unique(..., return_inverse=True)."
        )
    return jnp.atleast_2d(array.astype(np.int32))


def _known(array: jax.Array | np.ndarray) -> np.ndarray | None:
    """What stands in it, if this process can tell while it traces."""
    if isinstance(array, Tracer) or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return None
    return np.asarray(array)


def _length_array(name: str, value: ArrayLike, batch: int) -> jax.Array:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} have dtype {array.dtype}; they must be integers.")
    if array.shape != (batch,):
        raise ValueError(f"{name} have shape {array.shape}; they must be ({batch},).")
    return array.astype(jnp.int32)


def check_arrays(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises unless shapes and dtypes of query, key and value fit together."""
    shapes = f"query {q.shape}, key {k.shape}, value {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{shapes}: they must be B T N H, B S K H and B S K Hv (or all without the B).")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]):
        raise ValueError(f"{shapes}: batch sizes must agree, and lengths and heads of key and value.")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: query and key must have the same head size.")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}: the {k.shape[2]} key heads must divide the {q.shape[2]} query heads.")
    if 0 in q.shape[2:] + k.shape[2:] + v.shape[2:]:
        raise ValueError(f"{shapes}: heads, and head sizes, must be at least 1.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"query is {q.dtype}, key {k.dtype}, value {v.dtype}: they must agree. Cast them alike first."
        )
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise ValueError(
            f"query, key and value are {q.dtype}: they must be float32, bfloat16, float16 or float64."
        )


def check_mesh(mesh: Mesh | AbstractMesh, ring: Ring, arrays: tuple[jax.Array, ...]) -> None:
    """Raises where `shard_map` could not split the arrays over the mesh."""
    around = jax.sharding.get_abstract_mesh()
    split = {*ring.axis_names, *ring.batch_axes, *ring.head_axes}
    if manual := sorted(split & set(around.manual_axes)):
        raise ValueError(
            f"ring_attention was called inside a shard_map over mesh axes {manual}, over which it splits "
            f"arrays itself. Call ring_attention_local there, or ring_attention outside."
        )
    if around.empty and isinstance(mesh, AbstractMesh) and not any(isinstance(x, Tracer) for x in arrays):
        raise ValueError(
            f"mesh={mesh} is abstract: nothing can be computed on it. Pass one of devices, such as that of "
            f"jax.make_mesh(...)."
        )


def check_length(length: int, side: str, ring: Ring, ring_size: int) -> None:
    """Raises unless a sequence falls into equal shards."""
    if remainder := length % (multiple := ring.multiple(ring_size)):
        raise ValueError(
            f"{side} length {length} does not divide over mesh axis {ring.axis_name!r} of size {ring_size} "
            f"(remainder {remainder}): {ring.layout} layout needs a multiple of {multiple}. Pad to "
            f"{ring.padded_length(length, ring_size)} with shard_sequence(), which puts the tokens into "
            f"layout order too."
        )


def padded_length_of(length: int, side: str, *, ring: Ring, ring_size: int) -> int:
    """Natural order can be padded here; any other order was made by the caller, padding included."""
    if ring.layout != "contiguous":
        check_length(length, side, ring, ring_size)
    # Where there is no token at all, padding takes its place.
    return ring.padded_length(max(length, 1), ring_size)


def check_latents(q: jax.Array, latent: jax.Array, rotary_key: jax.Array, *ups: jax.Array) -> None:
    """Raises unless the arrays of `latent_attention` fit together."""
    shapes = [x.shape for x in (q, latent, rotary_key, *ups)]
    if [len(shape) for shape in shapes] != [4, 3, 3, 3, 3]:
        raise ValueError(
            f"latent_attention takes query B T N H, latent B S R, rotary_key B S Hr, key_up R K Hk and "
            f"value_up R K Hv; got {', '.join(map(str, shapes))}."
        )
    (batch, _, num_heads, head_size), (_, _, latent_size), rotary, key_up, value_up = shapes
    checks = {
        f"latent {shapes[1]} and query {shapes[0]} have different batch sizes": shapes[1][0] == batch,
        f"rotary_key {rotary} is not of the latent's tokens, {shapes[1][:2]}": rotary[:2] == shapes[1][:2],
        f"key_up {key_up} and value_up {value_up} do not begin with the latent's size, {latent_size}, "
        f"and one number of heads": key_up[0] == value_up[0] == latent_size and key_up[1] == value_up[1],
        f"the query's heads, {num_heads}, do not divide by those of key_up, {key_up[1]}": (
            key_up[1] > 0 and num_heads % key_up[1] == 0
        ),
        f"the query's head size, {head_size}, is not that of key_up and rotary_key together, {key_up[2]} + "
        f"{rotary[2]}": head_size == key_up[2] + rotary[2],
        f"dtypes differ: {', '.join(str(x.dtype) for x in (q, latent, rotary_key, *ups))}": (
            len({x.dtype for x in (q, latent, rotary_key, *ups)}) == 1
        ),
    }
    for problem, fine in checks.items():
        if not fine:
            raise ValueError(f"latent_attention: {problem}.")


def check_split(q: jax.Array, num_kv_heads: int, mesh: Mesh | AbstractMesh, ring: Ring) -> None:
    """Raises unless batch and heads divide over the mesh axes that split them."""
    for what, count, axes in (
        ("batch size", q.shape[0], ring.batch_axes),
        ("number of query heads", q.shape[2], ring.head_axes),
        ("number of key heads", num_kv_heads, ring.head_axes),
    ):
        size = math.prod(mesh.shape[name] for name in axes)
        if count % size:
            raise ValueError(f"{what} {count} does not divide over mesh axes {axes} of size {size}.")


def check_heads(num_heads: int, num_kv_heads: int, ring: Ring, axis_sizes: tuple[int, ...]) -> None:
    """Raises unless the strategy can split the heads that one rank has."""
    if ring.strategy in ("ulysses", "usp"):
        size = axis_sizes[-1] if ring.strategy == "usp" else math.prod(axis_sizes)
        if num_heads % size:
            sizes = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
            raise ValueError(
                f"Ring(strategy={ring.strategy!r}) splits heads over {size} ranks, and {num_heads} do not "
                f"divide. With {num_heads} heads it can be {sizes} ranks; with any other number, "
                f"strategy='usp' over two axes, or 'ring'."
            )
    if num_kv_heads % ring.head_groups:
        raise ValueError(
            f"Ring(head_groups={ring.head_groups}): {num_kv_heads} key heads do not divide into that many."
        )


def check_implementation(implementation: Implementation | None) -> None:
    """Raises for what only `jax.nn` can do."""
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


def _refuse_as_bias(bias: object) -> None:
    spec = bias if isinstance(bias, type) else type(bias)
    if issubclass(spec, Mask):
        raise ValueError(
            f"ring_attention: the mask spec {spec.__name__} came as the bias, which is the fourth argument. "
            f"Pass it as mask={spec.__name__}(...)."
        )
    if callable(bias):
        name = getattr(bias, "__name__", repr(bias))
        raise ValueError(
            f"ring_attention(bias={name}): a bias is an array or a BiasFn. Wrap a function of (parameters, "
            f"head, q_position, kv_position) as ringjax.BiasFn(fn, parameters)."
        )
