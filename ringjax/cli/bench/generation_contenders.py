"""The contenders of `ringjax bench generation`, each in a process of its own."""

import pathlib
import random
import time
from collections.abc import Callable
from typing import Any

__all__ = ["make_contender"]

Measure = Callable[[list[int]], tuple[float, float]]


def make_contender(name: str, settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """What answers with one measurement: seconds of prefill and tokens per second."""
    measure, version = {"ringjax": _ringjax, "transformers": _transformers}[name](settings)
    rng = random.Random(0)

    def answer() -> dict[str, Any]:
        prompt = [rng.randrange(100, 40_000) for _ in range(settings["tokens"])]
        prefill_seconds, tokens_per_second = measure(prompt)
        return {
            "prefill_seconds": prefill_seconds,
            "tokens_per_second": tokens_per_second,
            "version": version,
        }

    return answer


def _ringjax(settings: dict[str, Any]) -> tuple[Measure, str]:
    import jax

    from ... import __version__
    from ...inference import Engine
    from ...models.checkpoints import open_checkpoint
    from ...ring import Ring
    from ..devices import make_ring_mesh

    ring = Ring(layout=settings["layout"])
    mesh = make_ring_mesh(settings["devices"], ring)
    engine = Engine.from_checkpoint(open_checkpoint(settings["model"]), mesh=mesh, ring=ring)

    def measure(prompt: list[int]) -> tuple[float, float]:
        generation = engine.generate(prompt, max_tokens=settings["new_tokens"])
        for _ in generation:
            pass
        assert generation.tokens_per_second is not None
        return generation.prefill_seconds, generation.tokens_per_second

    return measure, f"ringjax {__version__}, jax {jax.__version__}"


def _transformers(settings: dict[str, Any]) -> tuple[Measure, str]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = pathlib.Path(settings["model"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()

    @torch.inference_mode()
    def measure(prompt: list[int]) -> tuple[float, float]:
        start = time.perf_counter()
        step = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        token = step.logits[:, -1:].argmax(-1)
        read = time.perf_counter()
        for _ in range(settings["new_tokens"] - 1):
            step = model(token, past_key_values=step.past_key_values, use_cache=True, logits_to_keep=1)
            token = step.logits[:, -1:].argmax(-1)
        return read - start, (settings["new_tokens"] - 1) / (time.perf_counter() - read)

    return measure, f"transformers {transformers.__version__}, torch {torch.__version__}"
