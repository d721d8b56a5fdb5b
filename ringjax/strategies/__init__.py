"""What travels round the ring: one file per way to move data."""

from .base import Problem as Problem
from .rotate_kv import rotate_kv as rotate_kv

__all__ = ["Problem", "rotate_kv"]
