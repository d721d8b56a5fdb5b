"""Generation over a ring: weights held once, a sharded cache, ring prefill, merged decode."""

from .engine import Engine as Engine, Generation as Generation
from .sampling import Sampler as Sampler
