"""Documents to rows of one length: long documents are split, short ones share a row.

Each token is the input of one place, and each but the first of its document the target of one: the last
token of a piece has the first of the next one as its target. A last token that would be a piece alone is no
input, as it has no target; so every row has targets.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .batch import Batch
from .corpus import Corpus

__all__ = ["PackedRows", "Piece", "empty_row", "pack", "pieces"]


class Piece(NamedTuple):
    """Tokens `start` to `start + size` of a document."""

    document: int
    start: int
    size: int


def empty_row(length: int) -> Batch:
    """Padding alone, in natural order, each array `T`."""
    tokens, targets, segment_ids = np.zeros((3, length), np.int32)
    weights, positions = np.zeros(length, np.float32), np.full(length, -1, np.int32)
    return Batch(tokens, targets, weights, positions, segment_ids)


def pieces(documents: Sequence[int], sizes: Sequence[int], length: int) -> list[Piece]:
    """The documents, cut every `length` tokens; a piece without targets is left out.

    Args:
        documents: their indices.
        sizes: tokens of each of them.
        length: most tokens of a piece.

    Example:
        >>> [tuple(piece) for piece in pieces([3], [10], length=4)]
        [(3, 0, 4), (3, 4, 4), (3, 8, 2)]
        >>> [tuple(piece) for piece in pieces([3], [9], length=4)]
        [(3, 0, 4), (3, 4, 4)]
    """
    return [
        Piece(int(document), start, min(length, int(size) - start))
        for document, size in zip(documents, sizes, strict=True)
        for start in range(0, int(size) - 1, length)
    ]


def pack(found: Sequence[Piece], length: int) -> list[list[Piece]]:
    """Pieces to rows of at most `length` tokens: the largest first, each into the fullest row that takes it.

    Every piece is in one row. The result depends on the pieces alone.

    References:
        Ding et al., "Fewer Truncations Improve Language Modeling", arXiv:2404.10830, §3.2.

    Example:
        >>> rows = pack(pieces([0, 1, 2, 3], [5, 10, 3, 2], length=8), length=8)
        >>> [[tuple(piece) for piece in row] for row in rows]
        [[(1, 0, 8)], [(0, 0, 5), (2, 0, 3)], [(1, 8, 2), (3, 0, 2)]]
    """
    rows: list[list[Piece]] = []
    # Rows by the room they have left, and these rooms in order.
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for piece in sorted(found, key=lambda piece: (-piece.size, piece.document, piece.start)):
        fitting = bisect.bisect_left(rooms, piece.size)
        if fitting == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[fitting]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[fitting]
        rows[row].append(piece)
        if left := room - piece.size:
            if left not in with_room:
                with_room[left] = []
                bisect.insort(rooms, left)
            with_room[left].append(row)
    return rows


class PackedRows:
    """Rows by number: a data source for Grain.

    Args:
        corpus: has the documents.
        documents: indices of those to pack.
        length: of a row, in tokens.

    Example:
        >>> import numpy as np
        >>> corpus = Corpus(tokens=np.arange(10, 15), offsets=np.array([0, 2, 5]), names=("a", "b"))
        >>> row = PackedRows(corpus, [0, 1], length=6)[0]
        >>> row.tokens.tolist(), row.targets.tolist()
        ([12, 13, 14, 10, 11, 0], [13, 14, 0, 11, 0, 0])
        >>> row.positions.tolist(), row.segment_ids.tolist()
        ([0, 1, 2, 0, 1, -1], [1, 1, 1, 2, 2, 0])
    """

    def __init__(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int):
        self.corpus, self.length = corpus, length
        documents = np.asarray(documents, np.int64)
        self.rows = pack(pieces(documents.tolist(), corpus.sizes[documents].tolist(), length), length)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """A row in natural order, each array `T`; segments are counted from 1."""
        row, place = empty_row(self.length), 0
        for segment, piece in enumerate(self.rows[index], 1):
            here = slice(place, place + piece.size)
            document = self.corpus[piece.document]
            targets = document[piece.start + 1 : piece.start + piece.size + 1]
            row.tokens[here] = document[piece.start : piece.start + piece.size]
            row.targets[place : place + len(targets)] = targets
            row.weights[place : place + len(targets)] = 1
            row.positions[here] = np.arange(piece.size)
            row.segment_ids[here] = segment
            place = here.stop
        return row

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, padding not counted."""
        return sum(piece.size for row in self.rows for piece in row)
