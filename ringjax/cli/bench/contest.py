"""Contenders in processes of their own, and how they take turns."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from ..errors import CommandError

__all__ = ["PEERS_HINT", "Worker", "at_least", "progress_bar", "take_turns"]

Benchmark = Literal["attention", "generation", "machine", "training"]
PEERS_HINT = "pip install 'ringjax[peers]'"
# Processes share the memory of a GPU; and the last line that a failing one writes is to be its error.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_TRACEBACK_FILTERING": "off"}


class Worker:
    """One contender in a process of its own, which answers a question at a time.

    Only one process works at once: two libraries in one process, or two at the same time, slow each other.
    """

    def __init__(self, benchmark: Benchmark, name: str, settings: dict[str, Any]):
        self.name = name
        # What libraries have to say is shown only if the process fails.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - __exit__ closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ringjax.cli.bench.worker", benchmark, name, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=ENVIRONMENT | os.environ,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, **question: Any) -> dict[str, Any]:
        """The process's answer; waits for it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
        for line in stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._log.seek(0)
        last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
        raise CommandError(f"the {self.name} process ended before it answered: {last}")


def take_turns(
    workers: Iterable[Worker],
    turn: Callable[[Worker], dict[str, Any]],
    *,
    repeats: int,
    warm_up: bool,
    progress: Progress,
) -> dict[str, list[dict[str, Any]]]:
    """What each worker answered in each round, by its name; a warm-up round comes first and is dropped."""
    workers = list(workers)
    results: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    rounds = range(0 if warm_up else 1, repeats + 1)
    task = progress.add_task("", total=len(rounds) * len(workers))
    for repeat in rounds:
        for worker in workers:
            kind = f"round {repeat} of {repeats}" if repeat else "warm-up"
            progress.update(task, description=f"{worker.name}: {kind}")
            result = turn(worker)
            if repeat:
                results[worker.name].append(result)
            progress.advance(task)
    return results


def progress_bar(console: Console) -> Progress:
    """A bar that leaves nothing behind, and shows nothing where there is no terminal."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def at_least(least: int, **options: int | None) -> None:
    """Checks options that count something.

    Raises:
        CommandError: one is less than `least`.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise CommandError(f"--{name.replace('_', '-')} {value}: give at least {least}.")
