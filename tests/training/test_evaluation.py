"""What the context is worth: documents cut into pieces, and the difference."""

import jax
import numpy as np
import pytest

from ringjax.training.batch import Batch
from ringjax.training.evaluation import ByPosition, _cut


@pytest.mark.parametrize("context", [1, 3, 8, 100])
def test_cut_tokens_share_a_piece_if_they_share_document_and_stretch(rng, context):
    sizes = rng.integers(1, 20, 6)
    segments = np.repeat(np.arange(1, 7), sizes)
    positions = np.concatenate([*map(np.arange, sizes), np.full(5, -1)])
    segments = np.concatenate([segments, np.zeros(5, int)])
    order = rng.permutation(len(segments))  # any layout
    positions, segments = positions[order], segments[order]
    batch = Batch(*(jax.numpy.int32(x[None]) for x in (segments, segments, segments, positions, segments)))
    found = np.asarray(_cut(batch, context=context).segment_ids)[0]
    wanted = list(zip(segments, positions // context, strict=True))
    same = np.array([[a == b for b in wanted] for a in wanted])
    np.testing.assert_array_equal(found[:, None] == found, same)


def test_the_gain_is_of_the_mean_token_beyond_the_short_context():
    parts = {
        "starts": [0, 4, 8, 12],
        "targets": [9, 3, 1, 0],
        "loss": [5.0, 2.0, 1.0, None],
        "short_loss": [5.0, 3.0, 7.0, None],
    }
    assert ByPosition(**parts, short_context=4).gain == pytest.approx((3 * 1.0 + 1 * 6.0) / 4)
    assert ByPosition(**parts, short_context=8).gain == 6.0
    assert ByPosition(**parts, short_context=12).gain is None
