"""What tests compare with: an oracle, masks from their definitions, tolerances, a reader of HLO.

Nothing here imports ringjax, and the oracle imports no library of attention: float64 NumPy, dense,
written from the mathematics. The alphabet is the package's: q `B T N H`, k `B S K H`, v `B S K Hv`,
out `B T N Hv`, lse `B T N`, mask and bias `B|1 N|1 T|1 S|1`, where N is a multiple of K and query
head n uses key head `n // (N // K)`.
"""

import math
import re
from collections import Counter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray

# ---------------------------------------------------------------- oracle


class _Scores(NamedTuple):
    q: Array  # B T N H
    k: Array  # B S N H: every query head has its own copy
    v: Array  # B S N Hv
    slope: Array  # B N T S: d capped / d uncapped
    probs: Array  # B N T S, before dropout
    factor: Array  # B N T S: what dropout multiplies them by
    sink_probs: Array  # B N T: what the sink takes
    lse: Array  # B N T
    scale: float
    num_kv_heads: int


def _scores(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    scale: float | None,
    softcap: float | None,
    sinks: Any,
    keep: Any,
    rate: float,
) -> _Scores:
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    num_kv_heads = k.shape[2]
    groups, rest = divmod(q.shape[2], num_kv_heads)
    assert rest == 0, f"{q.shape[2]} query heads over {num_kv_heads} key heads"
    k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale

    logits = scale * np.einsum("btnh,bsnh->bnts", q, k)
    if bias is not None:
        logits = logits + np.asarray(bias).astype(np.float64)
    slope = np.ones_like(logits)
    if softcap is not None:
        tanh = np.tanh(logits / softcap)
        logits, slope = softcap * tanh, 1.0 - tanh**2
    if mask is not None:
        mask = np.asarray(mask)
        assert mask.dtype == np.bool_, mask.dtype
        logits = np.where(mask, logits, -np.inf)
    sink_logits = np.broadcast_to(-np.inf if sinks is None else _as_bnt(sinks), logits.shape[:3])

    highest = np.maximum(logits.max(axis=-1, initial=-np.inf), sink_logits)
    highest = np.where(np.isneginf(highest), 0.0, highest)[..., None]
    weights, sink_weights = np.exp(logits - highest), np.exp(sink_logits - highest[..., 0])  # exp(-inf) = 0
    total = weights.sum(axis=-1) + sink_weights
    divide = lambda x, by: np.divide(x, by, out=np.zeros_like(x), where=by > 0)
    probs, sink_probs = divide(weights, total[..., None]), divide(sink_weights, total)
    with np.errstate(divide="ignore"):  # log(0) = -inf is what an empty row is to have
        lse = highest[..., 0] + np.log(total)
    factor = np.ones_like(probs)
    if keep is not None:
        factor = np.broadcast_to(np.asarray(keep) / (1.0 - rate), probs.shape)
    return _Scores(q, k, v, slope, probs, factor, sink_probs, lse, scale, num_kv_heads)


def _as_bnt(sinks: Any) -> Array:
    sinks = np.asarray(sinks).astype(np.float64)
    return sinks[None, :, None] if sinks.ndim == 1 else sinks


def oracle(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    keep: Any = None,
    rate: float = 0.0,
) -> tuple[Array, Array]:
    """`out, lse`: scale, then bias, then softcap, then mask, then softmax, then dropout; natural logarithms.

    A row that attends to nothing has output 0 and lse -inf, or that of its sink.

    Args:
      sinks: `N`, or `B|1 N T|1` with -inf where there is no query: logits of one more key, with value zero.
      keep: 0 or 1 for each weight, `B|1 N|1 T|1 S|1`; those kept are divided by `1 - rate`, and lse is not
        touched.
    """
    s = _scores(q, k, v, mask, bias, scale, softcap, sinks, keep, rate)
    return np.einsum("bnts,bsnh->btnh", s.probs * s.factor, s.v), s.lse.swapaxes(1, 2)


def oracle_grads(
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    dlse: Any = None,
    *,
    mask: Any = None,
    bias: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    keep: Any = None,
    rate: float = 0.0,
) -> tuple[Array, ...]:
    """`dq, dk, dv` of `sum(dout * out) + sum(dlse * lse)`, then `dbias` and `dsinks` if there are such.

    With z the masked logits, p = exp(z - lse), f what dropout multiplies by, out = (f p) v:
        d out / d z gives p (p̄ - sum(p p̄)) with p̄ = f (dout vᵀ),    d lse / d z gives p.
    A sink is a z of which p̄ is 0. A row that attends to nothing has p = 0, hence no gradient, whatever
    dout and dlse say.
    """
    s = _scores(q, k, v, mask, bias, scale, softcap, sinks, keep, rate)
    dout = np.asarray(dout).astype(np.float64)  # B T N Hv
    dprobs = s.factor * np.einsum("btnh,bsnh->bnts", dout, s.v)
    dlse = np.zeros_like(s.lse) if dlse is None else np.asarray(dlse).astype(np.float64).swapaxes(1, 2)
    along = dlse - (s.probs * dprobs).sum(axis=-1)  # B N T: what every logit of a row shares
    dlogits = s.probs * (dprobs + along[..., None]) * s.slope

    dq = s.scale * np.einsum("bnts,bsnh->btnh", dlogits, s.k)
    dk = _sum_groups(s.scale * np.einsum("bnts,btnh->bsnh", dlogits, s.q), s.num_kv_heads)
    dv = _sum_groups(np.einsum("bnts,btnh->bsnh", s.probs * s.factor, dout), s.num_kv_heads)
    grads = [dq, dk, dv]
    if bias is not None:
        grads.append(sum_to(dlogits, np.shape(bias)))
    if sinks is not None:
        dsinks = sum_to(s.sink_probs * along, _as_bnt(sinks).shape)
        grads.append(dsinks.reshape(np.shape(sinks)))
    return tuple(grads)


def _sum_groups(x: Array, num_kv_heads: int) -> Array:
    b, s, n, h = x.shape
    return x.reshape(b, s, num_kv_heads, n // num_kv_heads, h).sum(axis=3)


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of broadcasting `shape` to `x.shape`."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    stretched = tuple(i for i, size in enumerate(shape) if size == 1 and x.shape[i] != 1)
    return x.sum(axis=stretched, keepdims=True)


# ---------------------------------------------------------------- masks, from their definitions


def causal_mask(T: int, S: int) -> Array:
    """`1 1 T S`: query i sees keys j <= i, both counted from the start of their sequence."""
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    return (j <= i)[None, None]


def window_mask(T: int, S: int, left: int | None, right: int | None) -> Array:
    """`1 1 T S`: query i sees keys i - left <= j <= i + right; None has no end."""
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    mask = np.ones((T, S), bool)
    if left is not None:
        mask &= i - left <= j
    if right is not None:
        mask &= j <= i + right
    return mask[None, None]


def segment_mask(q_segments: Any, kv_segments: Any = None) -> Array:
    """`B|1 1 T S` from `B T` or `T`, and `B S` or `S`: tokens of one segment see each other."""
    q_segments = np.atleast_2d(np.asarray(q_segments))
    kv_segments = q_segments if kv_segments is None else np.atleast_2d(np.asarray(kv_segments))
    return (q_segments[:, :, None] == kv_segments[:, None, :])[:, None]


def position_mask(
    q_positions: Any,
    kv_positions: Any = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
) -> Array:
    """`B|1 1 T S` from `B T` or `T`, and `B S` or `S`, in any order of the tokens.

    Position -1 is padding: it attends to nothing and nothing attends to it.
    """
    q_positions = np.atleast_2d(np.asarray(q_positions))
    kv_positions = q_positions if kv_positions is None else np.atleast_2d(np.asarray(kv_positions))
    i, j = q_positions[:, :, None], kv_positions[:, None, :]
    mask = (i >= 0) & (j >= 0)
    if causal:
        mask = mask & (j <= i)
    left, right = window or (None, None)
    if left is not None:
        mask = mask & (i - left <= j)
    if right is not None:
        mask = mask & (j <= i + right)
    return mask[:, None]


# ---------------------------------------------------------------- comparing

Kind = Literal["forward", "grad"]

# Relative Frobenius error, |actual - expected| / |expected|. The only tolerances of the tests.
# lse is float32 whatever the inputs: compare it as float32.
TOLERANCES: dict[str, dict[Kind, float]] = {
    "float64": {"forward": 1e-12, "grad": 1e-12},
    "float32": {"forward": 2e-6, "grad": 1e-5},
    "float16": {"forward": 1e-3, "grad": 2e-3},
    "bfloat16": {"forward": 4e-3, "grad": 8e-3},
}


def assert_close(
    actual: Any,
    expected: Any,
    dtype: Any,
    kind: Kind = "forward",
    *,
    magnitude: float = 0.0,
    name: str = "",
) -> None:
    """Asserts one shape, no NaN, equal infinities, and the tolerance of `dtype` for the rest.

    Args:
      dtype: the dtype whose tolerance holds: for outputs and gradients that of the inputs, for lse
        float32. It is not compared with that of `actual`; say `actual.dtype == …` for that.
      magnitude: measure the error against at least this norm. For what cancels to zero, like dq
        over a single key, give the norm of the terms that cancel: without it only zero meets zero.
      name: what is compared, for the message.
    """
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    label = name or kind
    assert actual.shape == expected.shape, f"{label}: shape {actual.shape}, not {expected.shape}"
    assert not np.isnan(expected).any(), f"{label}: the expected values hold NaN"
    assert not np.isnan(actual).any(), f"{label}: {np.isnan(actual).sum()} of {actual.size} are NaN"
    finite = np.isfinite(expected)
    strays = np.where(finite, ~np.isfinite(actual), actual != expected)
    assert not strays.any(), (
        f"{label}: infinities differ at {strays.sum()} of {actual.size}, first at "
        f"{tuple(int(i) for i in np.argwhere(strays)[0])}"
    )
    error = np.where(finite, actual, 0.0) - np.where(finite, expected, 0.0)
    norm = max(float(np.linalg.norm(expected[finite])), magnitude)
    tolerance = TOLERANCES[jnp.dtype(dtype).name][kind]
    distance = float(np.linalg.norm(error))
    if distance <= tolerance * norm:
        return
    worst = tuple(int(i) for i in np.unravel_index(np.abs(error).argmax(), error.shape))
    raise AssertionError(
        f"{label}: relative error {distance / norm if norm else math.inf:.3g} exceeds "
        f"{tolerance:g} ({jnp.dtype(dtype).name}, {kind}); worst at {worst}: "
        f"{actual[worst]:.9g}, not {expected[worst]:.9g}"
    )


def random_qkv(
    rng: np.random.Generator,
    B: int = 2,
    T: int = 16,
    S: int | None = None,
    N: int = 4,
    K: int | None = None,
    H: int = 8,
    Hv: int | None = None,
    dtype: Any = "float32",
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normal q, k and v, rounded to `dtype`. q is multiplied by `scale`: 30 makes large logits.

    S is T, K is N and Hv is H unless given. float64 needs `jax.enable_x64`.
    """
    S, K, Hv = (given or default for given, default in ((S, T), (K, N), (Hv, H)))
    q = scale * rng.standard_normal((B, T, N, H))
    k = rng.standard_normal((B, S, K, H))
    v = rng.standard_normal((B, S, K, Hv))
    arrays = tuple(jnp.asarray(x, dtype) for x in (q, k, v))
    assert arrays[0].dtype == jnp.dtype(dtype), f"{dtype} became {arrays[0].dtype}: enable x64"
    return arrays


# ---------------------------------------------------------------- compiled HLO

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


class HloShape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Sub-byte types are packed and rounded up; token and opaque are nothing."""
        if self.dtype == "pred":
            return self.num_elements
        bits = re.search(r"\d+", self.dtype)
        return -(-self.num_elements * int(bits[0]) // 8) if bits else 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Collective(NamedTuple):
    """`count` instructions of the text that do `op` with these results on each device.

    `bytes` is that of the results of one instruction: for a permute what one device receives.
    `count` is static: an instruction in the body of a loop counts once, however often it runs.
    """

    op: str
    shapes: tuple[HloShape, ...]
    bytes: int
    count: int


def hlo_collectives(compiled_text: str) -> list[Collective]:
    """The collectives in `compiled.as_text()`, asynchronous forms included, equal ones counted.

    A `-start` counts and its `-done` does not. In the generic form, `async-start` with `calls=`,
    the instruction stands in the called computation and counts there.
    """
    counts: Counter[tuple[str, tuple[HloShape, ...]]] = Counter()
    for result, opcode in _instructions(compiled_text):
        op = opcode.removesuffix("-start")
        if op not in COLLECTIVES:
            continue
        tree = _parse_type(result)
        if opcode.endswith("-start") and op != "all-reduce":
            tree = tree[1]  # (operands, results, context…); an all-reduce-start has only results
        counts[op, tuple(_leaves(tree))] += 1
    return [
        Collective(op, shapes, sum(shape.num_bytes for shape in shapes), count)
        for (op, shapes), count in sorted(counts.items())
    ]


def hlo_shapes(compiled_text: str) -> set[HloShape]:
    """Every array that some instruction makes, on one device; inside fusions too."""
    return {shape for result, _ in _instructions(compiled_text) for shape in _leaves(_parse_type(result))}


def hlo_largest_shape(compiled_text: str) -> HloShape:
    """The shape with the most elements that appears on one device."""
    return max(hlo_shapes(compiled_text), key=lambda shape: (shape.num_elements, shape))


def _instructions(text: str) -> list[tuple[str, str]]:
    """(result type, opcode) of each line like `%name = f32[2,8]{1,0} opcode(…), attribute=…`."""
    found = []
    for line in text.splitlines():
        _, equals, rest = re.sub(r"/\*.*?\*/", "", line).partition(" = ")
        if not equals or not re.match(r"\s*(ROOT\s+)?%?[\w.-]+$", line.partition(" = ")[0]):
            continue
        end = _end_of_type(rest)
        opcode = re.match(r"\s*([a-z][\w-]*)\(", rest[end:])
        assert opcode, f"cannot read the HLO instruction {line.strip()!r}"
        found.append((rest[:end], opcode[1]))
    return found


def _end_of_type(text: str) -> int:
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "({[") - (char in ")}]")
        if char == " " and depth == 0:
            return i
    return len(text)


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{[^}]*\})?")


def _parse_type(text: str) -> Any:
    """An HloShape, or for a tuple a list of such."""
    stack: list[list[Any]] = [[]]
    i = 0
    while i < len(text):
        if text[i] == "(":
            stack.append([])
        elif text[i] == ")":
            done = stack.pop()
            stack[-1].append(done)
        elif array := _ARRAY.match(text, i):
            dims = tuple(int(d.strip().lstrip("<=")) for d in array[2].split(",") if d.strip())
            stack[-1].append(HloShape(array[1], dims))
            i = array.end()
            continue
        i += 1
    return stack[0][0]


def _leaves(tree: Any) -> list[HloShape]:
    if isinstance(tree, HloShape):
        return [tree]
    return [leaf for node in tree for leaf in _leaves(node)]
