"""What the processes of a run tell each other beside their arrays."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["highest"]


def highest(mine: int, after: Any = None) -> int:
    """The greatest of what all processes give; waits for them, and for the arrays `after`.

    CPUs that are to run two programs at once, of which each waits for other devices, may have no thread left
    for the first. Other devices would finish the first anyway before they begin this.
    """
    if jax.process_count() == 1:
        return mine
    jax.block_until_ready(after)
    return int(np.max(multihost_utils.process_allgather(np.int32(mine))))
