"""`ringjax doctor`: whether attention on this machine is right, and as fast as was to be expected."""

import collections
import dataclasses
import json
import sys
import time

from rich.console import Console

from ..planning.doctor import Finding, examine
from ..ring import Ring
from .bench.contest import progress_bar
from .devices import make_ring_mesh

__all__ = ["Doctor"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check the devices at hand, in about two minutes, and print what can be pasted into an issue.

    Versions and devices; every kernel against float64 on fresh random inputs (output, log-sum-exp, gradients;
    causal, zigzag, documents); the ring on all devices against float64 and against one device; what matrix
    products, attention, memory and links attain, and what a whole call takes and hides, beside what the plan
    expects. On one device there is no ring, and nothing of links.

    Each line has a verdict: ok, wrong, or note, for a person to read. Results are held to the tolerances of
    the tests, and exit status is 1 if one is wrong. Speeds are never wrong. On a CPU devices are simulated.
    """

    devices: int | None = None
    """How many. By default every accelerator there is, or else 8 devices simulated on the CPU."""
    json: bool = False
    """Print one JSON object instead of the report."""

    def run(self) -> None:
        """Checks and prints."""
        started = time.perf_counter()
        mesh = make_ring_mesh(self.devices, Ring())
        found: list[Finding] = []
        if not self.json:
            print("```text", flush=True)
        with progress_bar(Console(stderr=True)) as progress:
            task = progress.add_task("", total=None)
            for finding in examine(mesh, progress=lambda step: progress.update(task, description=step)):
                found.append(finding)
                if not self.json:
                    print(f"{finding.verdict:5}  {finding.what}: {finding.text}", flush=True)
        seconds = time.perf_counter() - started
        counts = collections.Counter(finding.verdict for finding in found)
        wrong = counts["wrong"] > 0
        if self.json:
            report = {"wrong": wrong, "seconds": seconds}
            print(json.dumps(report | {"findings": [dataclasses.asdict(finding) for finding in found]}))
        else:
            said = f"{counts['wrong']} WRONG" if wrong else "nothing wrong"
            notes = f"{counts['note']} note{'s' * (counts['note'] != 1)}"
            print(f"ringjax doctor: {said}, {counts['ok']} ok, {notes}; {seconds:.0f} s\n```")
        if wrong:
            sys.exit(1)
