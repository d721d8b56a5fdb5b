"""What travels round the ring: one file per way to move data."""

from typing import Literal

from ..kernels import Tile
from ..payloads import Cast, Latent, Payload, Quantized
from . import all_gather, backwards, double_ring, rotate_kv, rotate_q, ulysses
from .base import Problem as Problem, Strategy as Strategy, Way as Way, attend as attend

__all__ = ["Problem", "Strategy", "Way", "attend", "get_strategy"]


def get_strategy(name: Strategy | Literal["auto"]) -> Way:
    """The functions of a strategy; `"auto"` is one by the time that this is asked."""
    match name:
        case "auto" | "ring":
            return Way(rotate_kv.forward, backwards.backward, _anything)
        case "ring_q":
            return Way(rotate_q.forward, backwards.backward, _no_payload)
        case "double_ring":
            return Way(double_ring.forward, double_ring.backward, _anything)
        case "all_gather":
            return Way(all_gather.forward, all_gather.backward, _anything)
        case "ulysses" | "usp":
            return Way(ulysses.forward, ulysses.backward, _no_latent)


def _anything(tile: Tile, payload: Payload) -> str | None:
    del tile, payload
    return None


def _no_payload(tile: Tile, payload: Payload) -> str | None:
    del tile
    if not isinstance(payload, Cast | Quantized):
        return None
    return "keys and values stay, so a payload would shorten nothing; leave it out, or take 'ring'."


def _no_latent(tile: Tile, payload: Payload) -> str | None:
    del tile
    if isinstance(payload, Latent):
        return "a latent has no heads to split; take 'ring', 'ring_q', 'double_ring' or 'all_gather'."
    return None
