"""`ringjax bench`: which measurement."""

import dataclasses
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes

from .attention import BenchAttention
from .generation import BenchGeneration
from .plan import BenchPlan
from .training import BenchTraining

__all__ = ["Bench"]

Benchmark = (
    Annotated[BenchAttention, tyro.conf.subcommand("attention")]
    | Annotated[BenchGeneration, tyro.conf.subcommand("generation")]
    | Annotated[BenchPlan, tyro.conf.subcommand("plan")]
    | Annotated[BenchTraining, tyro.conf.subcommand("training")]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure against peers, side by side in one run.

    Each contender runs in a process of its own, in turn, on the same processors; medians are shown, and the
    ratio of each pair.
    """

    what: OmitSubcommandPrefixes[OmitArgPrefixes[Benchmark]]

    def run(self) -> None:
        """Measures and prints."""
        self.what.run()
