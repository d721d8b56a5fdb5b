"""The attention that every contender of `ringjax bench attention` computes, and what is known of it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, get_args

import ml_dtypes
import numpy as np
from jaxtyping import Float

from ...kernels import KernelName
from ...layouts import Layout

__all__ = ["PASSES", "Dtype", "Pass", "Problem"]

Array = np.ndarray
Dtype = Literal["float32", "bfloat16", "float16"]
Pass = Literal["forward", "forward_backward"]
PASSES: tuple[Pass, ...] = get_args(Pass)

# Forward: q kᵀ and p v. Backward: q kᵀ again, dout vᵀ, pᵀ dout, ds k and dsᵀ q.
MATMULS: dict[Pass, int] = {"forward": 2, "forward_backward": 7}
# Of its keys, the check against float64 holds so many at once.
ROWS_AT_ONCE = 65_536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Causal attention of one sequence to itself.

    Attributes:
        tokens: T and S.
        heads: N.
        kv_heads: K.
        head_dim: H.
        devices: over how many devices the sequence is split, where a contender splits it.
        layout: which tokens a rank of the ring holds.
        window: how many tokens each one sees, itself included; None means all before it.
        dtype: of q, k and v.
        kernel: of the ring.
        platform: of the devices, in JAX's words.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    devices: int
    layout: Layout
    window: int | None
    dtype: Dtype
    kernel: KernelName | Literal["auto"] = "auto"
    platform: str = "cpu"

    @property
    def numpy_dtype(self) -> np.dtype:
        """`dtype`, bfloat16 included."""
        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))

    @property
    def on_cpu(self) -> bool:
        """Whether devices are simulated, all on one processor."""
        return self.platform == "cpu"

    @property
    def on_cudnn(self) -> bool:
        """Whether `jax.nn.dot_product_attention` can be cuDNN's."""
        return self.platform == "gpu" and self.dtype != "float32"

    @property
    def bound_dtype(self) -> Dtype:
        """Of the matrix product whose rate gives the bound: few processors have any but float32."""
        return "float32" if self.on_cpu else self.dtype

    @property
    def num_pairs(self) -> int:
        """How many pairs of a query and a key attend."""
        width = min(self.window or self.tokens, self.tokens)
        return width * (width + 1) // 2 + (self.tokens - width) * width

    def flop(self, kind: Pass) -> int:
        """Operations of the matrix products, over attended pairs only: half of each, under a causal mask."""
        return MATMULS[kind] * 2 * self.head_dim * self.heads * self.num_pairs

    def square_bytes(self, kind: Pass) -> int:
        """What T × S matrices take where they exist: logits and probabilities, and the gradient of one."""
        squares = 2 if kind == "forward" else 3
        return squares * 4 * self.heads * self.tokens**2

    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """q, k, v and dout, `1 T N|K H` in natural order: standard normal, the same in every process."""
        rng = np.random.default_rng(0)
        shape = (1, self.tokens, self.heads, self.head_dim)
        kv_shape = (1, self.tokens, self.kv_heads, self.head_dim)
        q, k, v, dout = (
            rng.standard_normal(x, np.float32).astype(self.numpy_dtype, copy=False)
            for x in (shape, kv_shape, kv_shape, shape)
        )
        return q, k, v, dout

    def random_rows(self, count: int) -> list[tuple[int, int]]:
        """(position, head) of rows to check, all different."""
        chosen = np.random.default_rng(1).choice(self.tokens * self.heads, count, replace=False)
        return [divmod(int(i), self.heads) for i in chosen]

    def exact_rows(
        self, q: Array, k: Array, v: Array, rows: Sequence[tuple[int, int]]
    ) -> Float[Array, "rows H"]:
        """Rows of the output in float64, from the whole k and v, a row at a time."""
        return np.stack([self._exact_row(q[0, i, n], k[0], v[0], i, n) for i, n in rows])

    def _exact_row(
        self,
        q: Float[Array, "H"],
        k: Float[Array, "S K H"],
        v: Float[Array, "S K H"],
        position: int,
        head: int,
    ) -> Float[Array, "H"]:
        start, stop = max(0, position + 1 - (self.window or self.tokens)), position + 1
        kv_head = head // (self.heads // self.kv_heads)
        blocks = [slice(first, min(first + ROWS_AT_ONCE, stop)) for first in range(start, stop, ROWS_AT_ONCE)]
        scaled = q.astype(np.float64) / math.sqrt(self.head_dim)
        logits = np.concatenate([k[block, kv_head].astype(np.float64) @ scaled for block in blocks])
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        row = np.zeros(v.shape[-1])
        for block in blocks:
            row += weights[block.start - start : block.stop - start] @ v[block, kv_head].astype(np.float64)
        return row
