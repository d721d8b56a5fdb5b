"""A reader of scheduled HLO text: instructions in order, what they call, and how often that runs."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Self

__all__ = ["Instruction", "Program", "num_bytes"]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO.

    Attributes:
        name: of its result.
        result: the type of that, as text.
        opcode: what it does.
        rest: operands and attributes, as text.
    """

    name: str
    result: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of results that it mentions."""
        return re.findall(r"%([\w.-]+)", self.rest)

    @property
    def called(self) -> list[str]:
        """Computations that it calls or loops over."""
        groups = re.findall(
            r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%[\w.-]+)", self.rest
        )
        return [name for group in groups for name in re.findall(r"%([\w.-]+)", group)]

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else self.opcode

    @property
    def kernel(self) -> str | None:
        """The name of the Triton kernel that it launches, if it does."""
        if self.opcode != "custom-call" or not self.target.endswith("triton"):
            return None
        found = re.search(r'\bname ?= ?\\?"([\w.-]+)', self.rest.partition("backend_config")[2])
        return found[1] if found else self.target

    @property
    def trip_count(self) -> int | None:
        """How often a loop runs, where XLA knows."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.rest)
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each with its instructions in the order of the schedule."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `compiled.as_text()`."""
        computations: dict[str, list[Instruction]] = {}
        entry = current = ""
        for raw in text.splitlines():
            line = re.sub(r"/\*.*?\*/", "", raw)
            if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{\s*$", line):
                current = header[2]
                computations[current] = []
                entry = current if header[1] else entry
            elif current and (found := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*)", line)):
                end = _end_of_type(found[2])
                opcode = re.match(r"\s*([a-z][\w-]*)\((.*)", found[2][end:])
                if opcode is not None:
                    computations[current].append(Instruction(found[1], found[2][:end], opcode[1], opcode[2]))
            elif line.startswith("}"):
                current = ""
        return cls({name: tuple(lines) for name, lines in computations.items()}, entry)

    def times(self) -> dict[str, int | None]:
        """How often each computation runs in one run of the program; None where that is data."""
        times: dict[str, int | None] = {}

        def visit(name: str, count: int | None) -> None:
            before = times.get(name, 0)
            times[name] = None if before is None or count is None else before + count
            for instruction in self.computations.get(name, ()):
                each = instruction.trip_count if instruction.opcode == "while" else 1
                for called in instruction.called:
                    visit(called, None if count is None or each is None else count * each)

        visit(self.entry, 1)
        return times


def num_bytes(result: str, started: bool = False) -> int:
    """Bytes of a type; of what an asynchronous start results in, those of the collective's own result."""
    if started:
        # (operands, results, …)
        parts = _parts(result)
        result = parts[1] if len(parts) > 1 else result
    return sum(map(_array_bytes, re.findall(r"([a-z]\w*)\[([\d,]*)\]", result)))


def _array_bytes(array: tuple[str, str]) -> int:
    dtype, dims = array
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
    return -(-math.prod(int(d) for d in dims.split(",") if d) * bits // 8)


def _parts(text: str) -> list[str]:
    """The elements of a tuple type."""
    parts, depth = [""], 0
    for char in text.strip()[1:-1] if text.strip().startswith("(") else text:
        depth += (char in "({[") - (char in ")}]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _end_of_type(text: str) -> int:
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "({[") - (char in ")}]")
        if char == " " and depth == 0:
            return i
    return len(text)
