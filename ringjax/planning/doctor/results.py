"""Kernels, strategies and links on fresh random inputs.

What is computed is compared with float64 on the host, in NumPy, so that neither XLA nor a device judges
itself.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from ...attention import ring_attention
from ...kernels import KernelName
from ...ring import Ring, device_of
from ...strategies import Strategy
from ..units import in_bytes
from ..workload import Dtype
from .base import MESSAGE, Finding, Verdict, permute

__all__ = ["TOLERANCES", "check_bits", "check_kernel", "check_rings"]

Array = np.ndarray

# Relative Frobenius error of outputs and of gradients, those of the tests; the log-sum-exp is float32 always.
TOLERANCES: dict[str, tuple[float, float]] = {"float32": (2e-6, 1e-5), "bfloat16": (4e-3, 8e-3)}
NAMES = ("out", "lse", "dq", "dk", "dv")
SHORTEST = 320
INTERPRETED = 48
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
STRATEGIES: tuple[Strategy, ...] = ("ring", "ring_q", "all_gather", "ulysses")


class _Drawn(NamedTuple):
    """Causal attention, of all or within documents; the last queries are in a document that has no keys."""

    arrays: tuple[jax.Array, ...]  # q, k, v, dout, dlse; rounded to the dtype, in natural order
    segments: tuple[Array, Array] | None  # of queries and of keys
    expected: tuple[Array, ...]  # float64, as NAMES


def _draw(
    rng: np.random.Generator, tokens: int, dtype: Dtype, heads: int = HEADS, *, documents: bool = True
) -> _Drawn:
    def normal(*shape: int) -> Array:
        return rng.standard_normal((1, tokens, *shape), np.float32)

    q, dout = normal(heads, HEAD_DIM), normal(heads, HEAD_DIM)
    k, v = normal(KV_HEADS, HEAD_DIM), normal(KV_HEADS, HEAD_DIM)
    arrays = tuple(jnp.asarray(x, jnp.dtype(dtype)) for x in (q, k, v, dout))
    dlse = normal(heads)
    mask, segments = np.tril(np.ones((tokens, tokens), bool)), None
    if documents:
        ends = rng.choice(np.arange(1, tokens), 3, replace=False)
        of_keys = np.searchsorted(np.sort(ends), np.arange(tokens), side="right").astype(np.int32)
        of_queries = of_keys.copy()
        of_queries[-3:] = len(ends) + 1
        mask, segments = mask & (of_queries[:, None] == of_keys), (of_queries, of_keys)
    wide = [np.asarray(x).astype(np.float64) for x in (*arrays, dlse)]
    expected = _in_float64(wide[0], wide[1], wide[2], wide[3], wide[4], mask)
    return _Drawn((*arrays, jnp.asarray(dlse)), segments, expected)


def _in_float64(q: Array, k: Array, v: Array, dout: Array, dlse: Array, mask: Array) -> tuple[Array, ...]:
    """Dense attention and its gradients from their definitions; `mask` is `T S`."""
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[3])
    logits = np.where(mask, scale * np.einsum("btnh,bsnh->bnts", q, k), -np.inf)
    top = logits.max(axis=-1, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    with np.errstate(divide="ignore"):  # a row without keys has an lse of -inf
        lse = (top + np.log(total))[..., 0]
    out = np.einsum("bnts,bsnh->btnh", weights, v)
    dweights = np.einsum("btnh,bsnh->bnts", dout, v)
    along = dlse.swapaxes(1, 2) - (weights * dweights).sum(axis=-1)
    dlogits = scale * weights * (dweights + along[..., None])
    dk, dv = np.einsum("bnts,btnh->bsnh", dlogits, q), np.einsum("bnts,btnh->bsnh", weights, dout)
    dk, dv = (x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(axis=3) for x in (dk, dv))
    return out, lse.swapaxes(1, 2), np.einsum("bnts,bsnh->btnh", dlogits, k), dk, dv


def _program(mesh: Mesh, ring: Ring, drawn: _Drawn) -> Callable[[], tuple[Array, ...]]:
    """Output, log-sum-exp and gradients on these devices, in natural order; compiled on its first call."""
    tokens = drawn.arrays[0].shape[1]
    order = np.asarray(ring.positions(tokens, ring.size(mesh)))
    back = np.argsort(order)
    segments = drawn.segments and (drawn.segments[0][order], drawn.segments[1][order])
    arrays = [
        jax.device_put(np.asarray(x)[:, order], NamedSharding(mesh, P(None, ring.axis_name)))
        for x in drawn.arrays
    ]

    @jax.jit
    def both(q, k, v, dout, dlse):
        def attend(q, k, v):
            return ring_attention(
                q, k, v, is_causal=True, segment_ids=segments, return_residual=True, ring=ring, mesh=mesh
            )

        results, pull = jax.vjp(attend, q, k, v)
        return *results, *pull((dout, dlse))

    return lambda: tuple(np.asarray(x)[:, back].astype(np.float64) for x in both(*arrays))


def _errors(actual: tuple[Array, ...], expected: tuple[Array, ...], dtype: str) -> dict[str, float]:
    """Of each result its error as a share of what is allowed; infinite where infinities or NaN differ."""
    shares = {}
    for name, found, wanted in zip(NAMES, actual, expected, strict=True):
        forward, gradient = TOLERANCES["float32" if name == "lse" else dtype]
        shares[name] = _distance(found, wanted) / (gradient if name.startswith("d") else forward)
    empty = np.isneginf(expected[1])
    if not all((x[empty] == 0).all() for x in (actual[0], actual[2])):
        shares["rows that attend to nothing"] = math.inf
    return shares


def _distance(found: Array, wanted: Array) -> float:
    finite = np.isfinite(wanted)
    if not np.array_equal(np.where(finite, 0.0, found), np.where(finite, 0.0, wanted)):
        return math.inf
    if not np.isfinite(found[finite]).all():
        return math.inf
    return float(np.linalg.norm(found[finite] - wanted[finite]) / np.linalg.norm(wanted[finite]))


def _judged(what: str, shares: dict[str, float], more: str = "", **facts: Any) -> Finding:
    worst = max(shares, key=lambda name: shares[name])
    verdict: Verdict = "ok" if shares[worst] <= 1 else "wrong"
    if math.isinf(shares[worst]):
        text = f"NaN, infinities or zeros are not where they belong ({worst})"
    elif verdict == "wrong":
        text = f"worst error {shares[worst]:.3g} times what is allowed ({worst})"
    else:
        text = f"worst error {shares[worst]:.0%} of what is allowed ({worst})"
    # JSON has no infinity.
    known = {name: share if math.isfinite(share) else None for name, share in shares.items()}
    return Finding(what=what, verdict=verdict, text=text + more, facts={"share_of_allowed": known} | facts)


def _failed(what: str, error: Exception) -> Finding:
    """A refusal is a note; whatever else stops a computation is wrong."""
    verdict: Verdict = "note" if isinstance(error, NotImplementedError | ImportError) else "wrong"
    said = next(iter(str(error).strip().splitlines()), "")
    # An error may name files and the user's folders.
    said = re.sub(r"(?:~|\b[A-Za-z]:)?[/\\][\w.@%+~-]+(?:[/\\][\w.@%+~-]*)+", "…", said)[:300]
    return Finding(what=what, verdict=verdict, text=f"{type(error).__name__}: {said}")


def check_kernel(kernel: KernelName, mesh: Mesh, rng: np.random.Generator) -> Iterator[Finding]:
    """One device, causal within documents, in zigzag layout; for cuDNN, which has none, without them too."""
    interpreted = kernel != "blockwise" and device_of(mesh).platform == "cpu"
    ring = Ring(mesh.axis_names[0], strategy="ring", layout="zigzag", kernel=kernel)
    tokens = ring.padded_length(INTERPRETED if interpreted else SHORTEST, 1)
    cases: list[tuple[Dtype, bool]] = [("float32", True)]
    if not interpreted:
        cases.append(("bfloat16", True))
        if kernel == "cudnn":
            cases.append(("bfloat16", False))
    for dtype, documents in cases:
        what = f"kernel {kernel}, {dtype}" + ("" if documents else ", one document")
        drawn = _draw(rng, tokens, dtype, documents=documents)
        try:
            found = _program(_first_of(mesh), ring, drawn)()
        except Exception as error:
            yield _failed(what, error)
            continue
        finding = _judged(what, _errors(found, drawn.expected, dtype))
        if interpreted and finding.verdict == "ok":
            text = f"no GPU here, so it was interpreted, not compiled; {finding.text}"
            finding = dataclasses.replace(finding, verdict="note", text=text)
        yield finding


def check_rings(mesh: Mesh, rng: np.random.Generator, progress: Callable[[str], None]) -> Iterator[Finding]:
    """Every strategy on all devices, against float64 and against one device."""
    whole = Ring(mesh.axis_names[0], strategy="ring", layout="zigzag")
    tokens, heads = whole.padded_length(SHORTEST, mesh.size), math.lcm(KV_HEADS, mesh.size)
    drawn = _draw(rng, tokens, "float32", heads)
    try:
        alone = _program(_first_of(mesh), whole, drawn)()
    except Exception as error:
        yield _failed("one device", error)
        return
    for strategy in STRATEGIES:
        what = f"{strategy} on {mesh.size} devices"
        progress(what)
        try:
            run = _program(mesh, dataclasses.replace(whole, strategy=strategy), drawn)
            found, repeated = run(), run()
        except Exception as error:
            yield _failed(what, error)
            continue
        distance = max(map(_distance, found, alone))
        same = all(map(np.array_equal, found, repeated))
        more = f"; {distance:.1e} from one device" if math.isfinite(distance) else ""
        more += "" if same else "; a second run gave other bits"
        known = distance if math.isfinite(distance) else None
        shares = _errors(found, drawn.expected, "float32")
        finding = _judged(what, shares, more, distance_from_one_device=known, same_bits_twice=same)
        if not same and strategy == "ring" and finding.verdict == "ok":
            # Others leave the order of their sums to the collectives; a ring's is fixed.
            finding = dataclasses.replace(finding, verdict="wrong")
        yield finding


def _first_of(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices.flatten()[:1], mesh.axis_names, axis_types=(AxisType.Auto,))


def check_bits(mesh: Mesh, rng: np.random.Generator) -> Finding:
    """Random bits, sent one place on, half round the ring, and one place back."""
    sent = rng.integers(0, 2**32, (mesh.size, MESSAGE), dtype=np.uint32)
    x = jax.device_put(sent, NamedSharding(mesh, P(mesh.axis_names[0])))
    lost = {}
    for hops in sorted({1, mesh.size // 2, mesh.size - 1}):
        arrived = np.asarray(permute(mesh, hops)(x))
        differing = (arrived != np.roll(sent, hops, axis=0)).any(axis=1)
        if differing.any():
            lost[hops] = [int(rank) for rank in np.flatnonzero(differing)]
    if lost:
        ranks = sorted({rank for found in lost.values() for rank in found})
        text = f"what devices {', '.join(map(str, ranks))} received is not what was sent"
        return Finding(what="permutes", verdict="wrong", text=text, facts={"differing": lost})
    text = f"{in_bytes(4 * MESSAGE)} of random bits from each device arrived as they were sent"
    return Finding(what="permutes", verdict="ok", text=text)
