"""Commands run in the test's own process."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def devices() -> None:
    """Starts all of them: a command that came first would start as many as it needs, for all after it."""
    jax.devices()
