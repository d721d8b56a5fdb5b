"""What the processes of a benchmark run on, looked at by one more: the parent starts no backend."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ..errors import CommandError
from .contest import Worker

__all__ = ["Machine", "look", "make_contender"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices for a benchmark.

    Attributes:
        platform: in JAX's words, "cpu" or "gpu".
        kind: as a device names itself.
        count: how many there are to use.
        memory_bytes: what JAX may take of one device; None where it shares the machine's.
    """

    platform: str
    kind: str
    count: int
    memory_bytes: int | None = None


def look(count: int | None) -> Machine:
    """The machine with so many devices; None takes every accelerator, or 8 simulated devices.

    Raises:
        CommandError: so many devices cannot be had.
    """
    with Worker("machine", "devices", {"count": count}) as worker:
        answer = worker.ask()
    if "error" in answer:
        raise CommandError(answer["error"])
    return Machine(**answer)


def make_contender(name: str, settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """What answers with a `Machine`, or with the error."""
    from ... import Ring
    from ..devices import make_ring_mesh

    def answer() -> dict[str, Any]:
        try:
            mesh = make_ring_mesh(settings["count"], Ring())
        except CommandError as error:
            return {"error": str(error)}
        device = mesh.devices.flat[0]
        memory = (device.memory_stats() or {}).get("bytes_limit")
        found = Machine(
            platform=device.platform, kind=device.device_kind, count=mesh.size, memory_bytes=memory
        )
        return dataclasses.asdict(found)

    return answer
