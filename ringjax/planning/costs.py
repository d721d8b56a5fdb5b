"""Operations and time of one attention call on each device, as closed forms.

A ring's pass is a list of steps: in each a shard is met while the next one, and what follows the last, are on
their way. A step takes as long as the longer of the two; what is left of the sending is exposed. Ranks that
meet less wait for the one that meets most.
"""

import dataclasses
import functools as ft
from typing import Any, Literal, NamedTuple

import numpy as np

from .. import layouts
from ..kernels import Device, HeadSizes, KernelName, Operands, Rule, choose_kernel
from ..kernels.base import block_size
from ..masks import Mask
from ..strategies.halves import LONGEST
from .hardware import Hardware
from .memory import TILE, memory
from .wire import Pass, Transfer, moves_queries, transfers
from .workload import F32, Choice, Dtype, Shard, Workload, attended_pairs, ring_schedule, visits

__all__ = ["Bound", "Prediction", "flop", "kernel_for", "predict"]

Bound = Literal["compute", "link", "memory"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a choice costs; bytes and operations are those of one device.

    Attributes:
        choice: how the call is distributed.
        transfers: what a device sends.
        hops: steps of the ring, forward; both ways round in lock step are one.
        flop: of the matrix products, over attended pairs, mean of the devices.
        memory: bytes by what takes them.
        compute_seconds: of the device that has most to do.
        link_seconds: all sending.
        exposed_seconds: of that, what no computation hides.
        seconds: the call.
        efficiency: what the operations alone would take at the best rate of a kernel, all devices equally
            busy, over `seconds`.
        bound: where most of the time goes: into operations, over the links, or into device memory.
    """

    choice: Choice
    transfers: tuple[Transfer, ...]
    hops: int
    flop: float
    memory: dict[str, int]
    compute_seconds: float
    link_seconds: float
    exposed_seconds: float
    seconds: float
    efficiency: float
    bound: Bound

    @property
    def bytes_sent(self) -> float:
        """By one device, in all."""
        return sum(transfer.count * transfer.bytes_sent for transfer in self.transfers)

    @property
    def bytes_per_hop(self) -> float:
        """By one device, forward, in a step of the ring or in each collective where there is no ring."""
        forward = [t for t in self.transfers if t.pass_ == "forward"]
        moved = [t for t in forward if t.collective == "collective-permute"]
        if not self.hops:
            moved = [t for t in forward if t.collective != "all-reduce"]
        steps = self.hops or sum(t.count for t in moved)
        return sum(t.count * t.bytes_sent for t in moved) / steps if steps else 0.0

    @property
    def memory_bytes(self) -> int:
        """In all."""
        return sum(self.memory.values())

    @property
    def hidden_seconds(self) -> float:
        """Sending behind which something is computed."""
        return self.link_seconds - self.exposed_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for JSON."""
        return dataclasses.asdict(self.choice) | {
            "label": self.choice.label,
            "transfers": [
                {
                    "what": t.what,
                    "collective": t.collective,
                    "pass": t.pass_,
                    "axis_size": t.axis.size,
                    "axis_stride": t.axis.stride,
                    "count": t.count,
                    "bytes_each": t.bytes_each,
                    "bytes_sent": t.count * t.bytes_sent,
                }
                for t in self.transfers
            ],
            "hops": self.hops,
            "bytes_per_hop": self.bytes_per_hop,
            "bytes_sent": self.bytes_sent,
            "flop": self.flop,
            "memory": self.memory,
            "memory_bytes": self.memory_bytes,
            "compute_seconds": self.compute_seconds,
            "link_seconds": self.link_seconds,
            "hidden_seconds": self.hidden_seconds,
            "exposed_seconds": self.exposed_seconds,
            "seconds": self.seconds,
            "efficiency": self.efficiency,
            "bound": self.bound,
        }


def predict(workload: Workload, choice: Choice, hardware: Hardware, *, training: bool) -> Prediction:
    """What a choice costs on a kind of device.

    Raises:
        ValueError: the heads do not split as the strategy wants, or the dtype's FLOP/s are not known.
    """
    sent = transfers(workload, choice, training=training)
    passes: tuple[Pass, ...] = ("forward", "backward") if training else ("forward",)
    time, ideal, operations, hops = _Time(), 0.0, 0.0, 0
    for pass_ in passes:
        clock = _Clock(workload, choice, hardware, pass_)
        own = [transfer for transfer in sent if transfer.pass_ == pass_]
        time += clock.time(own)
        count = flop(workload, workload.pairs, pass_) / choice.devices
        operations += count
        ideal += count / clock.best_rate
        hops = hops or clock.hops
    seconds = time.compute + time.memory + time.exposed
    limits: dict[Bound, float] = {"compute": time.compute, "link": time.exposed, "memory": time.memory}
    return Prediction(
        choice=choice,
        transfers=sent,
        hops=hops,
        flop=operations,
        memory=memory(
            workload,
            choice,
            training=training,
            kernel=_meet_in(workload, choice, hardware),
            device=_device(hardware),
        ),
        compute_seconds=time.compute + time.memory,
        link_seconds=time.link,
        exposed_seconds=time.exposed,
        seconds=seconds,
        efficiency=ideal / seconds,
        bound=max(limits, key=lambda bound: limits[bound]),
    )


def kernel_for(workload: Workload, hardware: Hardware) -> tuple[KernelName, str]:
    """What `kernel="auto"` takes on such devices, and why."""
    head_sizes = workload.head_dim, workload.value_size
    return _kernel_for(workload.mask, workload.dtype, head_sizes, _device(hardware))


def _device(hardware: Hardware) -> Device:
    """As JAX would name it."""
    if hardware.shared_processor:
        return Device()
    return Device(platform="gpu", kind=hardware.name.upper(), has_cudnn=True)


@ft.cache
def _kernel_for(mask: Mask, dtype: Dtype, head_sizes: HeadSizes, device: Device) -> tuple[KernelName, str]:
    return choose_kernel(Rule(mask=mask, scale=1.0), Operands(), dtype, head_sizes, device)


def _meet_in(workload: Workload, choice: Choice, hardware: Hardware) -> KernelName:
    """What shards meet in: meetings that cuDNN does not take go to `pallas`."""
    kernel, _ = kernel_for(workload, hardware)
    return "pallas" if kernel == "cudnn" and not _goes_to_cudnn(workload, choice) else kernel


def _goes_to_cudnn(workload: Workload, choice: Choice) -> bool:
    """Whether shards meet as that kernel takes them: in full, or each itself causally."""
    if workload.window is not None or choice.layout == "striped":
        return False
    match choice.strategy:
        case "ring" | "ring_q" | "double_ring":
            return True
        case "ulysses" | "usp":
            return choice.layout == "contiguous"
        case "all_gather":
            return False


# ---------------------------------------------------------------- operations


def flop(workload: Workload, pairs: float, pass_: Pass) -> float:
    """Operations of the matrix products over so many attended pairs of each head.

    Forward q kᵀ and p v; backward q kᵀ again, dout vᵀ, pᵀ dout, ds k and dsᵀ q.
    """
    size = workload.head_dim + workload.value_size
    if pass_ == "backward":
        size = 3 * workload.head_dim + 2 * workload.value_size
    return 2 * workload.batch * workload.heads * pairs * size


# ---------------------------------------------------------------- time


class _Time(NamedTuple):
    """Seconds of computing, where operations limit and where memory does; of sending, and of that exposed."""

    compute: float = 0.0
    memory: float = 0.0
    link: float = 0.0
    exposed: float = 0.0

    def __add__(self, other: tuple) -> "_Time":
        return _Time(*(a + b for a, b in zip(self, other, strict=True)))


class _Clock:
    """The time of one pass."""

    def __init__(self, workload: Workload, choice: Choice, hardware: Hardware, pass_: Pass):
        self.workload, self.choice, self.hardware = workload, choice, hardware
        self.pass_: Pass = pass_
        self.shard = workload.shard(choice)
        fraction = hardware.forward_fraction if pass_ == "forward" else hardware.backward_fraction
        self.best_rate = self.rate = fraction * hardware.peak(workload.dtype)
        if _meet_in(workload, choice, hardware) != kernel_for(workload, hardware)[0]:
            self.rate *= hardware.pallas_fraction
        self.overhead = hardware.forward_overhead if pass_ == "forward" else hardware.backward_overhead
        runs = layouts.chunks(choice.layout)
        self.tile = (
            block_size(self.shard.queries // runs, TILE[0]),
            block_size(self.shard.keys // runs, TILE[1]),
        )
        self.ring_size = choice.outer if choice.strategy == "usp" else choice.devices
        if choice.strategy == "usp":
            self.shard = self.shard.split_by_heads(choice.inner)
        self.steps, self.keys_stay = [(0,)], False
        if choice.strategy in ("ring", "ring_q", "usp"):
            schedule, queries = ring_schedule(workload, choice), choice.strategy == "ring_q"
            self.steps = visits(schedule)
            self.keys_stay = moves_queries(self.shard, schedule, pass_, queries=queries)

    @property
    def hops(self) -> int:
        """Steps of the ring."""
        return self.choice.devices - 1 if self.choice.strategy == "double_ring" else len(self.steps) - 1

    def time(self, sent: list[Transfer]) -> _Time:
        """Of computing and sending; what a payload agrees upon comes first."""
        first = [t for t in sent if t.collective == "all-reduce"]
        return self._exposed(first) + self._by_strategy([t for t in sent if t not in first])

    def _by_strategy(self, sent: list[Transfer]) -> _Time:
        match self.choice.strategy:
            case "ring" | "ring_q":
                return self._ring(sent)
            case "usp":
                outside = [t for t in sent if t.collective == "all-to-all"]
                return self._exposed(outside) + self._ring([t for t in sent if t not in outside])
            case "double_ring":
                return self._double_ring(sent)
            case "ulysses":
                return self._exposed(sent) + self._compute(self._balanced(), self.shard)
            case "all_gather":
                return self._all_gather(sent)

    def _ring(self, sent: list[Transfer]) -> _Time:
        """Steps, in each of which a shard is met; what follows comes home during half of the first one's."""
        last, total, rest = len(self.steps) - 1, _Time(), _Time()
        if self.keys_stay:
            total += _Time(compute=self._expanding(self.shard))
        short = max(self.shard.queries, self.shard.keys) <= LONGEST
        halves = last and any(t.follows for t in sent) and self.shard.heads > 1 and short
        for index, offsets in enumerate(self.steps):
            computing = self._compute(self._most_pairs(offsets), self.shard, len(offsets))
            if index == 0 and halves:
                computing = rest = _Time(*(value / 2 for value in computing))
            # As many shards leave as are met next. What follows those met before leaves with them, and of the
            # own shard, which begins every leg, only what follows the first leg.
            ahead = len(self.steps[index + 1]) if index < last else 0
            behind = min(index, 1) if index < 2 else len(offsets)
            sending = self._together([(t, behind if t.follows else ahead) for t in sent])
            total += self._overlapped(computing, sending)
        home = len(self.steps[1]) if last else 0
        return total + self._overlapped(rest, self._together([(t, home) for t in sent if t.follows]))

    def _double_ring(self, sent: list[Transfer]) -> _Time:
        """Rounds; the outer step is on its way during a whole round, the inner ones during theirs."""
        rounds, size, total = self.choice.outer, self.choice.inner, _Time()
        inner = [t for t in sent if t.axis.stride == 1]
        outer = [t for t in sent if t.axis.stride != 1]
        for round_ in range(rounds):
            computing, sending = _Time(), 0.0
            for step in range(size):
                pairs = self._most(self._met_in_round(round_, step))
                on_way = [(t, 1) for t in inner if t.follows or step < size - 1]
                computing += self._overlapped(self._compute(pairs, self.shard), self._together(on_way))
            if round_ < rounds - 1:
                sending = self._together([(t, 1) for t in outer])
            busy = computing.compute + computing.memory + computing.exposed
            exposed = sending if self.hardware.shared_processor else max(0.0, sending - busy)
            total += computing + _Time(link=sending, exposed=exposed)
        return total + self._alone(self._together([(t, 1) for t in outer if t.follows]))

    def _all_gather(self, sent: list[Transfer]) -> _Time:
        """Gathers of each group hide behind the computation on the last, and scatters behind the next."""
        groups, total = self.choice.head_groups, _Time()
        pairs = self._most(self._pairs().sum(axis=1))
        gathers = self._together([(t, 1) for t in sent if t.collective == "all-gather"])
        scatters = self._together([(t, 1) for t in sent if t.collective == "reduce-scatter"])
        everything = self._everything()
        total += self._alone(gathers) + self._alone(scatters)
        for group in range(groups):
            whole = self._compute(pairs, everything)
            part = _Time(*(value / groups for value in whole))
            total += self._overlapped(part, gathers + scatters if group < groups - 1 else 0.0)
        return total

    # Work

    def _pairs(self) -> np.ndarray:
        """By rank and offset: those of whole tiles, for a kernel computes no less."""
        lengths = self.ring_size, self.shard.queries, self.shard.keys
        return attended_pairs(self.workload.mask, self.choice.layout, *lengths, self.tile)

    def _most_pairs(self, offsets: tuple[int, ...]) -> float:
        """Attended pairs of a head at a step, on the rank that has most; the mean where work adds up."""
        return self._most(self._pairs()[:, [offset % self.ring_size for offset in offsets]].sum(axis=1))

    def _most(self, met: np.ndarray) -> float:
        return float(met.mean() if self.hardware.shared_processor else met.max())

    def _met_in_round(self, round_: int, step: int) -> np.ndarray:
        """Of a double ring, by rank: device i of host h meets device i - step of host h - round."""
        size, ranks = self.choice.inner, np.arange(self.ring_size)
        host = (ranks // size - round_) % self.choice.outer
        source = host * size + (ranks % size - step) % size
        return self._pairs()[ranks, (ranks - source) % self.ring_size]

    def _balanced(self) -> float:
        """The mean over devices of all pairs, as where each has some heads of everything."""
        lengths = 1, self.workload.tokens, self.workload.num_keys
        pairs = attended_pairs(self.workload.mask, "contiguous", *lengths, self.tile)
        return float(pairs.sum()) / self.choice.devices

    def _everything(self) -> Shard:
        return dataclasses.replace(self.shard, keys=self.shard.keys * self.choice.devices)

    def _compute(self, pairs: float, shard: Shard, shards: int = 1) -> _Time:
        """Seconds of meeting so many shards, with `pairs` per head of which the device has `shard.heads`."""
        heads = shard.heads / self.workload.heads
        operations = flop(self.workload, pairs, self.pass_) * heads / self.rate
        rows = shards * shard.batch * shard.queries * shard.heads
        keys = shard.batch * shard.kv_heads * pairs / self.tile[0]
        operations += self.overhead.row * rows + self.overhead.key * keys
        if not self.keys_stay:
            operations += shards * self._expanding(shard)
        if not pairs:
            return _Time(compute=operations)
        touched = 1.0
        if window := self.workload.window:
            # Where it reaches a corner only, w rows have w²/2 pairs, and the others are not read.
            touched = min(1.0, 2 * pairs / (window * shard.queries))
        moved = shards * (shard.kv + shard.q + 2 * (F32 * shard.out_items + shard.statistics))
        if self.pass_ == "backward":
            moved += shards * (2 * F32 * (shard.kv_items + shard.q_items) + shard.out)
        reading = touched * moved / (self.hardware.memory_fraction * self.hardware.memory_bandwidth)
        return _Time(compute=operations) if operations >= reading else _Time(memory=reading)

    def _expanding(self, shard: Shard) -> float:
        """Seconds of making keys and values of a latent; backward, and of pulling back, in float32."""
        operations = 2 * shard.batch * shard.keys * shard.expansion_items
        if not operations:
            return 0.0
        seconds = operations / self.hardware.peak(self.workload.dtype)
        return (
            seconds if self.pass_ == "forward" else seconds + 2 * operations / self.hardware.peak("float32")
        )

    # Sending

    def _together(self, sent: list[tuple[Transfer, int]]) -> float:
        """Seconds of transfers that leave at once, each so many times in as many directions."""
        ways = max((count for _, count in sent), default=0)
        if not ways:
            return 0.0
        speedup = self.hardware.both_ways if ways == 2 else 1.0
        seconds = sum(count * self._wire(transfer) for transfer, count in sent)
        started = sum(count for _, count in sent) if self.hardware.shared_processor else 1
        return started * self.hardware.latency + seconds / speedup

    def _wire(self, transfer: Transfer) -> float:
        """Seconds of the bytes of one transfer; within a host and across hosts at the same time."""
        hardware, (size, stride) = self.hardware, transfer.axis
        within = hardware.link_fraction * hardware.host_bandwidth
        across = hardware.link_fraction * hardware.network_bandwidth
        neighbours = min(size, max(1, hardware.host_size // stride))  # of the axis, on one host
        if transfer.collective == "collective-permute":
            return transfer.bytes_sent / (within if neighbours == size else across)
        within *= hardware.collective_fraction
        across *= hardware.collective_fraction
        if neighbours == size:
            return transfer.bytes_sent / within
        # Each host needs a piece from elsewhere once; its devices fetch and share out equal parts.
        share = (size - neighbours) / (size - 1)
        if transfer.collective != "all-to-all":
            share /= neighbours
        return max(transfer.bytes_sent / within, transfer.bytes_sent * share / across)

    def _overlapped(self, computing: _Time, sending: float) -> _Time:
        if self.hardware.shared_processor:
            return computing + self._alone(sending)
        busy = computing.compute + computing.memory
        return computing._replace(link=sending, exposed=max(0.0, sending - busy))

    def _alone(self, sending: float) -> _Time:
        return _Time(link=sending, exposed=sending)

    def _exposed(self, sent: list[Transfer]) -> _Time:
        return self._alone(sum(self._together([(transfer, transfer.count)]) for transfer in sent))
