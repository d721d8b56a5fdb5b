"""Numbers with units, for people."""

__all__ = ["in_bytes", "in_seconds"]

_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_SECONDS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def in_bytes(count: float) -> str:
    """`1.21 GB`: three digits, in powers of ten as datasheets count."""
    for unit, size in _BYTES:
        if count >= size:
            return f"{_three_digits(count / size)} {unit}"
    return f"{count:.0f} B"


def in_seconds(seconds: float) -> str:
    """`17.3 ms`: three digits."""
    for unit, size in _SECONDS:
        if seconds >= size:
            return f"{_three_digits(seconds / size)} {unit}"
    return "0" if seconds == 0 else f"{seconds:.1g} s"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
