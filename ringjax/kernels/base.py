"""The contract of a kernel: one shard of queries meets one shard of keys and values.

A kernel is a module with three functions:

    forward(q, kv, tile, into)                         -> Partial, `into` and this shard's keys merged
    backward(q, kv, lse, delta, dout, tile, into)      -> Gradients, `into` and what this meeting adds
    supports(tile, dtype, platform, head_sizes)        -> None, or the reason why not; of H and Hv

with `q` and `dout` as `B T N H`, and keys and values fused on their last axis and head by head, `kv`
`B K S (H + Hv)`: the form in which they travel, so that no kernel needs a copy of a shard to take them apart,
and a block of keys is one piece of memory. `lse` and `delta` are the global ones,
`delta = sum(dout * out) - dlse`; delta and `dout` are 0 in rows that met no key, whose lse is -inf.
Accumulators are float32, or float64 for float64 inputs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from ..masks import EMPTY, FULL, PARTIAL, Mask, Tokens, attends, verdicts

__all__ = [
    "BlockSizes",
    "Device",
    "Gradients",
    "HeadSizes",
    "KernelName",
    "Operands",
    "Rule",
    "Tile",
    "Visits",
    "accumulator_dtype",
    "alone",
    "in_order",
    "vary_alike",
    "verdict_table",
    "visits",
]

KernelName = Literal["blockwise", "pallas", "cudnn", "tokamax"]
HeadSizes = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Tile of a kernel, in tokens: `q` queries (of every head in a group) by `kv` keys."""

    q: int = 256
    kv: int = 128

    def __post_init__(self):
        if self.q < 1 or self.kv < 1:
            raise ValueError(f"BlockSizes(q={self.q}, kv={self.kv}): both must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What a kernel runs on, in JAX's words: `platform` ("cpu", "gpu" ...) and `kind` ("NVIDIA H100 ...").

    Attributes:
        has_cudnn: whether it is here, and NVIDIA's cuDNN with it.
    """

    platform: str = "cpu"
    kind: str = "cpu"
    has_cudnn: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How logits become weights, as far as it is known before tracing.

    Attributes:
        mask: what may attend to what.
        scale: factor of the logits.
        soft_cap: logits are capped to `soft_cap * tanh(logits / soft_cap)`; None does not.
        bias_fn: a bias as a function, see `BiasFn`.
        dropout_rate: probability with which a weight is dropped.
        broadcast_dropout: whether that is alike in all heads and rows of the batch.
    """

    mask: Mask
    scale: float
    soft_cap: float | None = None
    bias_fn: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False


class Operands(NamedTuple):
    """What a call may bring beside queries, keys and values; None where it does not.

    Attributes:
        bias: added to the logits: this rank's queries, by the keys of all ranks in layout order (or, where
            queries travel, the queries of all ranks by this rank's keys).
        mask: True where a query attends to a key, likewise.
        bias_parameters: of the rule's `bias_fn`.
        sinks: a logit for each head that takes weight and gives no value; merged in outside the kernels.
        seed: of dropout.
    """

    bias: Float[Array, "#B #N #T #S_all"] | None = None
    mask: Bool[Array, "#B #N #T #S_all"] | None = None
    bias_parameters: Any = None
    sinks: Float[Array, "N"] | None = None
    seed: UInt32[Array, "3"] | None = None


class Gradients(NamedTuple):
    """Sums over what has been met so far, in the accumulators' dtype; None for what there is not."""

    dq: Float[Array, "B T N H"]
    dkv: Float[Array, "B K S HHv"]
    dbias: Float[Array, "#B #N #T #S_all"] | None = None
    dbias_parameters: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What one meeting of two shards is about, apart from q and kv.

    Attributes:
        q: positions and segments of the queries, `B T` or `1 T`.
        kv: of the keys, `B S` or `1 S`.
        operands: what else the call brought.
        q_start: which of the operands' queries is the first of this shard.
        kv_start: which of their keys is.
        batch_start: which row of the whole batch is this rank's first.
        head_start: which head of the whole model is this rank's first.
        rule: how logits become weights.
        block_sizes: tile of the kernel.
        device: what the kernel runs on.
        q_runs: into how many runs of consecutive tokens the queries fall; no block crosses from one to the
            next.
        kv_runs: likewise the keys.
        refine: whether verdicts from extremes alone may miss empty blocks, so that blocks are looked at.
    """

    q: Tokens
    kv: Tokens
    operands: Operands = dataclasses.field(default_factory=Operands)
    q_start: jax.Array | int = 0
    kv_start: jax.Array | int = 0
    batch_start: jax.Array | int = 0
    head_start: jax.Array | int = 0
    rule: Rule = dataclasses.field(metadata={"static": True})
    block_sizes: BlockSizes = dataclasses.field(metadata={"static": True})
    device: Device = dataclasses.field(default=Device(), metadata={"static": True})
    q_runs: int = dataclasses.field(default=1, metadata={"static": True})
    kv_runs: int = dataclasses.field(default=1, metadata={"static": True})
    refine: bool = dataclasses.field(default=True, metadata={"static": True})


class Visits(NamedTuple):
    """For each block of queries, which blocks of keys to visit: first PARTIAL, then FULL ones.

    Attributes:
        blocks: indices of the blocks of keys in order of work, `B nq nk`.
        partial: how many of them need the mask, `B nq`.
        total: how many hold any attended pair, `B nq`; those after are not visited.
    """

    blocks: Int[Array, "B nq nk"]
    partial: Int[Array, "B nq"]
    total: Int[Array, "B nq"]


def block_size(length: int, wanted: int) -> int:
    """The size at most `wanted` that cuts `length` into equally many, but evenly filled, blocks.

    The last block is moved back to end with the sequence, so what it shares with the one before it is
    computed in vain: 338 tokens make two blocks of 176 rather than of 256. Multiples of 16 suit every
    vector unit.
    """
    if length <= wanted:
        return length
    count = -(-length // wanted)
    even = -(-length // count)
    return min(-(-even // 16) * 16, wanted)


class Blocks(NamedTuple):
    """How a shard is cut into blocks of one size; the last block of a run ends with it, and may overlap.

    Attributes:
        size: tokens in a block.
        starts: where each block begins.
        owned: where what belongs to each block begins, the rest being the one's before.
    """

    size: int
    starts: np.ndarray
    owned: np.ndarray

    @classmethod
    def cut(cls, length: int, wanted: int, runs: int = 1) -> "Blocks":
        """Cuts each of `runs` equal runs into blocks of at most `wanted` tokens."""
        run = length // runs if length % runs == 0 else length
        size = block_size(run, wanted)
        owned = np.arange(0, run, size, dtype=np.int32)
        offsets = np.arange(0, length, run, dtype=np.int32)[:, None]
        starts = np.minimum(owned, np.int32(run - size))
        return cls(size, (offsets + starts).ravel(), (offsets + owned).ravel())

    def of(self, tokens: Tokens) -> Tokens:
        """`tokens` as `B blocks size`, those that an earlier block holds already marked as padding."""
        index = self.starts[:, None] + np.arange(self.size, dtype=np.int32)
        blocks: Tokens = jax.tree.map(lambda x: x[:, index], tokens)
        owned = (index >= self.owned[:, None])[None]
        return blocks._replace(positions=jnp.where(owned, blocks.positions, jnp.int32(-1)))


def visits(tile: Tile, q: Blocks, kv: Blocks) -> Visits:
    """What the verdicts on all block pairs mean for the order of work."""
    return in_order(verdict_table(tile, q, kv))


def verdict_table(tile: Tile, q: Blocks, kv: Blocks) -> Int[Array, "B nq nk"]:
    """EMPTY, PARTIAL or FULL for each pair of blocks, exactly."""
    verdict = verdicts(tile.rule.mask, q.of(tile.q), kv.of(tile.kv))
    return _refined(verdict, tile, q, kv) if tile.refine else verdict


def in_order(verdict: Int[Array, "B nq nk"]) -> Visits:
    """For each row of a verdict table, the order in which its columns are visited."""
    return Visits(
        blocks=jnp.argsort(verdict, axis=-1, stable=True).astype(jnp.int32),
        partial=(verdict == PARTIAL).sum(axis=-1, dtype=jnp.int32),
        total=(verdict != EMPTY).sum(axis=-1, dtype=jnp.int32),
    )


def _refined(verdict: Int[Array, "B nq nk"], tile: Tile, q: Blocks, kv: Blocks) -> Int[Array, "B nq nk"]:
    """Verdicts made exact: the rule is evaluated on every block pair that is PARTIAL by its extremes.

    One pass over these blocks that multiplies no matrix, and saves the blocks that turn out EMPTY.
    """
    q_tokens, kv_tokens = q.of(tile.q), kv.of(tile.kv)
    mask = tile.operands.mask
    if mask is not None:
        # Nothing is FULL until the caller's mask has been seen.
        verdict = jnp.broadcast_to(verdict, (max(verdict.shape[0], mask.shape[0]), *verdict.shape[1:]))
        verdict = jnp.where(verdict == FULL, jnp.int32(PARTIAL), verdict)
    shape = verdict.shape
    flat = verdict.ravel()
    candidates = jnp.argsort(flat, stable=True).astype(jnp.int32)

    def look(index, flat):
        at = candidates[index]
        batch, i, j = jnp.unravel_index(at, shape)
        pairs = attends(tile.rule.mask, pick(q_tokens, batch, i), pick(kv_tokens, batch, j))
        if mask is not None:
            starts = tile.q_start + jnp.asarray(q.starts)[i], tile.kv_start + jnp.asarray(kv.starts)[j]
            given = block_of(mask, batch, 0, *starts, (mask.shape[1], q.size, kv.size))
            some, every = (pairs & given.any(axis=0)).any(), (pairs & given.all(axis=0)).all()
        else:
            some, every = pairs.any(), pairs.all()
        exact = jnp.where(every, jnp.int32(FULL), jnp.where(some, jnp.int32(PARTIAL), jnp.int32(EMPTY)))
        return lax.dynamic_update_slice(flat, exact[None], (at,))

    count = (flat == PARTIAL).sum(dtype=jnp.int32)
    return lax.fori_loop(jnp.int32(0), count, look, flat).reshape(shape)


def pick(tokens: Tokens, batch: jax.Array, block: jax.Array) -> Tokens:
    """One block of tokens, of a row of the batch."""
    return jax.tree.map(lambda x: x[of_batch(x, batch), block], tokens)


def of_batch(table: jax.Array, batch: jax.Array) -> jax.Array:
    """Index into a table whose leading axis is the batch, or 1 for all of it."""
    return batch if table.shape[0] > 1 else jnp.zeros_like(batch)


def block_of(
    x: Array, batch: jax.Array, head: jax.Array | int, q_start: jax.Array, kv_start: jax.Array, sizes: tuple
) -> Array:
    """The block `heads queries keys` of a bias or mask, 1 on the axes where it is broadcast."""
    at, sizes = _block_index(x, batch, head, q_start, kv_start, sizes)
    return lax.dynamic_slice(x, at, sizes)[0]


def add_block(
    x: Array, block: Array, batch: jax.Array, head: jax.Array, q_start: jax.Array, kv_start: jax.Array
) -> Array:
    """`x` with `block` (`heads queries keys`) added to it, summed over the axes where `x` is broadcast."""
    at, sizes = _block_index(x, batch, head, q_start, kv_start, block.shape)
    summed = tuple(axis for axis in range(3) if sizes[axis + 1] == 1 and block.shape[axis] != 1)
    block = block.sum(axis=summed, keepdims=True)[None]
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, at, sizes) + block, at)


def _block_index(x, batch, head, q_start, kv_start, sizes) -> tuple[tuple, tuple]:
    at = [jnp.asarray(i, jnp.int32) for i in (batch, head, q_start, kv_start)]
    whole = [size > 1 for size in x.shape]
    at = tuple(i if kept else jnp.zeros_like(i) for i, kept in zip(at, whole, strict=True))
    return at, tuple(size if kept else 1 for size, kept in zip((1, *sizes), whole, strict=True))


def accumulator_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32 for everything up to float32, float64 for float64."""
    # Not promote_types, which refuses bfloat16 where the user has made promotion strict.
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def vary_alike(*trees):
    """The arrays given, all varying over the union of the mesh axes that any of them varies over.

    `shard_map` keeps track of which values differ between devices. A loop's carry must have one such type
    from the start, and casting the arguments here, outside the custom gradient, leaves the sum over a
    replicated argument's cotangents to JAX.
    """

    def axes_of(x):
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(axes_of, jax.tree.leaves(trees)))

    def vary(x):
        missing = tuple(sorted(axes - axes_of(x), key=str))
        return lax.pcast(x, missing, to="varying") if missing else x

    trees = jax.tree.map(vary, trees)
    return trees if len(trees) > 1 else trees[0]


def alone(call: Callable, platform: str, *arguments, custom_calls: tuple[str, ...] = ()):
    """`call(*arguments)`, lowered by itself inside a `shard_map`.

    Pallas' interpreter, other people's kernels, and the steps of a function traced elsewhere mix values that
    vary over a mesh with such that do not, which is refused where `shard_map` looks for that. `custom_calls`
    are those that the lowering may make.
    """
    arguments = vary_alike(arguments)
    like = jax.tree.leaves(arguments)[0]
    if not jax.typeof(like).manual_axis_type.varying:
        return call(*arguments)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    exported = export.export(
        jax.jit(call),
        platforms=["cpu" if platform == "cpu" else "cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(name) for name in custom_calls],
    )

    # What was exported knows no vmap: it is called for one after the other.
    @jax.custom_batching.sequential_vmap
    def lowered(*arguments):
        like = jax.tree.leaves(arguments)[0]
        return jax.tree.map(lambda x: vary_alike(x, like)[0], exported(*shapes).call(*arguments))

    return lowered(*arguments)


assert PARTIAL < FULL < EMPTY  # the order of work that `visits` sorts by
