"""The header of a GGUF file: metadata and where each tensor lies.

The ``gguf`` package has a reader too. It reports a cut-off file as an index error deep inside NumPy
and takes seconds over a vocabulary, so ringjax reads the header itself and leaves to the package
what it is best at: quantized blocks.

References:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import os
import pathlib
import struct
from typing import Any

import numpy as np

from .base import CheckpointError, UnsupportedCheckpointError, import_optional

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Value type to struct code: the scalar types of the specification.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"} | {
    10: "Q",
    11: "q",
    12: "d",
}
_MAX_DIMS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies and in which form.

    Attributes:
        name: The name in the file.
        shape: NumPy order, slowest first: the reverse of what the file says.
        type_id: The ggml quantization type.
        offset: From the start of the file, in bytes.
        num_bytes: Stored size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """A parsed header: metadata by key, tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: pathlib.Path) -> GGUFHeader:
    """Parse a GGUF header and check that the file holds every byte it promises.

    Raises:
        CheckpointError: If the file is cut short or is not well formed.
        UnsupportedCheckpointError: If its version, byte order or a tensor type is unknown.
        ImportError: If the package ``gguf`` is not installed.
    """
    with path.open("rb") as file:
        cursor = _Cursor(path, file)
        if (magic := cursor.take(len(MAGIC))) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
        version = cursor.scalar("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            raise UnsupportedCheckpointError(
                f"{path}: GGUF version {version} is not supported"
                + (" (it is a big-endian file)" if swapped else "")
                + f": ringjax reads versions {' and '.join(map(str, _VERSIONS))}, little-endian"
            )
        num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
        metadata = dict(cursor.field() for _ in range(num_fields))
        raw = [cursor.tensor() for _ in range(num_tensors)]
        return GGUFHeader(metadata=metadata, tensors=_locate(cursor, metadata, raw))


def _locate(
    cursor: "_Cursor", metadata: dict[str, Any], raw: list[tuple[str, tuple[int, ...], int, int]]
) -> dict[str, TensorInfo]:
    """Turn offsets within the data section into offsets within a file that is long enough."""
    sizes: dict[int, tuple[int, int]] = import_optional("gguf", "reading GGUF files").GGML_QUANT_SIZES
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise CheckpointError(f"{cursor.path}: general.alignment must be a power of two, got {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, type_id, offset in raw:
        if type_id not in sizes:
            raise UnsupportedCheckpointError(
                f"{cursor.path}: tensor {name!r} is of ggml type {type_id}, which the installed "
                "gguf package does not know"
            )
        if name in tensors:
            raise CheckpointError(f"{cursor.path}: tensor {name!r} is listed twice")
        block_size, block_bytes = sizes[type_id]
        if not shape or shape[-1] % block_size:
            raise CheckpointError(
                f"{cursor.path}: tensor {name!r} of shape {shape} does not divide into blocks of {block_size}"
            )
        tensors[name] = TensorInfo(
            name=name,
            shape=shape,
            type_id=type_id,
            offset=data_start + offset,
            num_bytes=math.prod(shape) // block_size * block_bytes,
        )
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=0)
    if end > cursor.size:
        raise CheckpointError(
            f"{cursor.path} is truncated: its header promises {end} bytes, the file has "
            f"{cursor.size}; download it again"
        )
    return tensors


class _Cursor:
    """Reads a header front to back, never past the end of the file."""

    def __init__(self, path: pathlib.Path, file: Any) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self._file = file

    def take(self, num_bytes: int) -> bytes:
        # Checked before reading: a damaged length must not allocate what it claims.
        if self.position + num_bytes > self.size:
            raise CheckpointError(
                f"{self.path} is truncated or damaged in its header: it needs "
                f"{self.position + num_bytes} bytes there, the file has {self.size}"
            )
        self.position += num_bytes
        return self._file.read(num_bytes)

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        # Vocabularies contain byte tokens that are not valid UTF-8 in a few old files.
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def field(self) -> tuple[str, Any]:
        key = self.string()
        return key, self._value(key, self.scalar("I"))

    def _value(self, key: str, kind: int) -> Any:
        match kind:
            case _ if kind in _SCALARS:
                return self.scalar(_SCALARS[kind])
            case _ if kind == _STRING:
                return self.string()
            case _ if kind == _ARRAY:
                return self._array(key)
            case _:
                raise CheckpointError(f"{self.path}: metadata {key!r} is of the unknown value type {kind}")

    def _array(self, key: str) -> list[Any]:
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind == _ARRAY:
            raise CheckpointError(f"{self.path}: metadata {key!r} is an array of arrays")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
            return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()
        return [self._value(key, kind) for _ in range(length)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        num_dims = self.scalar("I")
        if num_dims > _MAX_DIMS:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} claims {num_dims} dimensions; GGUF has at most {_MAX_DIMS}"
            )
        shape = tuple(self.scalar("Q") for _ in range(num_dims))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")
