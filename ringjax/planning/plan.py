"""`ringjax.plan`: which way to distribute an attention call, and why, before anything runs."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

from ..kernels import KernelName
from ..layouts import LAYOUTS, Layout
from .costs import Prediction, kernel_for, predict
from .hardware import Hardware, get_hardware
from .units import in_bytes, in_seconds
from .wire import NO_HEADS, require_heads_that_split
from .workload import (
    MAX_DEVICES,
    MOST_TOKENS,
    Choice,
    Dtype,
    Payload,
    StrategyName,
    Workload,
    require_integer,
    require_one_of,
)

__all__ = ["Plan", "plan"]

# A choice further down the list must be faster by more than this, for predictions are no better.
TIE = 0.01
# Communication counts as hidden where less than this share of the time is exposed.
HIDDEN = 0.05
# Returns diminish where twice the devices are less than this times as fast.
RETURN = 1.5
LONGEST_SHARD = 2**22
DEVICES = 8
LARGEST_RING = 512
ROWS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What every way to distribute a call would cost, and which one to take.

    Attributes:
        workload: the call.
        hardware: the devices.
        devices: how many of them.
        training: whether the backward pass is counted too.
        best: the fastest that fits into memory; of those as good as equal, the simplest.
        candidates: all, the fastest first.
        left_out: what cannot be, with the reason.
        shortest_shard: keys per device, and queries in proportion, from which on the best one hides its
            communication; None if it never does.
        seconds_by_ring_size: of the fastest way that fits, on 1, 2, 4, … devices, as far as one is found.
    """

    workload: Workload
    hardware: Hardware
    devices: int
    training: bool
    best: Prediction
    candidates: tuple[Prediction, ...]
    left_out: dict[str, str]
    shortest_shard: int | None
    seconds_by_ring_size: dict[int, float]

    @property
    def largest_worthwhile_ring(self) -> int:
        """The number of devices past which twice as many are less than 1.5 times as fast."""
        found = self.seconds_by_ring_size
        for size, seconds in found.items():
            if 2 * size in found and seconds < RETURN * found[2 * size]:
                return size
        return max(found)

    @property
    def kernel(self) -> tuple[KernelName, str]:
        """What `kernel="auto"` takes there, and why."""
        return kernel_for(self.workload, self.hardware)

    def explain(self) -> str:
        """The table of candidates, the pick, and why."""
        return "\n".join([self.title(), "", *_as_text(self.table()), "", *self.remarks()])

    def title(self) -> str:
        """One line: what was planned."""
        w = self.workload
        heads = f"{w.heads} heads of {w.head_dim}"
        if w.num_kv_heads != w.heads:
            heads += f" ({w.num_kv_heads} of keys)"
        if w.latent_dim is not None:
            heads += f" out of latents of {w.latent_dim}" + (f" + {w.rotary_dim}" if w.rotary_dim else "")
        span = "causal" if w.causal else "full"
        if w.window is not None:
            span += f", window of {w.window:,}"
        keys = f" over {w.num_keys:,} keys" if w.num_keys != w.tokens else ""
        passes = "forward and backward" if self.training else "forward"
        return (
            f"{w.batch} × {w.tokens:,} tokens{keys}, {heads}, {span}, {w.dtype}, on {self.devices} "
            f"{self.hardware.name}: {passes}"
        )

    def table(self) -> list[list[str]]:
        """The candidates by rows of texts: headings, then the pick, then the others."""
        headings = ["", "time", "eff.", "exposed", "hidden", "hops", "per hop", "memory", "bound"]
        rows = [headings]
        for candidate in self.candidates[:ROWS]:
            rows.append(
                [
                    candidate.choice.label,
                    in_seconds(candidate.seconds),
                    f"{candidate.efficiency:.0%}",
                    in_seconds(candidate.exposed_seconds),
                    in_seconds(candidate.hidden_seconds),
                    str(candidate.hops),
                    in_bytes(candidate.bytes_per_hop),
                    in_bytes(candidate.memory_bytes),
                    candidate.bound,
                ]
            )
        return rows

    def remarks(self) -> list[str]:
        """What the table says, in sentences."""
        best, shard = self.best, self.workload.shard(self.best.choice)
        lines = [f"Take {best.choice.label}. {self._why()}", self._what_binds()]
        lines.append("Kernel {!r}: {}.".format(*self.kernel))
        if self.devices > 1:
            if self.shortest_shard is None:
                lines.append(
                    f"Its communication hides at no length; here there are {shard.keys:,} tokens per device."
                )
            else:
                lines.append(
                    f"Its communication hides (less than {HIDDEN:.0%} of the time is exposed) from "
                    f"{self.shortest_shard:,} tokens per device on; here there are {shard.keys:,}."
                )
        if (size := self.largest_worthwhile_ring) == max(self.seconds_by_ring_size):
            lines.append(
                f"Returns do not diminish up to {size} devices, the most of those looked at that can."
            )
        else:
            lines.append(
                f"Returns diminish past {size} devices: twice as many are less than {RETURN} times as fast."
            )
        if (hidden := len(self.candidates) - ROWS) > 0:
            lines.append(f"{hidden} slower ways are not shown.")
        lines += [f"Left out: {name}: {reason}" for name, reason in self.left_out.items()]
        lines.append(f"Predicted for {self.hardware.name}: {self.hardware.source}.")
        return lines

    def _why(self) -> str:
        best = self.best
        if self.devices == 1:
            return "One device sends nothing."
        others = [c for c in self.candidates if c.choice.strategy != best.choice.strategy]
        if not others:
            return f"It takes {in_seconds(best.seconds)}."
        rival = others[0]
        if rival.seconds < best.seconds * (1 + TIE):
            return f"Nothing is faster by more than {TIE:.0%}, and it is the simplest of its equals."
        reasons = []
        if rival.exposed_seconds > best.exposed_seconds:
            saved = in_seconds(rival.exposed_seconds - best.exposed_seconds)
            reasons.append(f"{saved} less of its communication is exposed")
        if rival.compute_seconds > (1 + TIE) * best.compute_seconds:
            reasons.append("its devices have more equal work")
        because = f": {' and '.join(reasons)}" if reasons else ""
        return f"It is {rival.seconds / best.seconds - 1:.0%} faster than {rival.choice.label}{because}."

    def _what_binds(self) -> str:
        match self.best.bound:
            case "compute":
                return "Arithmetic binds: a faster kernel or more devices help, faster links do not."
            case "link":
                latent = self.workload.latent_dim is not None
                fewer = (
                    ", fewer key/value heads" if self.best.choice.strategy != "ring_q" and not latent else ""
                )
                smaller = ", a smaller payload" if fewer and self.workload.payload is None else ""
                return f"The links bind: longer shards{fewer}{smaller} or fewer devices help."
            case "memory":
                return "Device memory's bandwidth binds: shards are too short to keep the arithmetic busy."

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for JSON."""
        return {
            "workload": dataclasses.asdict(self.workload),
            "hardware": self.hardware.to_dict(),
            "devices": self.devices,
            "training": self.training,
            "best": self.best.to_dict(),
            "kernel": self.kernel[0],
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "left_out": self.left_out,
            "shortest_shard": self.shortest_shard,
            "largest_worthwhile_ring": self.largest_worthwhile_ring,
            "seconds_by_ring_size": {str(n): seconds for n, seconds in self.seconds_by_ring_size.items()},
        }


def plan(
    *,
    tokens: int,
    heads: int,
    head_dim: int,
    batch: int = 1,
    kv_tokens: int | None = None,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    dtype: Dtype = "bfloat16",
    causal: bool = True,
    window: int | None = None,
    payload: Payload | None = None,
    latent_dim: int | None = None,
    rotary_dim: int = 0,
    hardware: str | Hardware = "h100-sxm",
    devices: int | None = None,
    training: bool = False,
    strategy: StrategyName | None = None,
    layout: Layout | None = None,
    axis_sizes: tuple[int, ...] | None = None,
) -> Plan:
    """Predicts every way to distribute one attention call, and picks one; no device is touched.

    Args:
        tokens: T, of the whole sequence.
        heads: N.
        head_dim: H.
        batch: B.
        kv_tokens: S; None means as many as queries.
        kv_heads: K; None means N.
        value_dim: Hv; None means H.
        dtype: of query, key and value.
        causal: whether a query sees only the keys up to its own position.
        window: how many of those, its own included; None means all.
        payload: the form in which keys and values travel; None means as they are.
        latent_dim: R, of `latent_attention`, where latents travel; None means plain attention.
        rotary_dim: Hr, the part of H that travels beside a latent.
        hardware: a name of `ringjax.planning.HARDWARE`, `"measured"`, or facts of one's own.
        devices: over how many devices the sequence is split; None means 8, or the product of `axis_sizes`.
        training: whether the backward pass counts too.
        strategy: look at this one only; None at all.
        layout: likewise.
        axis_sizes: of the mesh axes that the sequence is split over, outermost first; only what these can do
            is looked at. None leaves the mesh open.

    Raises:
        ValueError: a number or name is wrong, heads do not split, or no way fits into device memory; the text
            says what to change.

    Example:
        >>> from ringjax.planning import plan
        >>> best = plan(tokens=1_048_576, heads=32, kv_heads=8, head_dim=128).best
        >>> best.choice.label, best.hops
        ('ring, zigzag', 7)
    """
    workload = Workload(
        batch=batch,
        tokens=tokens,
        kv_tokens=kv_tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        causal=causal,
        window=window,
        payload=payload,
        latent_dim=latent_dim,
        rotary_dim=rotary_dim,
    )
    hardware = get_hardware(hardware)
    product = DEVICES if axis_sizes is None else math.prod(axis_sizes)
    devices = product if devices is None else devices
    require_integer("devices", devices)
    if axis_sizes is not None and devices != product:
        raise ValueError(f"devices={devices} is not the product of axis_sizes={axis_sizes}: leave it out.")
    if not 1 <= devices <= MAX_DEVICES:
        raise ValueError(f"devices={devices}: give a number from 1 to {MAX_DEVICES}.")
    if strategy is not None:
        require_one_of("strategy", strategy, get_args(StrategyName))
    if layout is not None:
        require_one_of("layout", layout, LAYOUTS)

    left_out: dict[str, str] = {}
    choices = list(_choices(workload, hardware, devices, strategy, layout, axis_sizes, left_out))
    if not choices:
        raise ValueError(
            "; ".join(left_out.values()) or _nothing_to_try(strategy, devices, axis_sizes, hardware)
        )
    candidates = [predict(workload, choice, hardware, training=training) for choice in choices]
    fitting = [c for c in candidates if c.memory_bytes <= hardware.memory_bytes]
    if not fitting:
        smallest = min(candidates, key=lambda c: c.memory_bytes)

        def fits(workload: Workload, count: int) -> bool:
            split = axis_sizes if count == devices else None
            ways = _choices(workload, hardware, count, strategy, layout, split, {})
            taken = (predict(workload, way, hardware, training=training).memory_bytes for way in ways)
            return any(each <= hardware.memory_bytes for each in taken)

        raise ValueError(_too_large(workload, smallest, hardware, fits))
    for candidate in candidates:
        if candidate not in fitting:
            left_out[candidate.choice.label] = (
                f"needs {in_bytes(candidate.memory_bytes)} of the {in_bytes(hardware.memory_bytes)}"
            )
    limit = (1 + TIE) * min(candidate.seconds for candidate in fitting)
    best = next(candidate for candidate in fitting if candidate.seconds <= limit)
    return Plan(
        workload=workload,
        hardware=hardware,
        devices=devices,
        training=training,
        best=best,
        candidates=tuple(sorted(fitting, key=lambda c: (c is not best, c.seconds))),
        left_out=left_out,
        shortest_shard=_shortest_shard(workload, best.choice, hardware, training),
        seconds_by_ring_size=_by_ring_size(workload, hardware, training, strategy, layout, axis_sizes)
        or {devices: best.seconds},
    )


def _choices(
    workload: Workload,
    hardware: Hardware,
    devices: int,
    strategy: StrategyName | None,
    layout: Layout | None,
    axis_sizes: tuple[int, ...] | None,
    left_out: dict[str, str],
) -> Iterator[Choice]:
    """Every way there is, the simplest first; says in `left_out` what cannot be."""
    layouts = (layout,) if layout else LAYOUTS if workload.causal and devices > 1 else ("contiguous",)
    for name in (strategy,) if strategy else get_args(StrategyName):
        match name:
            case "ulysses" | "usp" if workload.latent_dim and devices > 1:
                left_out[name] = NO_HEADS
            case "ring_q" if workload.payload:
                left_out[name] = f"payload={workload.payload!r} is of keys, and forward no keys travel"
            case "ring" | "ring_q":
                for ways in (False, True) if devices > 2 else (False,):
                    for each in layouts:
                        yield Choice(strategy=name, devices=devices, layout=each, bidirectional=ways)
            case "all_gather":
                parts = (
                    {1, workload.num_kv_heads if workload.latent_dim is None else 1} if devices > 1 else ()
                )
                for groups in sorted(parts):
                    for each in layouts:
                        yield Choice(strategy=name, devices=devices, layout=each, head_groups=groups)
            case "ulysses" if devices > 1:
                # Every device sees the whole sequence: no layout makes its work less equal than another.
                choice = Choice(strategy=name, devices=devices, inner=devices, layout=layout or "contiguous")
                if _splits(workload, choice, left_out):
                    yield choice
            case "usp":
                for inner in _divisors(devices):
                    if axis_sizes is not None and inner not in axis_sizes[1:][-1:]:
                        continue
                    for each in layouts:
                        choice = Choice(strategy=name, devices=devices, inner=inner, layout=each)
                        if _splits(workload, choice, left_out):
                            yield choice
            case "double_ring":
                inner = hardware.host_size if axis_sizes is None else axis_sizes[-1]
                fits = axis_sizes is None or len(axis_sizes) == 2
                if fits and 1 < inner < devices and devices % inner == 0:
                    for each in layouts:
                        yield Choice(strategy=name, devices=devices, inner=inner, layout=each)
            case _:
                pass


def _divisors(devices: int) -> list[int]:
    """The sizes of an inner axis that leave something to the outer one."""
    return [n for n in range(2, devices) if devices % n == 0]


def _splits(workload: Workload, choice: Choice, left_out: dict[str, str]) -> bool:
    try:
        require_heads_that_split(workload.heads, choice.inner)
    except ValueError as error:
        left_out[choice.label.split(",")[0]] = str(error)
        return False
    return True


def _nothing_to_try(
    strategy: StrategyName | None, devices: int, axis_sizes: tuple[int, ...] | None, hardware: Hardware
) -> str:
    """Why there is no choice, where not even one was left out with a reason."""
    if strategy in ("usp", "double_ring") and axis_sizes is not None:
        wanted = "two mesh axes" if strategy == "double_ring" else "two mesh axes or more"
        return f"strategy={strategy!r} splits over {wanted}, each larger than 1; axis_sizes={axis_sizes}."
    match strategy:
        case "double_ring":
            return (
                f"strategy='double_ring' needs a multiple of the {hardware.host_size} devices of a host of "
                f"{hardware.name}, and more than one host; devices={devices}."
            )
        case "usp":
            return (
                f"strategy='usp' cannot split over devices={devices}: give more, a number that is no prime."
            )
    return f"strategy={strategy!r} needs more than one device; devices={devices}."


def _too_large(
    workload: Workload, smallest: Prediction, hardware: Hardware, fits: Callable[[Workload, int], bool]
) -> str:
    """What is missing, and how many devices or how few tokens would do."""
    devices = smallest.choice.devices
    counts = (devices << doubled for doubled in range(1, (MAX_DEVICES // devices).bit_length()))
    enough = next((f"{count} devices" for count in counts if fits(workload, count)), None)
    fewer = (1 << halved for halved in range(1, workload.tokens.bit_length()))
    less = next(
        (f"1/{part} of the tokens" for part in fewer if fits(_part_of(workload, part), devices)), None
    )
    advice = " or ".join(filter(None, (enough, less)))
    return (
        f"no way fits: {smallest.choice.label} needs the least, {in_bytes(smallest.memory_bytes)} per "
        f"device, of which {hardware.name} has {in_bytes(hardware.memory_bytes)}. "
        + (f"Take {advice}." if advice else "Take other devices.")
    )


def _part_of(workload: Workload, part: int) -> Workload:
    kv_tokens = None if workload.kv_tokens is None else max(1, workload.kv_tokens // part)
    return dataclasses.replace(workload, tokens=max(1, workload.tokens // part), kv_tokens=kv_tokens)


def _shortest_shard(workload: Workload, choice: Choice, hardware: Hardware, training: bool) -> int | None:
    """By doubling, then by halving the step: to within 1/16."""
    queries = max(1.0, workload.tokens / workload.num_keys)  # for each key
    longest = min(LONGEST_SHARD, (MOST_TOKENS - 1) // (queries * choice.devices))

    def hides(shard: int) -> bool:
        kv_tokens = shard * choice.devices
        tokens = max(1, kv_tokens * workload.tokens // workload.num_keys)
        longer = dataclasses.replace(workload, tokens=tokens, kv_tokens=kv_tokens)
        found = predict(longer, choice, hardware, training=training)
        return found.exposed_seconds <= HIDDEN * found.seconds

    shard = 128
    while not hides(shard):
        shard *= 2
        if shard > longest:
            return None
    step = shard // 4
    while shard > 128 and step >= max(64, shard // 16):
        if hides(shard - step):
            shard -= step
        step //= 2
    return shard


def _by_ring_size(
    workload: Workload,
    hardware: Hardware,
    training: bool,
    strategy: StrategyName | None,
    layout: Layout | None,
    axis_sizes: tuple[int, ...] | None,
) -> dict[int, float]:
    """The outermost axis grows; on one device there is nothing to choose."""
    inner = math.prod(axis_sizes[1:]) if axis_sizes else 1
    found = {}
    for size in (2**i for i in range(min(LARGEST_RING, workload.num_keys).bit_length())):
        if size > 1 and size % inner:
            continue
        name, axes = None, None
        if size > 1:
            name, axes = strategy, axis_sizes and (size // inner, *axis_sizes[1:])
        choices = _choices(workload, hardware, size, name, layout, axes, {})
        predictions = [predict(workload, choice, hardware, training=training) for choice in choices]
        if fitting := [p.seconds for p in predictions if p.memory_bytes <= hardware.memory_bytes]:
            found[size] = min(fitting)
    return found


def _as_text(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
