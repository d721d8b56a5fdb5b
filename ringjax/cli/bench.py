"""`ringjax bench`: measurements beside peers, in one run."""

import dataclasses

__all__ = ["Bench"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure."""

    def run(self) -> None:
        """Runs it."""
        raise NotImplementedError
