"""When each device computes and when it sends, read from a profile of one step.

A profile names the instructions of the compiled program; the program says which of them send, and the plan
what that is. On a GPU every stream of a device counts, on a CPU every thread that works for it.
"""

import dataclasses
import pathlib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from .aot import COLLECTIVES
from .hlo import Instruction, Program, num_bytes
from .units import in_bytes, in_seconds
from .wire import Pass, Transfer

__all__ = ["Lane", "Sending", "Timeline", "read", "record"]

Interval = tuple[float, float]
# Kernels and copies that send, by which they are known where no instruction is named.
SENDS = re.compile(r"nccl|SendRecv|Memcpy\s?P2P|nvshmem", re.IGNORECASE)
UNNAMED = "?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sending:
    """A collective, as one device saw it.

    Attributes:
        what: travels, by the plan's names; several where the profile cannot tell them apart.
        collective: as XLA calls it.
        pass_: which it belongs to; None where the profile does not say.
        hop: the how many-eth of its kind on this device, from 1.
        bytes: of its result; None where the profile does not name the instruction.
        start: seconds since the step's first event on any device.
        stop: likewise.
        hidden: seconds of it in which the device computed.
    """

    what: str
    collective: str
    pass_: Pass | None
    hop: int
    bytes: int | None
    start: float
    stop: float
    hidden: float

    @property
    def seconds(self) -> float:
        """From start to end, waiting for partners included."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lane:
    """One device.

    Attributes:
        device: its number.
        computing: when it did, in order, apart from each other.
        sending: its collectives, in order.
    """

    device: int
    computing: tuple[Interval, ...]
    sending: tuple[Sending, ...]

    @property
    def compute_seconds(self) -> float:
        """In which something was computed."""
        return _length(self.computing)

    @property
    def sending_seconds(self) -> float:
        """In which some collective was under way."""
        return _length(_merged((x.start, x.stop) for x in self.sending))

    @property
    def hidden_seconds(self) -> float:
        """In which both were."""
        sending = _merged((x.start, x.stop) for x in self.sending)
        return sum(_overlap(x, self.computing) for x in sending)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """One step.

    Attributes:
        lanes: devices, by number.
        simulated: whether they share a processor.
        missing: what the profile should hold and does not, in sentences.
    """

    lanes: tuple[Lane, ...]
    simulated: bool
    missing: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """From the first event to the last."""
        ends = [stop for lane in self.lanes for _, stop in lane.computing]
        return max([*ends, *(x.stop for lane in self.lanes for x in lane.sending)], default=0.0)

    def hops(self) -> list[dict[str, Any]]:
        """What the devices sent, one entry for each pass, kind and hop, in order of their first start."""
        found: dict[tuple, list[Sending]] = defaultdict(list)
        for sending in sorted((x for lane in self.lanes for x in lane.sending), key=lambda x: x.start):
            found[sending.pass_, sending.what, sending.collective, sending.hop].append(sending)
        return [
            {
                "pass": pass_,
                "what": what,
                "collective": collective,
                "hop": hop,
                "devices": len(group),
                "bytes": group[0].bytes,
                "slowest_seconds": max(x.seconds for x in group),
                "hidden": sum(x.hidden for x in group) / (sum(x.seconds for x in group) or 1.0),
            }
            for (pass_, what, collective, hop), group in found.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for JSON."""
        return {
            "seconds": self.seconds,
            "simulated": self.simulated,
            "devices": [
                {
                    "device": lane.device,
                    "compute_seconds": lane.compute_seconds,
                    "sending_seconds": lane.sending_seconds,
                    "hidden_seconds": lane.hidden_seconds,
                    "sending": [dataclasses.asdict(x) for x in lane.sending],
                }
                for lane in self.lanes
            ],
            "hops": self.hops(),
            "missing": list(self.missing),
        }

    def tables(self) -> tuple[list[list[str]], list[list[str]]]:
        """By device and by hop, as rows of texts with headings."""
        devices = [["device", "computing", "sending", "of that hidden", "exposed"]]
        for lane in self.lanes:
            sending, hidden = lane.sending_seconds, lane.hidden_seconds
            share = f"{in_seconds(hidden)} ({hidden / sending:.0%})" if sending else "0"
            exposed = in_seconds(sending - hidden)
            devices.append(
                [str(lane.device), in_seconds(lane.compute_seconds), in_seconds(sending), share, exposed]
            )
        hops = [["pass", "what", "hop", "bytes", "slowest", "hidden"]]
        for hop in self.hops():
            size = UNNAMED if hop["bytes"] is None else in_bytes(hop["bytes"])
            slowest, hidden = in_seconds(hop["slowest_seconds"]), f"{hop['hidden']:.0%}"
            name = hop["what"] if hop["what"] != UNNAMED else hop["collective"]
            hops.append([hop["pass"] or UNNAMED, name, str(hop["hop"]), size, slowest, hidden])
        return devices, hops

    def remarks(self) -> list[str]:
        """What is to be known of the numbers."""
        lines = list(self.missing)
        if self.simulated:
            lines.append(
                "These devices are simulated on one processor: they take turns on its cores, and a "
                "collective lasts until its partners have come. The order of things is real, the speed and "
                "what hides behind what are not those of a GPU."
            )
        return lines


def record(step: Callable[[], Any], folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Profiles one call of a compiled step; gives XLA's file and Perfetto's, below `folder`."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
        jax.block_until_ready(step())
    [xplane] = folder.glob("plugins/profile/*/*.xplane.pb")
    [perfetto] = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    return xplane, perfetto


def read(profile: Any, text: str, transfers: Sequence[Transfer] = (), *, devices: Sequence[int]) -> Timeline:
    """The timeline of the one run of a program that a profile holds.

    Args:
        profile: a `jax.profiler.ProfileData`.
        text: `compiled.as_text()` of the program.
        transfers: what the plan expects, for the names of what travels.
        devices: their numbers.

    Raises:
        ValueError: no device's events are in it.
    """
    # Beside GPUs the host's threads only launch.
    on_cpu = not any(plane.name.startswith("/device:GPU:") for plane in profile.planes)
    program = _Known(Program.parse(text), transfers, on_cpu)
    with warnings.catch_warnings():
        # The reader's own types have no module, which Python deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        events = [*_events(profile, program)]
    if not events:
        planes = ", ".join(plane.name for plane in profile.planes) or "nothing"
        raise ValueError(
            f"the profile holds no event of the step, only {planes}: on a GPU the profiler needs CUPTI, and "
            f"the right to use it (NVIDIA's ERR_NVGPUCTRPERM says how to give it)."
        )
    first = min(event.start for event in events)
    by_device: dict[int, list[_Event]] = defaultdict(list)
    for event in events:
        by_device[event.device].append(event._replace(start=event.start - first, stop=event.stop - first))
    lanes = tuple(_lane(device, by_device[device], program) for device in devices if device in by_device)
    return Timeline(
        lanes=lanes,
        simulated=on_cpu,
        missing=tuple(_missing(lanes, devices, program)),
    )


class _Event(NamedTuple):
    device: int
    name: str
    start: float  # seconds
    stop: float
    instruction: Instruction | None


class _Known:
    """What the program says of its instructions by name."""

    def __init__(self, program: Program, transfers: Sequence[Transfer], on_cpu: bool):
        self.program, self.transfers, self.on_cpu = program, transfers, on_cpu
        self.instructions = {x.name: x for lines in program.computations.values() for x in lines}

    def collective(self, event: _Event) -> str | None:
        """Which one it is, None if it computes."""
        if event.instruction is None:
            return "collective" if SENDS.search(event.name) else None
        return _collective(self.sender(event.instruction))

    def sender(self, instruction: Instruction) -> Instruction:
        """The collective in an asynchronous wrapper; of others themselves."""
        if instruction.opcode != "async-start":
            return instruction
        inside = [x for name in instruction.called for x in self.program.computations.get(name, ())]
        return next((x for x in inside if _collective(x) is not None), instruction)

    def surrounds_collectives(self, instruction: Instruction) -> bool:
        """Whether it is a loop or call in which something is sent, so that it is no computing."""
        inside = (x for name in instruction.called for x in self.program.computations.get(name, ()))
        return any(_collective(x) is not None or self.surrounds_collectives(x) for x in inside)

    def named(self, instruction: Instruction | None) -> tuple[str, Pass | None, int | None]:
        """What a collective sends, in which pass, and its bytes."""
        if instruction is None:
            return UNNAMED, None, None
        instruction = self.sender(instruction)
        pass_: Pass = "backward" if "transpose(" in instruction.rest else "forward"
        size = num_bytes(instruction.result, started=instruction.opcode.endswith("-start"))
        op = _collective(instruction)
        own = [t for t in self.transfers if (t.collective, t.pass_) == (op, pass_)]
        if scope := re.search(r"ringjax\.(ahead|behind)", instruction.rest):
            own = [t for t in own if t.follows == (scope[1] == "behind")]
        # XLA's CPU compiler may send half precision as float32.
        factors = (1, 2) if self.on_cpu else (1,)
        names = [t.what for t in own if size in [factor * t.bytes_each for factor in factors]]
        return " or ".join(dict.fromkeys(names)) or UNNAMED, pass_, size

    def expected(self) -> int | None:
        """How many collectives a device takes part in; None where that is data."""
        total, times = 0, self.program.times()
        for name, lines in self.program.computations.items():
            count = sum(_collective(x) is not None for x in lines)
            each = times.get(name, 0)
            if count and each is None:
                return None
            total += count * (each or 0)
        return total


def _collective(instruction: Instruction) -> str | None:
    op = instruction.opcode.removesuffix("-start")
    return op if op in COLLECTIVES else None


def _events(profile: Any, known: _Known) -> Iterator[_Event]:
    for plane in profile.planes:
        gpu = re.match(r"/device:GPU:(\d+)", plane.name)
        for line in plane.lines if gpu or (plane.name == "/host:CPU" and known.on_cpu) else ():
            if gpu and not line.name.startswith("Stream"):
                continue  # sums of what stands in the streams
            for event in line.events:
                # Threads of a CPU also tell of much that is no instruction.
                if gpu is None and event.name not in known.instructions:
                    continue
                stats: Mapping[str, Any] = dict(event.stats)
                device = int(gpu[1]) if gpu else stats.get("device_ordinal")
                if device is None:
                    continue
                instruction = known.instructions.get(stats.get("hlo_op", ""))
                start = event.start_ns * 1e-9
                stop = start + event.duration_ns * 1e-9
                yield _Event(device, event.name, start, stop, instruction)


def _lane(device: int, events: list[_Event], known: _Known) -> Lane:
    surrounds = {
        name: known.surrounds_collectives(x)
        for name, x in known.instructions.items()
        if x.opcode in ("while", "conditional", "call")
    }
    computing: list[Interval] = []
    sends: list[tuple[_Event, str]] = []
    for event in sorted(events, key=lambda event: event.start):
        if (op := known.collective(event)) is not None:
            sends.append((event, op))
        elif event.instruction is None or not (
            surrounds.get(event.instruction.name, False) or event.instruction.opcode.endswith("-done")
        ):
            computing.append((event.start, event.stop))
    merged = tuple(_merged(computing))
    counts: Counter[tuple] = Counter()
    sending = []
    for event, op in sends:
        what, pass_, size = known.named(event.instruction)
        counts[pass_, what, op] += 1
        sending.append(
            Sending(
                what=what,
                collective=op,
                pass_=pass_,
                hop=counts[pass_, what, op],
                bytes=size,
                start=event.start,
                stop=event.stop,
                hidden=_overlap((event.start, event.stop), merged),
            )
        )
    return Lane(device=device, computing=merged, sending=tuple(sending))


def _missing(lanes: Iterable[Lane], devices: Iterable[int], known: _Known) -> Iterator[str]:
    found = {lane.device: lane for lane in lanes}
    if absent := [str(device) for device in devices if device not in found]:
        yield f"The profile holds no event of device {', '.join(absent)}."
    expected = known.expected()
    if expected is None:
        return
    for device, lane in found.items():
        if (seen := len(lane.sending)) != expected:
            yield f"The profile holds {seen} of the {expected} collectives of device {device}."
        if unnamed := sum(x.bytes is None for x in lane.sending):
            yield (
                f"Of device {device}'s collectives {unnamed} are known by their kernels alone, so that what "
                f"they send is not."
            )


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times, in order and apart from each other."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _length(intervals: Iterable[Interval]) -> float:
    return sum(stop - start for start, stop in intervals)


def _overlap(interval: Interval, others: Iterable[Interval]) -> float:
    start, stop = interval
    return sum(max(0.0, min(stop, right) - max(start, left)) for left, right in others)
