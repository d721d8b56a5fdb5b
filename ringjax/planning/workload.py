"""What is to be planned: one attention call, a way to distribute it, and what a device then holds."""

import dataclasses
import functools as ft
import math
from typing import Any, Literal, get_args

import numpy as np

from .. import layouts
from ..layouts import Layout
from ..masks import Causal, Full, Mask, SlidingWindow
from ..ring import Ring
from ..schedule import Schedule, make_schedule

__all__ = ["Choice", "Dtype", "Payload", "Shard", "StrategyName", "Workload", "attended_pairs"]

StrategyName = Literal["ring", "ring_q", "all_gather", "ulysses", "usp", "double_ring"]
Payload = Literal["bfloat16", "int8", "float8"]
Dtype = Literal["bfloat16", "float16", "float32"]

F32 = 4
ITEM_SIZES: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": F32}
COUNTS = (
    "batch",
    "tokens",
    "kv_tokens",
    "heads",
    "kv_heads",
    "head_dim",
    "value_dim",
    "window",
    "latent_dim",
)
MAX_DEVICES = 1024
MOST_TOKENS = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One attention call, of a whole sequence.

    Attributes:
        batch: B.
        tokens: T, queries.
        kv_tokens: S, keys; None means as many.
        heads: N.
        kv_heads: K; None means as many.
        head_dim: H.
        value_dim: Hv; None means H.
        dtype: of query, key and value.
        causal: whether a query sees only the keys up to its own position.
        window: how many keys it sees of those, its own included; None means all.
        payload: the form in which keys and values travel; None means as they are.
        latent_dim: R of multi-head latent attention, whose compressed latent travels in their stead and is
            expanded on arrival; None means plain attention.
        rotary_dim: Hr, what H has beside the expanded key; the rotary key travels with the latent.

    Raises:
        ValueError: a count that is no integer or below 1, heads that do not divide, a window without
            `causal`, a latent with a payload or without a rotary size below H, an unknown name.
    """

    batch: int = 1
    tokens: int
    kv_tokens: int | None = None
    heads: int
    kv_heads: int | None = None
    head_dim: int
    value_dim: int | None = None
    dtype: Dtype = "bfloat16"
    causal: bool = True
    window: int | None = None
    payload: Payload | None = None
    latent_dim: int | None = None
    rotary_dim: int = 0

    def __post_init__(self):
        for name in COUNTS:
            if (value := getattr(self, name)) is None:
                continue
            require_integer(name, value)
            if value < 1:
                raise ValueError(f"{name}={value}: give at least 1.")
            if value >= MOST_TOKENS:
                raise ValueError(f"{name}={value}: positions are int32, so give less than {MOST_TOKENS:,}.")
        if self.heads % self.num_kv_heads:
            raise ValueError(
                f"heads={self.heads} does not divide by kv_heads={self.kv_heads}: each key/value head serves "
                f"equally many query heads."
            )
        if self.window is not None and not self.causal:
            raise ValueError(
                f"window={self.window} without causal: a window counts the keys up to the query's own. Say "
                f"causal=True, or leave the window out."
            )
        require_one_of("causal", self.causal, (True, False))
        require_one_of("dtype", self.dtype, get_args(Dtype))
        if self.payload is not None:
            require_one_of("payload", self.payload, get_args(Payload))
        self._check_latent()

    def _check_latent(self) -> None:
        require_integer("rotary_dim", self.rotary_dim)
        if self.latent_dim is None and self.rotary_dim:
            raise ValueError(
                f"rotary_dim={self.rotary_dim} is what travels beside a latent: give latent_dim too."
            )
        if self.latent_dim is not None and not 0 <= self.rotary_dim < self.head_dim:
            raise ValueError(
                f"rotary_dim={self.rotary_dim}: a part of head_dim={self.head_dim}, whose rest is expanded "
                f"from the latent. Give 0 to {self.head_dim - 1}."
            )
        if self.latent_dim is not None and self.payload is not None:
            raise ValueError(
                f"payload={self.payload!r} with latent_dim: the latent is what travels; give one."
            )

    @property
    def num_keys(self) -> int:
        """S."""
        return self.kv_tokens or self.tokens

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.kv_heads or self.heads

    @property
    def value_size(self) -> int:
        """Hv."""
        return self.value_dim or self.head_dim

    @property
    def mask(self) -> Mask:
        """The mask spec of `causal` and `window`."""
        if self.window is not None:
            return SlidingWindow(self.window - 1)
        return Causal() if self.causal else Full()

    @property
    def pairs(self) -> int:
        """How many pairs of a query and a key attend, in one head."""
        return int(attended_pairs(self.mask, "contiguous", 1, self.tokens, self.num_keys).sum())

    def shard(self, choice: "Choice") -> "Shard":
        """What one device holds of it, lengths rounded up to the layout's multiple."""
        return Shard(
            batch=self.batch,
            queries=_shard_length(self.tokens, choice),
            keys=_shard_length(self.num_keys, choice),
            heads=self.heads,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_size,
            item_size=ITEM_SIZES[self.dtype],
            payload=self.payload,
            latent_dim=self.latent_dim,
            rotary_dim=self.rotary_dim,
        )


def require_one_of(name: str, value: object, choices: tuple) -> None:
    """Refuses what is not among the choices, and names them."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def require_integer(name: str, value: object) -> None:
    """Refuses what is no integer."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r}: give an integer.")


def _shard_length(length: int, choice: "Choice") -> int:
    runs = layouts.chunks(choice.layout)
    return -(-length // (choice.devices * runs)) * runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A way to distribute a call.

    Attributes:
        strategy: what travels.
        devices: over how many devices the sequence is split, P.
        inner: size of the inner axis, whose devices are neighbours: the all-to-all of `usp` and `ulysses`,
            the inner ring of `double_ring`; 1 for the others.
        layout: which tokens a rank holds.
        bidirectional: whether both ways round are taken in lock step.
        head_groups: in how many parts `all_gather` gathers.
    """

    strategy: StrategyName
    devices: int
    inner: int = 1
    layout: Layout = "contiguous"
    bidirectional: bool = False
    head_groups: int = 1

    @property
    def outer(self) -> int:
        """Size of the outer axis, R: of the ring, where there is one."""
        return self.devices // self.inner

    @property
    def axes(self) -> dict[str, int]:
        """Names and sizes of the mesh axes that `ring` wants: one, or two of which the second is `inner`."""
        if self.strategy in ("usp", "double_ring"):
            return {"outer": self.outer, "inner": self.inner}
        return {"ring": self.devices}

    def ring(self, **fields: Any) -> Ring:
        """The choice as a `Ring` over `axes`; `fields` are further ones of it, such as `payload`."""
        return Ring(
            tuple(self.axes),
            strategy=self.strategy,
            layout=self.layout,
            bidirectional=self.bidirectional,
            head_groups=self.head_groups,
            **fields,
        )

    @property
    def label(self) -> str:
        """In words, as a table shows it."""
        match self.strategy:
            case "usp" | "double_ring":
                split = f" {self.outer}×{self.inner}"
            case "all_gather" if self.head_groups > 1:
                split = f"/{self.head_groups}"
            case _:
                split = " both ways" if self.bidirectional else ""
        return f"{self.strategy}{split}, {self.layout}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Lengths on one device, and the bytes of the arrays that it holds or sends."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    item_size: int
    payload: Payload | None
    latent_dim: int | None = None
    rotary_dim: int = 0

    @property
    def q_items(self) -> int:
        """Elements of q: B t N H."""
        return self.batch * self.queries * self.heads * self.head_dim

    @property
    def out_items(self) -> int:
        """Elements of the output: B t N Hv."""
        return self.batch * self.queries * self.heads * self.value_dim

    @property
    def kv_items(self) -> int:
        """Elements of fused keys and values: B K c (H + Hv)."""
        return self.batch * self.keys * self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def wire_items(self) -> int:
        """Elements of what travels, and of its gradient: keys and values, or B c (R + Hr) of latents."""
        if self.latent_dim is None:
            return self.kv_items
        return self.batch * self.keys * (self.latent_dim + self.rotary_dim)

    @property
    def expansion_items(self) -> int:
        """Elements of the two arrays that expand a latent: R K Hk and R K Hv."""
        if self.latent_dim is None:
            return 0
        return self.latent_dim * self.kv_heads * (self.head_dim - self.rotary_dim + self.value_dim)

    @property
    def given(self) -> int:
        """Bytes of keys and values as a call brings them: themselves, or latents."""
        return self.wire_items * self.item_size

    @property
    def decoded(self) -> int:
        """Bytes of keys and values as they come out of a payload, where that is not what was given."""
        return self.kv if self.payload in ("int8", "float8") or self.latent_dim is not None else 0

    @property
    def expanded(self) -> int:
        """Bytes of the float32 that a latent is expanded in, and that its gradient is pulled back in."""
        return 0 if self.latent_dim is None else F32 * self.kv_items

    @property
    def q(self) -> int:
        """Bytes of q."""
        return self.q_items * self.item_size

    @property
    def out(self) -> int:
        """Bytes of the output."""
        return self.out_items * self.item_size

    @property
    def kv(self) -> int:
        """Bytes of keys and values."""
        return self.kv_items * self.item_size

    @property
    def k(self) -> int:
        """Bytes of keys alone."""
        return self.kv * self.head_dim // (self.head_dim + self.value_dim)

    @property
    def statistics(self) -> int:
        """Bytes of the log-sum-exp, float32."""
        return F32 * self.batch * self.queries * self.heads

    @property
    def kv_sent(self) -> int:
        """Bytes of keys and values as they travel.

        int8 and float8 take a byte per element, and two float32 scales per token and head, the key's and the
        value's.
        """
        match self.payload:
            case None:
                return self.given
            case "bfloat16":
                return self.kv_items * min(2, self.item_size)
            case "int8" | "float8":
                return self.kv_items + 2 * F32 * self.batch * self.keys * self.kv_heads

    def split_by_heads(self, size: int) -> "Shard":
        """After an all-to-all: `size` times the tokens, and 1/size of the heads."""
        return dataclasses.replace(
            self,
            queries=self.queries * size,
            keys=self.keys * size,
            heads=self.heads // size,
            kv_heads=self.with_repeated_kv_heads(size).kv_heads // size,
        )

    def with_repeated_kv_heads(self, size: int) -> "Shard":
        """Key and value heads repeated until they divide over `size` devices."""
        return dataclasses.replace(self, kv_heads=math.lcm(self.kv_heads, size))


# ---------------------------------------------------------------- who meets whom


@ft.lru_cache(maxsize=32)
def attended_pairs(
    mask: Mask, layout: Layout, ring_size: int, q_shard: int, kv_shard: int, tile: tuple[int, int] = (1, 1)
) -> np.ndarray:
    """How many pairs of tokens attend where rank r meets the shard of rank (r - o) mod P.

    int64 `P P`, by r and o. Padding counts as tokens. `mask` is one that `Workload.mask` makes. Exact for a
    tile of one by one; for larger ones the pairs of all tiles that hold an attended one, on average over the
    rows of a tile.
    """
    match mask:
        case SlidingWindow(left=left):
            pass
        case _:
            left = None
    ranks = np.arange(ring_size)
    pairs = np.zeros((ring_size, ring_size), np.int64)
    for offset in range(ring_size):
        for q_run in layouts.runs(layout, ranks, ring_size, q_shard):
            for kv_run in layouts.runs(layout, (ranks - offset) % ring_size, ring_size, kv_shard):
                if isinstance(mask, Full):
                    pairs[:, offset] += q_run.size * kv_run.size
                    continue
                # Key b of its run is visible to query a of its own where b - a <= (start - start) / step.
                ahead = q_run.start - kv_run.start
                last = ahead // q_run.step
                before = None if left is None else (ahead - left - 1) // q_run.step
                sizes = q_run.size, kv_run.size
                rows, columns = min(tile[0], sizes[0]), min(tile[1], sizes[1])
                # Tiles begin at multiples of their columns; from a row in the middle, these are so far away.
                first = None if before is None else columns * ((before + 1) // columns) - (rows + 1) // 2
                end = columns * ((last + rows - 1) // columns + 1) - (rows + 1) // 2
                counted = _pairs_between(first, end, *sizes)
                pairs[:, offset] += np.where(_pairs_between(before, last, *sizes) > 0, counted, 0)
    pairs.flags.writeable = False
    return pairs


def _pairs_between(least: np.ndarray | None, most: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """How many (a, b), a < rows, b < columns, have least < b - a <= most."""
    pairs = _pairs_up_to(most, rows, columns)
    return pairs if least is None else pairs - _pairs_up_to(least, rows, columns)


def _pairs_up_to(most: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """How many (a, b), a < rows, b < columns, have b - a <= most."""

    def summed(last: np.ndarray) -> np.ndarray:
        """The sum over n <= last of n, bounded by 0 and by the columns."""
        inside = np.clip(last, 0, columns)
        return inside * (inside + 1) // 2 + np.maximum(last - columns, 0) * columns

    # Row a has most + a + 1 of them, within bounds.
    most = np.asarray(most, np.int64)
    return summed(most + rows) - summed(most)


def ring_schedule(workload: Workload, choice: Choice) -> Schedule:
    """The hops of the ring: of the outer axis, where there is an inner one."""
    shard = workload.shard(choice)
    return make_schedule(
        workload.mask,
        choice.layout,
        choice.devices,
        shard.queries,
        shard.keys,
        group=choice.inner,
        bidirectional=choice.bidirectional,
    )


def visits(schedule: Schedule) -> list[tuple[int, ...]]:
    """The offsets met at each step: the own one, then those of all legs in lock step."""
    return [(0,), *(tuple(leg[i] for leg in schedule.legs if i < len(leg)) for i in range(schedule.steps))]
