"""What a flash kernel on a GPU is told: how shards are cut, which block pairs it visits, how it is launched.

Nothing here depends on the language that such a kernel is written in.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ..masks import Tokens
from .base import Blocks, BlockSizes, Device, Tile, Visits, in_order, verdict_table

__all__ = ["Cut", "Launch", "PassName", "Tables", "chip_of", "launch_of", "padded_head"]

# The least that a tensor core multiplies, on each side.
SMALLEST = 16


def power_of_two(size: int) -> int:
    """The largest power of two that is at most `size`."""
    return 1 << (size.bit_length() - 1)


def padded_head(size: int) -> int:
    """The head size that a kernel computes with: tiles are powers of two."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


class Cut(NamedTuple):
    """How a shard is cut into blocks whose size is a power of two.

    Like `base.Blocks`, whose last block of a run ends with it and may overlap, so that nothing outside
    a shard is ever read. Only a shard of fewer than 16 tokens is shorter than its block.

    Attributes:
        size: tokens in a block.
        length: tokens in the shard.
        run: tokens in a run, which no block leaves.
    """

    size: int
    length: int
    run: int

    @classmethod
    def of(cls, length: int, wanted: int, runs: int = 1) -> "Cut":
        """Cuts each of `runs` equal runs into blocks of at most `wanted` tokens, but at least 16."""
        run = length // runs if length % runs == 0 and length // runs >= SMALLEST else length
        return cls(max(SMALLEST, power_of_two(min(wanted, run))), length, run)

    @property
    def is_short(self) -> bool:
        """Whether the only block reaches beyond the shard."""
        return self.length < self.size

    @property
    def per_run(self) -> int:
        """How many blocks there are in a run."""
        return -(-self.run // self.size)

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return self.length // self.run * self.per_run

    @property
    def blocks(self) -> Blocks:
        """As tables on the host."""
        block = np.arange(self.num_blocks, dtype=np.int32)
        owned = block // self.per_run * self.run + block % self.per_run * self.size
        return Blocks(self.size, np.minimum(owned, self._last(block // self.per_run)), owned)

    def places(self, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where a block begins, and where what belongs to it does, the rest being the one's before."""
        if self.run % self.size == 0 or self.is_short:
            start = block * jnp.int32(self.size)
            return start, start
        run = lax.div(block, jnp.int32(self.per_run))
        within = block - run * jnp.int32(self.per_run)
        owned = run * jnp.int32(self.run) + within * jnp.int32(self.size)
        return jnp.minimum(owned, self._last(run)), owned

    def _last(self, run):
        """Where the last block of a run begins."""
        return run * np.int32(self.run) + np.int32(max(self.run - self.size, 0))


class Tables(NamedTuple):
    """What is known of all block pairs.

    Attributes:
        q: queries in blocks, `B nq block`; those that an earlier block holds, and those past the end, are
            marked as padding.
        kv: keys likewise.
        rows: for each block of queries, which blocks of keys to visit.
        columns: for each block of keys, which blocks of queries.
        verdict: on each pair of blocks, `B nq nk`.
    """

    q: Tokens
    kv: Tokens
    rows: Visits
    columns: Visits
    verdict: jax.Array

    @classmethod
    def of(cls, tile: Tile, q: Cut, kv: Cut) -> "Tables":
        """From the one table of verdicts that all kernels share."""
        tile = dataclasses.replace(
            tile, q=_padded(tile.q, q), kv=_padded(tile.kv, kv), operands=_padded_mask(tile, q, kv)
        )
        verdict = verdict_table(tile, q.blocks, kv.blocks)
        return cls(
            q.blocks.of(tile.q),
            kv.blocks.of(tile.kv),
            in_order(verdict),
            in_order(jnp.swapaxes(verdict, 1, 2)),
            verdict,
        )


def _padded(tokens: Tokens, cut: Cut) -> Tokens:
    """Tokens of a shard that is shorter than its block, with padding."""
    missing = max(cut.size - cut.length, 0)
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, missing)), constant_values=-1), tokens)


def _padded_mask(tile: Tile, q: Cut, kv: Cut):
    """The operands, their mask long enough for a block of a shard that is shorter than it."""
    mask = tile.operands.mask
    if mask is None:
        return tile.operands
    missing = [max(cut.size - cut.length, 0) for cut in (q, kv)]
    widths = [(0, more if size > 1 else 0) for more, size in zip(missing, mask.shape[2:], strict=True)]
    return tile.operands._replace(mask=jnp.pad(mask, ((0, 0), (0, 0), *widths)))


# ---------------------------------------------------------------- launches


PassName = Literal["forward", "dq", "dkv", "dbias"]


class Pass(NamedTuple):
    """How one pass is launched.

    Attributes:
        warps: of a program.
        stages: how many loads are under way at once.
        blocks: its tile, where that is not the one of all passes.
        rich: how instead where logits are capped, biased or dropped, which takes registers.
    """

    warps: int
    stages: int = 2
    blocks: BlockSizes | None = None
    rich: "Pass | None" = None


class Launch(NamedTuple):
    """How the passes of a flash kernel are launched, and their tile: of one head, queries by keys."""

    block_sizes: BlockSizes
    forward: Pass
    dq: Pass
    dkv: Pass
    bias: Pass | None = None

    @property
    def dbias(self) -> Pass:
        """If nothing is said, as the gradient of the queries, of which it is a part."""
        return self.dq if self.bias is None else self.bias

    def of_pass(self, name: PassName, given: BlockSizes, *, rich: bool) -> tuple[BlockSizes, Pass]:
        """Tile and launch of a pass; a tile that is `given` and not this table's is kept."""
        how: Pass = getattr(self, name)
        how = how.rich if rich and how.rich is not None else how
        return how.blocks if how.blocks is not None and given == self.block_sizes else given, how


def launch_of(device: Device, dtype: DTypeLike, head_sizes: tuple[int, int]) -> Launch:
    """What was seen to compile without spills, by chip, dtype and the larger of H and Hv."""
    chip = chip_of(device)
    rows = HALF[chip] if jnp.dtype(dtype).itemsize <= 2 else FLOAT32 | FLOAT32_ELSE.get(chip, {})
    size = padded_head(max(head_sizes))
    return next((row for most, row in rows.items() if size <= most), rows[max(rows)])


Chip = Literal["ampere", "hopper", "blackwell"]


def chip_of(device: Device) -> Chip:
    """The generation of a GPU; one that is not known is taken for a Hopper."""
    chips: list[Chip] = [*(chip for part, chip in CHIPS.items() if part in device.kind), "hopper"]
    return chips[0]


# By parts of the name that JAX gives a device.
CHIPS: dict[str, Chip] = {
    "A100": "ampere", "A10": "ampere", "A6000": "ampere", "L4": "ampere", "RTX": "ampere",
    "H100": "hopper", "H200": "hopper", "GH200": "hopper",
    "B200": "blackwell", "B300": "blackwell",
}  # fmt: skip

# By up to which head size.
HALF: dict[Chip, dict[int, Launch]] = {
    "ampere": {
        64: Launch(BlockSizes(q=64, kv=32), forward=Pass(4), dq=Pass(8), dkv=Pass(8)),
        128: Launch(
            BlockSizes(q=64, kv=64),
            forward=Pass(4, rich=Pass(8)),
            dq=Pass(8),
            dkv=Pass(8),
            bias=Pass(8, blocks=BlockSizes(q=32, kv=32)),
        ),
        256: Launch(
            BlockSizes(q=64, kv=32),
            forward=Pass(8),
            dq=Pass(8),
            dkv=Pass(8),
            bias=Pass(8, blocks=BlockSizes(q=32, kv=32)),
        ),
    },
    # Those the fastest on an H100 of what compiles without spills, see README.
    "hopper": {
        64: Launch(
            BlockSizes(q=64, kv=64),
            forward=Pass(4, stages=3, blocks=BlockSizes(q=64, kv=128), rich=Pass(4, stages=3)),
            dq=Pass(4, stages=3, rich=Pass(4)),
            dkv=Pass(4),
            bias=Pass(8),
        ),
        128: Launch(
            BlockSizes(q=64, kv=64),
            forward=Pass(8, stages=3, blocks=BlockSizes(q=128, kv=128), rich=Pass(8)),
            dq=Pass(8, blocks=BlockSizes(q=128, kv=128), rich=Pass(4)),
            dkv=Pass(
                4,
                blocks=BlockSizes(q=32, kv=64),
                rich=Pass(8, blocks=BlockSizes(q=32, kv=64)),
            ),
            bias=Pass(4, blocks=BlockSizes(q=32, kv=64)),
        ),
        256: Launch(
            BlockSizes(q=64, kv=32),
            forward=Pass(8, blocks=BlockSizes(q=128, kv=64), rich=Pass(8)),
            dq=Pass(8, blocks=BlockSizes(q=64, kv=64), rich=Pass(8)),
            dkv=Pass(8, blocks=BlockSizes(q=128, kv=32), rich=Pass(8)),
            bias=Pass(8, blocks=BlockSizes(q=64, kv=16)),
        ),
    },
    "blackwell": {
        64: Launch(
            BlockSizes(q=64, kv=64),
            forward=Pass(4),
            dq=Pass(4),
            dkv=Pass(4, rich=Pass(8, blocks=BlockSizes(q=32, kv=64))),
        ),
        128: Launch(
            BlockSizes(q=64, kv=64),
            forward=Pass(8),
            dq=Pass(4),
            dkv=Pass(4, rich=Pass(8, blocks=BlockSizes(q=32, kv=64))),
            bias=Pass(8),
        ),
        256: Launch(
            BlockSizes(q=64, kv=64),
            forward=Pass(8, rich=Pass(8, blocks=BlockSizes(q=64, kv=32))),
            dq=Pass(8, rich=Pass(8, blocks=BlockSizes(q=64, kv=32))),
            dkv=Pass(8, blocks=BlockSizes(q=32, kv=64)),
            bias=Pass(8, blocks=BlockSizes(q=64, kv=32)),
        ),
    },
}

# No chip has tensor cores for it, and operands are held in registers.
FLOAT32: dict[int, Launch] = {
    64: Launch(
        BlockSizes(q=32, kv=32),
        forward=Pass(8, rich=Pass(8, blocks=BlockSizes(q=32, kv=16))),
        dq=Pass(8),
        dkv=Pass(8),
    ),
    128: Launch(
        BlockSizes(q=16, kv=16),
        forward=Pass(8),
        dq=Pass(8, blocks=BlockSizes(q=16, kv=32), rich=Pass(8)),
        dkv=Pass(
            8,
            stages=1,
            blocks=BlockSizes(q=32, kv=16),
            rich=Pass(8, stages=1, blocks=BlockSizes(q=16, kv=64)),
        ),
        bias=Pass(8, stages=1),
    ),
    256: Launch(
        BlockSizes(q=16, kv=16),
        forward=Pass(8),
        dq=Pass(
            8,
            stages=1,
            blocks=BlockSizes(q=32, kv=16),
            rich=Pass(8, stages=1, blocks=BlockSizes(q=16, kv=32)),
        ),
        dkv=Pass(8, stages=1, blocks=BlockSizes(q=16, kv=32)),
        bias=Pass(8, stages=1, blocks=BlockSizes(q=16, kv=64)),
    ),
}
# In place of an entry that spills there.
FLOAT32_ELSE: dict[Chip, dict[int, Launch]] = {
    "ampere": {256: FLOAT32[256]._replace(bias=Pass(4, stages=1, blocks=BlockSizes(q=16, kv=32)))},
}
