"""Facts of hardware, each with its source, and what `ringjax plan --measure` found on this machine.

Peaks are dense ones, of vendors' datasheets; where a datasheet states them with sparsity, they are half of
it. What a kernel and a link attain of them are fractions, on long sequences and with large messages. Units
are SI: bytes, bytes per second, operations per second, seconds.
"""

import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping

__all__ = ["HARDWARE", "MEASURED", "Hardware", "Overhead", "get_hardware", "load_measured", "save_measured"]

MEASURED = "measured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overhead:
    """Seconds that a kernel takes beside its matrix products.

    Attributes:
        row: for each query and head of a meeting of two shards, attended or not: it is read, merged and
            written.
        key: for each key and key head that a block of queries meets.

    Raises:
        ValueError: a number is negative.
    """

    row: float = 0.0
    key: float = 0.0

    def __post_init__(self):
        if not (self.row >= 0 and self.key >= 0):
            raise ValueError(f"Overhead(row={self.row}, key={self.key}): give no less than 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device, and the links between many.

    Attributes:
        name: what `hardware=` calls it.
        flops: dense peak of matrix products by dtype of the operands, operations per second. Attention is
            computed in bfloat16, float16 or float32; one byte is what `payload` may send.
        memory_bytes: device memory.
        memory_bandwidth: of that memory, bytes per second.
        host_bandwidth: what a device sends to those of its host (or NVLink domain), bytes per second and
            direction, to all of them together.
        network_bandwidth: what a device sends to those of other hosts, likewise.
        host_size: devices of a host or NVLink domain.
        latency: what a collective takes apart from its bytes, seconds.
        forward_fraction: of the peak, attained by an attention kernel on long shards, forward.
        backward_fraction: likewise, backward.
        pallas_fraction: what of those two kernel `"pallas"` attains, where they are of `"cudnn"`.
        forward_overhead: what the kernel takes beside its products, forward.
        backward_overhead: likewise, backward.
        link_fraction: of either link, attained.
        memory_fraction: of the memory's bandwidth, attained.
        both_ways: bandwidth of sending to two neighbours at once over that of sending to one. 1 where all
            links leave through one switch, 2 on a torus.
        collective_fraction: rate of all-to-alls, gathers and scatters over that of permutes.
        shared_processor: devices are simulated on one processor: their work adds up, and no transfer hides.
        source: where the numbers are from.
        sources: of single ones by name, where that is another.

    Raises:
        ValueError: a number is not positive, or a fraction above 1.
    """

    name: str
    flops: Mapping[str, float]
    memory_bytes: float
    memory_bandwidth: float
    host_bandwidth: float
    network_bandwidth: float
    host_size: int
    latency: float
    forward_fraction: float
    backward_fraction: float
    forward_overhead: Overhead = Overhead()
    backward_overhead: Overhead = Overhead()
    pallas_fraction: float = 1.0
    link_fraction: float = 0.8
    memory_fraction: float = 0.8
    both_ways: float = 1.0
    collective_fraction: float = 1.0
    shared_processor: bool = False
    source: str
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        numbers = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type in (int, float)}
        numbers |= {f"flops[{dtype!r}]": rate for dtype, rate in self.flops.items()}
        for name, value in numbers.items():
            if not value > 0:
                raise ValueError(f"Hardware({self.name!r}): {name} is {value}; it must be positive.")
            if name.endswith("_fraction") and value > 1:
                raise ValueError(f"Hardware({self.name!r}): {name} is {value}; a fraction is at most 1.")

    def peak(self, dtype: str) -> float:
        """Operations per second of matrix products.

        Raises:
            ValueError: nothing is known of the dtype.
        """
        if dtype not in self.flops:
            raise ValueError(
                f"the FLOP/s of {self.name} are not known for dtype {dtype!r}, but for "
                f"{', '.join(self.flops)}. Choose one of these, or measure: ringjax plan --measure."
            )
        return self.flops[dtype]

    def source_of(self, name: str) -> str:
        """Where a number is from, by its name here.

        Raises:
            ValueError: there is no such number.
        """
        if name not in {field.name for field in dataclasses.fields(self)}:
            raise ValueError(f"Hardware has no {name!r}.")
        return self.sources.get(name, self.source)

    def to_dict(self) -> dict[str, object]:
        """As plain numbers and texts, for JSON."""
        return dataclasses.asdict(self)


def _by_dtype(*, half: float, single: float, byte: float, has_float8: bool = True) -> dict[str, float]:
    """Peaks of tensor cores, and of plain cores for float32, which no TF32 rounds."""
    rates = {"bfloat16": half, "float16": half, "float32": single, "int8": byte}
    return rates | ({"float8": byte} if has_float8 else {})


_LATENCY = 1e-5
_FLASH_2 = "FlashAttention-2, arXiv:2307.08691, abstract and §4.1: up to 73 % of the peak, 63 % backward"
_FLASH_4 = "FlashAttention-4 (Together AI, 2026), abstract: 1,613 TFLOP/s on a B200, 71 %"
_ON_AN_H100 = (
    "measured on one H100 SXM with jax 0.11.2 by kernel 'cudnn', bfloat16, 16,384 tokens, 8 heads of 128, "
    "full: 630 TFLOP/s forward, 530 backward (FlashAttention-3, arXiv:2407.08608, has 740 and 560)"
)
_PALLAS_ON_AN_H100 = (
    "measured on one H100 SXM with jax 0.11.2, bfloat16, 32,768 tokens, 8 heads of 128, causal: 0.64 "
    "forward, 0.67 backward"
)
_LIKE_THAT_H100 = f"taken for that of an H100 SXM, {_ON_AN_H100}"
_DGX_B200 = "DGX B200 datasheet (nvidia.com/en-us/data-center/dgx-b200)"
_NO_FIGURE = "an assumption: no figure is published"


def _sources(*, forward: str, backward: str, network: str, **others: str) -> dict[str, str]:
    """Of what a GPU's own datasheet does not say."""
    return {
        "network_bandwidth": network,
        "latency": "an assumption, of the order of what nccl-tests reports for the smallest messages between "
        "the GPUs of a host",
        "forward_fraction": forward,
        "backward_fraction": backward,
        "forward_overhead": "an assumption: none",
        "backward_overhead": "an assumption: none",
        "pallas_fraction": "an assumption: that kernel attains those fractions there",
        "link_fraction": "an assumption: large messages of nccl-tests commonly reach 80 % or more",
        "memory_fraction": "an assumption: copies commonly reach 80 % or more; one H100 SXM reached 87 %",
        "both_ways": "all links of a GPU leave through one switch",
        "collective_fraction": "an assumption: NCCL's all-to-alls and gathers fill links as its permutes do",
    } | others


_ALL = (
    Hardware(
        name="a100-80gb-sxm",
        flops=_by_dtype(half=312e12, single=19.5e12, byte=624e12, has_float8=False),
        memory_bytes=80e9,
        memory_bandwidth=2039e9,
        host_bandwidth=300e9,  # NVLink 3: 600 GB/s, both directions together
        network_bandwidth=25e9,
        host_size=8,
        latency=_LATENCY,
        forward_fraction=0.73,
        backward_fraction=0.63,
        source="NVIDIA A100 Tensor Core GPU datasheet, A100 80GB SXM (nvidia.com/en-us/data-center/a100)",
        sources=_sources(
            forward=_FLASH_2,
            backward=_FLASH_2,
            network="DGX A100 datasheet: eight 200 Gb/s ports for eight GPUs",
        ),
    ),
    Hardware(
        name="h100-sxm",
        flops=_by_dtype(half=989.5e12, single=67e12, byte=1979e12),  # half of those with sparsity
        memory_bytes=80e9,
        memory_bandwidth=3350e9,
        host_bandwidth=450e9,  # NVLink 4: 900 GB/s, both directions together
        network_bandwidth=50e9,
        host_size=8,
        latency=_LATENCY,
        forward_fraction=0.64,
        backward_fraction=0.54,
        pallas_fraction=0.65,
        source="NVIDIA H100 Tensor Core GPU datasheet, H100 SXM (nvidia.com/en-us/data-center/h100)",
        sources=_sources(
            forward=_ON_AN_H100,
            backward=_ON_AN_H100,
            pallas_fraction=_PALLAS_ON_AN_H100,
            network="DGX H100 datasheet: eight 400 Gb/s ports for eight GPUs",
        ),
    ),
    Hardware(
        name="h100-pcie",
        flops=_by_dtype(half=756.5e12, single=51e12, byte=1513e12),  # half of those with sparsity
        memory_bytes=80e9,
        memory_bandwidth=2000e9,
        host_bandwidth=64e9,  # PCIe Gen5: 128 GB/s, both directions together; bridges join pairs only
        network_bandwidth=25e9,
        host_size=8,
        latency=_LATENCY,
        forward_fraction=0.64,
        backward_fraction=0.54,
        pallas_fraction=0.65,
        source="NVIDIA H100 PCIe GPU product brief PB-11133 (nvidia.com/en-us/data-center/h100)",
        sources=_sources(
            forward=_LIKE_THAT_H100,
            backward=_LIKE_THAT_H100,
            pallas_fraction=_PALLAS_ON_AN_H100,
            network="an assumption: one 400 Gb/s port for two GPUs",
            host_size="an assumption: servers hold 1 to 8",
        ),
    ),
    Hardware(
        name="h200-sxm",
        flops=_by_dtype(half=989.5e12, single=67e12, byte=1979e12),  # half of those with sparsity
        memory_bytes=141e9,
        memory_bandwidth=4800e9,
        host_bandwidth=450e9,  # NVLink 4: 900 GB/s, both directions together
        network_bandwidth=50e9,
        host_size=8,
        latency=_LATENCY,
        forward_fraction=0.64,
        backward_fraction=0.54,
        pallas_fraction=0.65,
        source="NVIDIA H200 Tensor Core GPU datasheet, H200 SXM (nvidia.com/en-us/data-center/h200)",
        sources=_sources(
            forward=_LIKE_THAT_H100,
            backward=_LIKE_THAT_H100,
            pallas_fraction=_PALLAS_ON_AN_H100,
            network="DGX H200 datasheet: eight 400 Gb/s ports for eight GPUs",
        ),
    ),
    Hardware(
        name="b200",
        # Eight: 36 PFLOP/s and, in one byte, 72, both with sparsity, and 600 TFLOP/s.
        flops=_by_dtype(half=2250e12, single=75e12, byte=4500e12),
        memory_bytes=180e9,
        memory_bandwidth=8000e9,
        host_bandwidth=900e9,  # NVLink 5: 1.8 TB/s, both directions together
        network_bandwidth=50e9,
        host_size=8,
        latency=_LATENCY,
        forward_fraction=0.71,
        backward_fraction=0.55,
        source="NVIDIA HGX platform, HGX B200 (nvidia.com/en-us/data-center/hgx)",
        sources=_sources(
            forward=_FLASH_4,
            backward=_NO_FIGURE,
            network=f"{_DGX_B200}: eight 400 Gb/s ports for eight GPUs",
            memory_bytes=f"{_DGX_B200}: 1,440 GB for eight",
            memory_bandwidth=f"{_DGX_B200}: 64 TB/s for eight",
        ),
    ),
    Hardware(
        name="gb200-nvl72",
        # 72: 360 PFLOP/s and, in one byte, 720, both with sparsity, and 5,760 TFLOP/s.
        flops=_by_dtype(half=2500e12, single=80e12, byte=5000e12),
        memory_bytes=186e9,  # 13.4 TB for 72
        memory_bandwidth=8000e9,  # 576 TB/s for 72
        host_bandwidth=900e9,  # 130 TB/s for 72, both directions together
        network_bandwidth=50e9,
        host_size=72,
        latency=_LATENCY,
        forward_fraction=0.71,
        backward_fraction=0.55,
        source="NVIDIA GB200 NVL72 (nvidia.com/en-us/data-center/gb200-nvl72)",
        sources=_sources(
            forward=_FLASH_4, backward=_NO_FIGURE, network="DGX GB200 datasheet: 72 ports of 400 Gb/s"
        ),
    ),
    Hardware(
        name="l40s",
        flops=_by_dtype(half=362.05e12, single=91.6e12, byte=733e12),
        memory_bytes=48e9,
        memory_bandwidth=864e9,
        host_bandwidth=32e9,  # PCIe Gen4 x16: 64 GB/s, both directions together
        network_bandwidth=12.5e9,
        host_size=8,
        latency=_LATENCY,
        forward_fraction=0.6,
        backward_fraction=0.5,
        source="NVIDIA L40S datasheet (nvidia.com/en-us/data-center/l40s)",
        sources=_sources(
            forward=_NO_FIGURE,
            backward=_NO_FIGURE,
            network="an assumption: one 200 Gb/s port for two GPUs",
            host_size="an assumption: servers hold 1 to 8",
        ),
    ),
)
HARDWARE: dict[str, Hardware] = {hardware.name: hardware for hardware in _ALL}


def get_hardware(hardware: str | Hardware) -> Hardware:
    """The hardware of that name; `"measured"` is what `ringjax plan --measure` stored.

    Raises:
        ValueError: there is none of that name, or nothing was measured yet.
    """
    if isinstance(hardware, Hardware):
        return hardware
    if hardware == MEASURED:
        return load_measured()
    if hardware not in HARDWARE:
        raise ValueError(
            f"hardware {hardware!r} is not known; choose one of {', '.join(HARDWARE)}, or measure what "
            f"is at hand with `ringjax plan --measure` and say {MEASURED!r}."
        )
    return HARDWARE[hardware]


def _measured_path() -> pathlib.Path:
    from ..models.embedded import cache_folder  # and Flax with it, which plans do not need

    return cache_folder() / "hardware.json"


def save_measured(hardware: Hardware) -> pathlib.Path:
    """Stores what was measured in the user's cache folder, at once or not at all; gives its path."""
    path = _measured_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(hardware.to_dict(), file, indent=2)
    os.replace(file.name, path)
    return path


def load_measured() -> Hardware:
    """What `save_measured` stored.

    Raises:
        ValueError: nothing was, or the file is not what it stored.
    """
    path = _measured_path()
    if not path.exists():
        raise ValueError(
            f"nothing was measured on this machine yet ({path} is missing): run `ringjax plan --measure` "
            f"first, or choose one of {', '.join(HARDWARE)}."
        )
    try:
        facts = json.loads(path.read_text())
        for name in ("forward_overhead", "backward_overhead"):
            facts[name] = Overhead(**facts[name])
        return Hardware(**facts)
    except (KeyError, json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): run `ringjax plan --measure` again.") from error
