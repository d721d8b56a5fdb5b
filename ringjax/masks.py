"""What may attend to what: a rule on positions and segments, and its verdict on whole blocks.

A mask is a frozen value that answers two questions. `allowed` is asked about pairs of tokens, inside
a kernel. `bounds` is asked about pairs of blocks, of which only the smallest and the largest position
are known; it decides whether a block pair is skipped, computed without a mask, or computed with one.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Causal",
    "ChunkedLocal",
    "Full",
    "Mask",
    "MaskFn",
    "PrefixLM",
    "SlidingWindow",
    "Tokens",
    "attends",
    "attends_pairwise",
    "verdicts",
]

# The order is the order of work: partial blocks first, then full ones; empty ones never.
PARTIAL, FULL, EMPTY = 0, 1, 2

LAST_POSITION = int(np.iinfo(np.int32).max)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Base of all mask specs; a spec says which *positions* attend, segments and padding come on top."""

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """True where the query attends to the key; both arguments broadcast."""
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        """Attends where both do."""
        if not isinstance(other, Mask):
            return NotImplemented
        if isinstance(self, Full):
            return other
        return self if isinstance(other, Full) or other == self else Both(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        """Attends where one of them does, or both."""
        if not isinstance(other, Mask):
            return NotImplemented
        if isinstance(other, Full):
            return other
        return self if isinstance(self, Full) or other == self else Either(self, other)

    def bounds(self, q_min, q_max, kv_min, kv_max):
        """Whether (some, every) pair of two blocks attends, from their extreme positions.

        `some` may be True although no pair attends (work is wasted); `every` must be exact or False.
        Written with operators that NumPy, JAX and Python numbers share, so that the schedule can ask
        on the host and a kernel on the device. Positions run from 0 to 2³¹ - 1: their differences fit
        into int32, their sums do not.
        """
        raise NotImplementedError

    def is_exact(self, *, consecutive: bool) -> bool:
        """Whether `bounds` misses nothing, on blocks of consecutive positions or on any.

        Where it may, kernels look at the block itself before they compute it.
        """
        return False


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query attends to every key."""

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """True everywhere."""
        shape = jnp.broadcast_shapes(jnp.shape(q_position), jnp.shape(kv_position))
        return jnp.ones(shape, jnp.bool_)

    def bounds(self, q_min, q_max, kv_min, kv_max):
        """Both True, wherever there is a query."""
        return q_min <= q_max, q_min <= q_max

    def is_exact(self, *, consecutive: bool) -> bool:
        """On any block."""
        return True


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Query i attends to keys j ≤ i, positions counted from the start of both sequences.

    Example:
        >>> import numpy as np, ringjax
        >>> i = np.arange(3)
        >>> print(ringjax.Causal().allowed(i[:, None], i[None]).astype(int))
        [[1 0 0]
         [1 1 0]
         [1 1 1]]
    """

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """True where the key stands at or before the query."""
        return kv_position <= q_position

    def bounds(self, q_min, q_max, kv_min, kv_max):
        """Whether the last query sees the first key, and whether the first query sees the last."""
        return kv_min <= q_max, kv_max <= q_min

    def is_exact(self, *, consecutive: bool) -> bool:
        """On any block."""
        return True


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """Query i attends to keys i - left ≤ j ≤ i + right.

    The causal window of w tokens, the query's own among them, is `SlidingWindow(w - 1)`. What
    `jax.nn.dot_product_attention(local_window_size=(l, r))` means is `SlidingWindow(l, r)`.

    Attributes:
        left: how many keys before its own position a query sees; None means all of them.
        right: how many after it; None means all of them.

    Raises:
        ValueError: a count is neither None nor an integer from 0 to 2³¹ - 1.

    Example:
        >>> import numpy as np, ringjax
        >>> i = np.arange(4)
        >>> print(ringjax.SlidingWindow(1).allowed(i[:, None], i[None]).astype(int))
        [[1 0 0 0]
         [1 1 0 0]
         [0 1 1 0]
         [0 0 1 1]]

    References:
        Beltagy, Peters and Cohan, "Longformer", arXiv:2004.05150, §3.1.
    """

    left: int | None
    right: int | None = 0

    def __post_init__(self):
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                _as_count(
                    self,
                    name,
                    least=0,
                    hint="or None for no limit. The causal window of w tokens is SlidingWindow(w - 1)",
                )

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """True where the key is near enough to the query."""
        behind = q_position - kv_position
        return self._reaches(behind, behind)

    def bounds(self, q_min, q_max, kv_min, kv_max):
        """Whether the window meets the distances between the blocks, and whether it holds them all."""
        least, most = q_min - kv_max, q_max - kv_min
        return self._reaches(least, most), self._reaches(most, least)

    def is_exact(self, *, consecutive: bool) -> bool:
        """On blocks of consecutive positions."""
        return consecutive

    def _reaches(self, backward, forward):
        """Whether `backward` is not too far behind the query, and `forward` not too far ahead."""
        left = LAST_POSITION if self.left is None else self.left
        right = LAST_POSITION if self.right is None else self.right
        return (backward <= left) & (forward >= -right)


@dataclasses.dataclass(frozen=True)
class PrefixLM(Mask):
    """Causal, but every query attends to the whole prefix: keys j ≤ i or j < prefix_length.

    Attributes:
        prefix_length: number of tokens at the start that attend to one another in both directions.

    Raises:
        ValueError: `prefix_length` is no integer from 0 to 2³¹ - 1.

    Example:
        >>> import numpy as np, ringjax
        >>> i = np.arange(4)
        >>> print(ringjax.PrefixLM(2).allowed(i[:, None], i[None]).astype(int))
        [[1 1 0 0]
         [1 1 0 0]
         [1 1 1 0]
         [1 1 1 1]]

    References:
        Raffel et al., "T5", arXiv:1910.10683, §3.2.1.
    """

    prefix_length: int

    def __post_init__(self):
        _as_count(self, "prefix_length", least=0)

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """True where the key stands at or before the query, or in the prefix."""
        return (kv_position <= q_position) | (kv_position < self.prefix_length)

    def bounds(self, q_min, q_max, kv_min, kv_max):
        """Whether the first key is in the prefix or before the last query; then the last and the first."""
        some = (kv_min <= q_max) | (kv_min < self.prefix_length)
        return some, (kv_max <= q_min) | (kv_max < self.prefix_length)

    def is_exact(self, *, consecutive: bool) -> bool:
        """On blocks of consecutive positions."""
        return consecutive


@dataclasses.dataclass(frozen=True)
class ChunkedLocal(Mask):
    """Query i attends to the keys in its own chunk: i // chunk_size = j // chunk_size.

    Looks ahead within the chunk; `Causal() & ChunkedLocal(8192)` is what Llama 4's local layers do.

    Attributes:
        chunk_size: tokens in a chunk; the first starts at position 0.

    Raises:
        ValueError: `chunk_size` is no integer from 1 to 2³¹ - 1.

    Example:
        >>> import numpy as np, ringjax
        >>> i = np.arange(4)
        >>> mask = ringjax.Causal() & ringjax.ChunkedLocal(2)
        >>> print(mask.allowed(i[:, None], i[None]).astype(int))
        [[1 0 0 0]
         [1 1 0 0]
         [0 0 1 0]
         [0 0 1 1]]
    """

    chunk_size: int

    def __post_init__(self):
        _as_count(self, "chunk_size", least=1)

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """True where both stand in one chunk."""
        return q_position // self.chunk_size == kv_position // self.chunk_size

    def bounds(self, q_min, q_max, kv_min, kv_max):
        """Whether the blocks reach into a chunk in common, and whether both lie in one and the same."""
        q_first, q_last = q_min // self.chunk_size, q_max // self.chunk_size
        kv_first, kv_last = kv_min // self.chunk_size, kv_max // self.chunk_size
        some = (q_first <= kv_last) & (kv_first <= q_last)
        return some, (q_first == kv_last) & (kv_first == q_last) & (q_first == q_last)

    def is_exact(self, *, consecutive: bool) -> bool:
        """On blocks of consecutive positions."""
        return consecutive


def _all_unknown(q_min, q_max, kv_min, kv_max):
    """Bounds of a rule that can only be asked token by token."""
    return q_min <= q_max, False


@dataclasses.dataclass(frozen=True)
class MaskFn(Mask):
    """Query attends to key where `fn(q_position, kv_position)` is True.

    Two of them are equal, and share a compiled program, if their functions are the same object: define
    the function once, not in the call. Without `bounds` every rank meets every shard, for the schedule
    cannot look into the function. No block is computed in vain all the same: a kernel evaluates the rule
    on a block before it does the work, and skips what holds no pair. What depends on more than positions,
    such as documents, belongs into `segment_ids`.

    Attributes:
        fn: takes int32 positions of queries and of keys that broadcast against each other, and returns
            booleans. It is traced, so it uses operators and `jnp` rather than `if`, `and` or `or`; it closes
            over no traced arrays. What it says about padding (position -1) is not heard.
        bounds: `bounds(q_min, q_max, kv_min, kv_max)`, as in `Mask.bounds`: whether (some, every) pair of two
            blocks attends. `some` must be True if any pair does, `every` False if any pair does not. It is
            called with NumPy arrays on the host and with JAX's under a trace.

    Raises:
        ValueError: `fn` or `bounds` is no hashable function; or, when it is called, `fn` returns anything
            but booleans of the shape that its arguments broadcast to.

    Example:
        >>> import numpy as np, ringjax
        >>> def every_other(q_position, kv_position):
        ...     return (q_position - kv_position) % 2 == 0
        >>> i = np.arange(4)
        >>> mask = ringjax.Causal() & ringjax.MaskFn(every_other)
        >>> print(mask.allowed(i[:, None], i[None]).astype(int))
        [[1 0 0 0]
         [0 1 0 0]
         [1 0 1 0]
         [0 1 0 1]]
    """

    fn: Callable[[Any, Any], Any]
    bounds: Any = None

    def __post_init__(self):
        if self.bounds is None:
            object.__setattr__(self, "bounds", _all_unknown)
        for name in ("fn", "bounds"):
            value = getattr(self, name)
            if not callable(value) or not _is_hashable(value):
                raise ValueError(
                    f"MaskFn({name}={value!r}): {name} must be a hashable function, such as one made by def."
                )

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """What the function says, in the shape that the positions broadcast to."""
        shape = jnp.broadcast_shapes(jnp.shape(q_position), jnp.shape(kv_position))
        result = self.fn(q_position, kv_position)
        name = f"MaskFn({getattr(self.fn, '__name__', self.fn)})"
        dtype = getattr(result, "dtype", type(result))
        if dtype not in (bool, np.bool_):
            raise ValueError(
                f"{name}: the function returned {getattr(dtype, '__name__', dtype)}; it must return "
                f"booleans, True where the query attends to the key. Compare, say with != 0."
            )
        if not _broadcasts_to(jnp.shape(result), shape):
            raise ValueError(
                f"{name}: for positions of shape {jnp.shape(q_position)} and {jnp.shape(kv_position)} the "
                f"function returned shape {jnp.shape(result)}; it must return {shape}, one for each pair."
            )
        return jnp.broadcast_to(result, shape)


@dataclasses.dataclass(frozen=True)
class Both(Mask):
    """Where both masks attend; written `a & b`."""

    first: Mask
    second: Mask

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        return self.first.allowed(q_position, kv_position) & self.second.allowed(q_position, kv_position)

    def bounds(self, q_min, q_max, kv_min, kv_max):
        first = self.first.bounds(q_min, q_max, kv_min, kv_max)
        second = self.second.bounds(q_min, q_max, kv_min, kv_max)
        return first[0] & second[0], first[1] & second[1]

    def is_exact(self, *, consecutive: bool) -> bool:
        """Where both are, and the two are conditions on the distance between query and key alone."""
        on_distance = all(isinstance(mask, Causal | SlidingWindow) for mask in (self.first, self.second))
        return on_distance and consecutive


@dataclasses.dataclass(frozen=True)
class Either(Mask):
    """Where one of two masks attends, or both; written `a | b`."""

    first: Mask
    second: Mask

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        return self.first.allowed(q_position, kv_position) | self.second.allowed(q_position, kv_position)

    def bounds(self, q_min, q_max, kv_min, kv_max):
        # The two may cover a block between them, neither alone: then `every` is False, and no harm done.
        first = self.first.bounds(q_min, q_max, kv_min, kv_max)
        second = self.second.bounds(q_min, q_max, kv_min, kv_max)
        return first[0] | second[0], first[1] | second[1]


def _as_count(mask: Mask, name: str, *, least: int, hint: str = "") -> None:
    """Makes a field of a spec a Python integer, so that NumPy's neither promote nor differ in hash."""
    value = getattr(mask, name)
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or not least <= count <= LAST_POSITION:
        raise ValueError(
            f"{type(mask).__name__}({name}={value!r}): {name} must be an integer from {least} to "
            f"{LAST_POSITION}{', ' if hint else ''}{hint}."
        )
    object.__setattr__(mask, name, count)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _broadcasts_to(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, wanted) == wanted
    except ValueError:
        return False


class Tokens(NamedTuple):
    """Where the tokens of one side stand; the leading axis is the batch, or 1 for all of it.

    Attributes:
        positions: global positions; -1 marks padding, which attends to nothing and is not attended to.
        segments: document ids, or None; tokens attend only within their own.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None = None

    def take(self, start: jax.Array, size: int) -> Self:
        """The `size` tokens from `start` on."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1), self)


def attends(mask: Mask, q: Tokens, kv: Tokens) -> Bool[Array, "B T S"]:
    """The rule in full, token by token: positions, padding and segments."""
    q = jax.tree.map(lambda x: x[..., :, None], q)
    return attends_pairwise(mask, q, jax.tree.map(lambda x: x[..., None, :], kv))


def attends_pairwise(mask: Mask, q: Tokens, kv: Tokens) -> Bool[Array, "..."]:
    """The same of tokens whose arrays broadcast against each other, on whichever axes these stand."""
    result = mask.allowed(q.positions, kv.positions) & (q.positions >= 0) & (kv.positions >= 0)
    if q.segments is not None and kv.segments is not None:
        result &= q.segments == kv.segments
    return result


def verdicts(mask: Mask, q: Tokens, kv: Tokens) -> Int[Array, "B nq nk"]:
    """EMPTY, PARTIAL or FULL for each pair of blocks, from their minima and maxima alone.

    Args:
        q: the query side in blocks: positions and segments are `B nq block`.
        kv: the key side, `B nk block`.
    """
    q_padded, kv_padded = q.positions < 0, kv.positions < 0
    q_low, q_high = (x[..., :, None] for x in _extremes(q.positions, q_padded))
    kv_low, kv_high = (x[..., None, :] for x in _extremes(kv.positions, kv_padded))
    some, every = mask.bounds(q_low, q_high, kv_low, kv_high)
    every &= ~(q_padded.any(axis=-1)[..., :, None] | kv_padded.any(axis=-1)[..., None, :])
    # A block of nothing but padding has its extremes crossed.
    some &= q_low <= q_high
    some &= kv_low <= kv_high
    if q.segments is not None and kv.segments is not None:
        first, last = (x[..., :, None] for x in _extremes(q.segments, q_padded))
        kv_first, kv_last = (x[..., None, :] for x in _extremes(kv.segments, kv_padded))
        some &= (first <= kv_last) & (kv_first <= last)
        every &= (first == last) & (kv_first == kv_last) & (first == kv_first)
    verdict = jnp.where(every, jnp.int32(FULL), jnp.int32(PARTIAL))
    return jnp.where(some, verdict, jnp.int32(EMPTY))


def _extremes(
    x: Int[Array, "B n block"], padded: Bool[Array, "B n block"]
) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """Smallest and largest of each block, padding left out."""
    big = jnp.iinfo(jnp.int32).max
    return jnp.where(padded, big, x).min(axis=-1), jnp.where(padded, -big, x).max(axis=-1)
