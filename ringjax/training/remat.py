"""What the backward pass finds kept, and what it computes again."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh

__all__ = ["Remat", "check_remat", "with_remat"]

Remat = Literal["none", "inputs", "inputs_attention", "offload_inputs", "offload_inputs_attention"]

LAYER_INPUTS = ("layer_input",)
# What ring attention calls its results; with them, the backward pass goes round the ring once less.
ATTENTION = ("ring_attention_out", "ring_attention_lse")
HOST = "pinned_host"


def with_remat(layer: Callable, remat: Remat) -> Callable:
    """The function of one layer, to be scanned over.

    Args:
        layer: of the stream and the layer's parameters.
        remat: what is kept.

            - `"none"`: everything is kept, gathered parameters too, and nothing computed again.
            - `"inputs"`: the inputs of the layers.
            - `"inputs_attention"`: these, and the outputs of attention, which is not computed again.
            - `"offload_inputs"`: the inputs, in the host's memory.
            - `"offload_inputs_attention"`: both, in the host's memory.
    """
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return layer
        case "inputs":
            policy = policies.nothing_saveable
        case "inputs_attention":
            policy = policies.save_only_these_names(*ATTENTION)
        case "offload_inputs":
            policy = _offload(*LAYER_INPUTS)
        case "offload_inputs_attention":
            policy = _offload(*LAYER_INPUTS, *ATTENTION)
    # In a scan nothing else could be merged with what is computed again.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _offload(*names: str) -> Any:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst=HOST,
    )


def check_remat(remat: Remat, mesh: Mesh | AbstractMesh) -> None:
    """Raises where the devices cannot do it.

    Raises:
        NotImplementedError: memory of the host is asked for, and the mesh is one of CPUs.
    """
    if remat.startswith("offload") and isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu":
        raise NotImplementedError(
            f"remat {remat!r}, a config's train.remat, moves arrays to the host's memory, and CPUs have no "
            f"other: XLA compiles that for accelerators only. Take {remat.removeprefix('offload_')!r} here."
        )
