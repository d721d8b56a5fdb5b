"""The whole path with the default model, against transformers on the CPU from the same file."""

import argparse
import bisect
import functools as ft
import mailbox
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from jax.sharding import Mesh

from ringjax import Ring
from ringjax.inference import Engine
from ringjax.models.checkpoints import open_checkpoint
from ringjax.models.embedded import embedded_model_path

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # transformers warns about itself
]
MakeMesh = Callable[..., Mesh]
RINGS = [(1, "contiguous"), (3, "contiguous"), (3, "zigzag"), (8, "contiguous"), (8, "zigzag")]
SECRET = "walnut-harbor-ember"
PLANTED = [(module, depth) for module in (argparse, mailbox) for depth in (0.1, 0.5, 0.9)]


class Answer(NamedTuple):
    token_ids: list[int]
    first_logits: np.ndarray  # after the prompt
    gaps: list[float]  # from the most probable token to the next, for each token


@pytest.fixture(scope="module")
def checkpoint() -> Any:
    return open_checkpoint(embedded_model_path())


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Any) -> Any:
    return checkpoint.tokenizer()


@pytest.fixture(scope="module")
def transformers_answer() -> Callable[[tuple[int, ...], int, frozenset[int]], Answer]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = embedded_model_path()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()

    @ft.cache
    @torch.no_grad()
    def answer(prompt: tuple[int, ...], count: int, stop_ids: frozenset[int]) -> Answer:
        ids, rows = [], []
        past, step = None, torch.tensor([prompt])
        while len(ids) < count and not (ids and ids[-1] in stop_ids):
            out = model(step, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            rows.append(out.logits[0, -1].numpy().astype(np.float32))
            ids.append(int(rows[-1].argmax()))
            step = torch.tensor([ids[-1:]])
        top = np.sort(rows, axis=-1)
        return Answer(ids, rows[0], (top[:, -1] - top[:, -2]).tolist())

    return answer


@pytest.fixture(scope="module")
def engine(checkpoint: Any, mesh: MakeMesh) -> Callable[[int, str], Engine]:
    """One engine of a ring at a time: each holds the whole model."""

    @ft.lru_cache(maxsize=1)
    def make(ring_size: int, layout: str) -> Engine:
        return Engine.from_checkpoint(checkpoint, mesh=mesh(ring_size), ring=Ring(layout=layout))

    return make


def answer_of(engine: Engine, prompt: list[int], count: int, stop_ids: Any) -> Answer:
    generation = engine.generate(prompt, max_tokens=count, stop_ids=stop_ids)
    rows = [np.asarray(generation.logits)[0] for _ in generation]
    top = np.sort(rows, axis=-1)
    return Answer(generation.token_ids, rows[0], (top[:, -1] - top[:, -2]).tolist())


def assert_same_tokens(found: Answer, expected: Answer) -> None:
    if found.token_ids == expected.token_ids:
        return
    pairs = zip(found.token_ids, expected.token_ids, strict=False)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), "the end")
    raise AssertionError(
        f"tokens differ from {at} on: {found.token_ids}, not {expected.token_ids}; gaps to the "
        f"second-best token: {found.gaps} and {expected.gaps}"
    )


def source_lines(module: Any, encode: Callable[[str], list[int]], tokens: int) -> list[str]:
    """The module's first lines, as many as make so many tokens."""
    lines = Path(module.__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    counts = range(len(lines) + 1)
    count = bisect.bisect_right(counts, tokens, key=lambda n: len(encode("".join(lines[:n])))) - 1
    assert count < len(lines), f"{module.__file__} is too short"
    return lines[:count]


def ask(tokenizer: Any, lines: list[str], question: str) -> list[int]:
    content = f"{''.join(lines).rstrip()}\n\n{question}"
    return tokenizer.chat([{"role": "user", "content": content}])


@pytest.fixture(scope="module")
def long_prompt(tokenizer: Any) -> list[int]:
    lines = source_lines(argparse, tokenizer.encode, 6200)
    return ask(tokenizer, lines, "What does this module do? Explain its main classes.")


@pytest.mark.parametrize(("ring_size", "layout"), RINGS)
def test_long_document_gives_the_tokens_and_logits_of_transformers(
    ring_size: int,
    layout: str,
    engine: Callable[[int, str], Engine],
    long_prompt: list[int],
    transformers_answer: Any,
) -> None:
    assert len(long_prompt) > 6000
    expected = transformers_answer(tuple(long_prompt), 32, frozenset())
    found = answer_of(engine(ring_size, layout), long_prompt, 32, ())
    assert len(found.token_ids) == 32
    assert np.abs(found.first_logits - expected.first_logits).max() < 1e-3
    assert_same_tokens(found, expected)


def planted_prompt(tokenizer: Any, module: Any, depth: float) -> list[int]:
    """About 2,700 tokens with the question.

    Where the source is cut decides what the model finds, in transformers too: with 2,700 tokens of Python
    3.11's argparse before the question it misses the phrase at 50 %, and with 2,640 it finds it. At 10 % it
    misses both here.
    """
    lines = source_lines(module, tokenizer.encode, 2640)
    lines.insert(round(depth * len(lines)), f"The secret passphrase of the vault is '{SECRET}'.\n")
    return ask(tokenizer, lines, "What is the secret passphrase of the vault?")


@pytest.mark.parametrize(("module", "depth"), PLANTED, ids=[f"{m.__name__}-{d}" for m, d in PLANTED])
def test_planted_phrase_is_answered_as_by_transformers(
    module: Any,
    depth: float,
    engine: Callable[[int, str], Engine],
    tokenizer: Any,
    transformers_answer: Any,
) -> None:
    prompt = planted_prompt(tokenizer, module, depth)
    expected = transformers_answer(tuple(prompt), 24, tokenizer.stop_ids)
    found = answer_of(engine(8, "zigzag"), prompt, 24, tokenizer.stop_ids)
    assert_same_tokens(found, expected)
    if depth > 0.1:
        assert SECRET in tokenizer.decode(found.token_ids)
