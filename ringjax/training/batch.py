"""`Batch`: what a training step reads."""

from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

from ..ring import Ring

__all__ = ["Batch"]


class Batch(NamedTuple):
    """Packed documents, each array in the ring's layout order and split over the mesh as `Batch.spec` says.

    Attributes:
        tokens: ids, int32 `B T`.
        targets: the id that follows each token in its document, int32 `B T`; any id where there is none.
        weights: of each target in the loss, float32 `B T`; 0 where there is none, as in the padding and at
            the last token of a document.
        positions: of each token in its document, int32 `B T`; -1 in the padding.
        segment_ids: which document, int32 `B T`; different for any two in a row of the batch.
    """

    tokens: Any
    targets: Any
    weights: Any
    positions: Any
    segment_ids: Any

    @staticmethod
    def spec(ring: Ring) -> P:
        """How each array is split: rows over the ring's batch axes, the sequence over the ring."""
        return P(*ring.spec[:2])

    @classmethod
    def shapes(cls, batch_size: int, length: int, *, mesh: Mesh | AbstractMesh, ring: Ring) -> Self:
        """Shapes, dtypes and shardings, to compile a step ahead of its data.

        Args:
            batch_size: rows, over all devices.
            length: tokens in a row, padding included.
            mesh: the mesh.
            ring: how rows and sequence are distributed.
        """
        sharding = NamedSharding(mesh, cls.spec(ring))
        dtypes = cls(np.int32, np.int32, np.float32, np.int32, np.int32)
        return cls(
            *(jax.ShapeDtypeStruct((batch_size, length), dtype, sharding=sharding) for dtype in dtypes)
        )
