"""What `import ringjax` does not do, seen from a fresh interpreter."""

import subprocess
import sys

import pytest

OPTIONAL = (
    *("flax", "optax", "gguf", "tokenizers", "safetensors", "jinja2", "torch", "rich", "tyro"),
    *("transformers", "tokamax"),
)


def _python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout


def test_import_starts_no_backend_and_takes_no_optional_package() -> None:
    program = (
        "import sys, ringjax\n"
        "from jax._src import xla_bridge\n"  # JAX has no public way to ask
        "print(xla_bridge.backends_are_initialized())\n"
        f"print([name for name in {OPTIONAL!r} if name in sys.modules])\n"
    )
    assert _python(program).split("\n")[:2] == ["False", "[]"]


@pytest.mark.parametrize("flag", ["jax_num_cpu_devices"])
def test_devices_can_be_chosen_after_import(flag: str) -> None:
    program = f"import jax, ringjax\njax.config.update({flag!r}, 3)\nprint(jax.device_count())"
    assert _python(program).strip() == "3"


def test_rooms_are_there_without_an_import_of_their_own() -> None:
    rooms = ("nn", "models", "inference", "training")
    program = f"import ringjax\nprint([getattr(ringjax, name).__name__ for name in {rooms}])"
    assert _python(program).strip() == str([f"ringjax.{name}" for name in rooms])


def test_unknown_names_are_attribute_errors() -> None:
    import ringjax

    with pytest.raises(AttributeError, match="module 'ringjax' has no attribute 'anything'"):
        _ = ringjax.anything


def test_public_names_are_all_there() -> None:
    import ringjax

    for name in (
        *("ring_attention", "ring_attention_local", "reference_attention"),
        *("Ring", "BlockSizes", "shard_sequence", "unshard_sequence", "BiasFn", "alibi"),
        *("Causal", "ChunkedLocal", "Full", "MaskFn", "PrefixLM", "SlidingWindow"),
    ):
        assert getattr(ringjax, name).__doc__, name
