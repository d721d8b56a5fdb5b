"""What products, attention, memory and links attain, beside what the plan expects of them.

A speed is never wrong, for a machine may be busy; what falls far behind is noted.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from ...attention import ring_attention
from ...ring import Ring, device_of
from ..costs import predict
from ..hardware import Hardware
from ..measure import Compute, filled, seconds_of
from ..units import in_bytes, in_seconds
from ..workload import Choice, Dtype, Workload
from .base import MESSAGE, Finding, send

__all__ = ["compared_links", "compared_speeds", "link_speeds", "whole_call"]

# How many times as much may be expected before that is noted.
SLOW = 2.0
LINK_HELP = (
    "see `nvidia-smi topo -m` and `NCCL_DEBUG=INFO`: GPUs may be joined by PCIe or the network in place of "
    "NVLink, or peer access be off"
)


def link_speeds(mesh: Mesh, sheet: Hardware | None = None) -> Finding:
    """From each device to the next, one at a time: a ring is as fast as its slowest link."""
    size, on_cpu = mesh.size, device_of(mesh).platform == "cpu"
    # Large, so that what a launch takes does not count.
    elements = (4 if on_cpu else 64) * MESSAGE
    x = filled((size, elements), "float32", NamedSharding(mesh, P(mesh.axis_names[0])))
    rates = []
    for rank in range(size):
        rates.append(4 * elements / seconds_of(send(mesh, [(rank, (rank + 1) % size)]), x))
    slowest, middle = int(np.argmin(rates)), float(np.median(rates))
    more = (
        f"in the median with {in_bytes(4 * elements)} at a time; the slowest, {slowest} → "
        f"{(slowest + 1) % size}, {_rate(rates[slowest])}"
    )
    hoped = sheet and sheet.link_fraction * sheet.host_bandwidth
    finding = _compared("each link", _rate, middle, hoped, more, LINK_HELP)
    finding.facts["each"] = rates
    if rates[slowest] * SLOW < middle and not on_cpu:
        text = f"{finding.text}; the whole ring waits for the slowest: {LINK_HELP}"
        return dataclasses.replace(finding, verdict="note", text=text)
    return finding


def compared_speeds(measured: Compute, sheet: Hardware | None) -> Iterator[Finding]:
    """What was measured of the devices themselves, beside what the plan assumes of such ones."""
    dtype = measured.dtype
    peak = measured.flops[dtype]
    expected = None if sheet is None else sheet.peak(dtype)
    others = ", ".join(f"{name} {_flops(rate)}" for name, rate in measured.flops.items() if name != dtype)
    yield _compared("matrix products", _flops, peak, expected, f"in {dtype} ({others})")
    for name, ours, theirs in (
        ("forward", measured.forward_fraction, sheet and sheet.forward_fraction),
        ("backward", measured.backward_fraction, sheet and sheet.backward_fraction),
    ):
        hoped = expected and theirs and theirs * expected
        more = f"in {dtype}, heads of {measured.head_dim}"
        yield _compared(f"attention, {name}", _flops, ours * peak, hoped, more)
    hoped = sheet and sheet.memory_fraction * sheet.memory_bandwidth
    yield _compared("memory, speed", _rate, measured.memory_bandwidth, hoped, "reading and writing")


def compared_links(measured: Hardware, sheet: Hardware | None) -> Iterator[Finding]:
    """What was measured of the links, likewise."""
    hoped = sheet and sheet.link_fraction * sheet.host_bandwidth
    latency = in_seconds(measured.latency)
    more = f"from every device at once, with {in_bytes(4 * MESSAGE)}; {latency} for an empty one"
    yield _compared("permutes, speed", _rate, measured.host_bandwidth, hoped, more, LINK_HELP)
    exchanged = measured.host_bandwidth * measured.collective_fraction
    hoped = hoped and sheet and hoped * sheet.collective_fraction
    yield _compared("all-to-alls, speed", _rate, exchanged, hoped, "", LINK_HELP)


def _compared(
    what: str,
    show: Callable[[float], str],
    found: float,
    expected: float | None,
    more: str = "",
    help_: str = "is the machine busy, or its clock held back?",
) -> Finding:
    text = f"{show(found)} {more}".rstrip()
    facts = {"measured": found, "expected": expected}
    if not expected:
        return Finding(what=what, verdict="ok", text=text, facts=facts)
    text += f"; the plan expects {show(expected)}"
    if found * SLOW < expected:
        text = f"{text}, {expected / found:.1f} times as much: {help_}"
        return Finding(what=what, verdict="note", text=text, facts=facts)
    return Finding(what=what, verdict="ok", text=text, facts=facts)


def _rate(bytes_per_second: float) -> str:
    return f"{in_bytes(bytes_per_second)}/s"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.3g} GFLOP/s"


def whole_call(mesh: Mesh, measured: Hardware, planned_for: Hardware) -> Finding:
    """A ring beside the same work without sending, and beside the plan."""
    on_cpu = device_of(mesh).platform == "cpu"
    tokens, heads, head_dim = (256, 4, 64) if on_cpu else (8192, 8, 128)
    dtype: Dtype = "float32" if on_cpu else "bfloat16"
    size = mesh.size
    workload = Workload(tokens=tokens * size, heads=heads, head_dim=head_dim, dtype=dtype, causal=False)
    choice = Choice(strategy="ring", devices=size)
    expected = predict(workload, choice, planned_for, training=False)
    both = _call(mesh, Ring(mesh.axis_names[0], strategy="ring"), (1, size * tokens), workload)
    row = Mesh(mesh.devices.reshape(1, -1), ("alone", "ring"), axis_types=(AxisType.Auto,) * 2)
    alone = _call(row, Ring("alone", strategy="ring", batch_axes=("ring",)), (size, tokens), workload)
    sending = sum(
        t.count * (measured.latency + t.bytes_sent / measured.host_bandwidth) for t in expected.transfers
    )
    hoped = expected.hidden_seconds / expected.link_seconds
    facts = {
        "seconds": both,
        "seconds_without_sending": alone,
        "sending_seconds": sending,
        "hidden": None,
        "predicted_seconds": expected.seconds,
        "predicted_hidden": hoped,
        "planned_for": planned_for.name,
    }
    text = (
        f"{workload.tokens:,} tokens, {heads} heads of {head_dim}, {dtype}, full: {in_seconds(both)}, the "
        f"same work without sending {in_seconds(alone)}, sending alone {in_seconds(sending)}"
    )
    hidden = hoped
    if planned_for.shared_processor:
        text += f"; on one processor nothing hides; the plan expects {in_seconds(expected.seconds)}"
    else:
        hidden = 1 - min(max(both - alone, 0.0), sending) / sending
        facts["hidden"] = hidden
        text += f", so {hidden:.0%} hidden; the plan expects {in_seconds(expected.seconds)} and {hoped:.0%}"
    ratio = both / expected.seconds
    if ratio > SLOW:
        text += f"; it takes {ratio:.1f} times that"
    elif ratio * SLOW < 1:
        text += f"; it takes {ratio:.2f} of that: the plan is too careful"
    elif hidden + 0.5 < hoped:
        text += f"; much less is hidden: {LINK_HELP}, and look at `ringjax trace`"
    else:
        return Finding(what="a whole call", verdict="ok", text=text, facts=facts)
    return Finding(what="a whole call", verdict="note", text=text, facts=facts)


def _call(mesh: Mesh, ring: Ring, rows: tuple[int, int], workload: Workload) -> float:
    """Seconds of a call whose queries are `rows`, batch by length, and which meet all keys."""
    batch, length = rows

    def given(tokens: int, seed: int) -> jax.Array:
        shape = batch, tokens, workload.heads, workload.head_dim
        return filled(shape, workload.dtype, NamedSharding(mesh, ring.spec), seed=seed)

    attend = jax.jit(lambda q, k, v: ring_attention(q, k, v, ring=ring, mesh=mesh))
    arrays = given(length, 0), given(workload.tokens, 1), given(workload.tokens, 2)
    return seconds_of(attend, *arrays, least=0.05)
