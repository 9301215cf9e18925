"""Read the header of a GGUF file, trusting none of it.

The header is metadata followed by the name, shape, type and place of every tensor. All counts and lengths
in it are checked against the size of the file before anything of that size is read or allocated, and all
tensors against each other, so that a damaged or hostile file ends in one clear error.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import itertools
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ponder.models.messages import quoted

__all__ = ["GGUFHeader", "TensorInfo", "read_header", "read_tensor"]

MAX_HEADER_BYTES = 1 << 27
"""Far above any vocabulary: 262 thousand tokens with their merges take less than 2^24."""

MAX_ARRAY_LENGTH = 1 << 22

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
# What one entry takes at least: a count above this many in the rest of the file is a lie.
_MIN_FIELD_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


class TensorInfo(NamedTuple):
    """Where a tensor lies and how it is stored.

    Attributes:
        shape: slowest dimension first, `[out, in]`, which is the reverse of the order in the file.
        type_id: number of its (quantisation) type.
        offset: of its first byte, from the start of the file.
        row_bytes: bytes of one row, that is of the last dimension.
        num_bytes: bytes of the whole tensor.
    """

    shape: tuple[int, ...]
    type_id: int
    offset: int
    row_bytes: int
    num_bytes: int


class GGUFHeader(NamedTuple):
    """Metadata by key (numbers, strings, and lists of either) and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path, block_sizes: dict[int, tuple[int, int]]) -> GGUFHeader:
    """Read metadata and the places of tensors.

    Args:
        path: a GGUF file.
        block_sizes: type number -> elements and bytes of one quantisation block.

    Raises:
        ValueError: the file is not GGUF, or damaged; the message names the file and the place.
        NotImplementedError: another version, byte order or tensor type than is known.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        cursor = _Cursor(file, path.name, min(size, MAX_HEADER_BYTES))
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"{path.name} is not a GGUF file: it starts with {magic!r}, not b'GGUF'.")
        version = cursor.scalar("I", "version")
        if version not in (2, 3):
            kind = "big-endian files" if version and version & 0xFFFF == 0 else f"version {version}"
            raise NotImplementedError(
                f"{path.name}: GGUF {kind} not supported; supported are versions 2 and 3."
            )
        num_tensors, num_fields = cursor.scalar("Q", "tensor count"), cursor.scalar("Q", "metadata count")
        cursor.expect_room(num_fields, _MIN_FIELD_BYTES, "metadata fields")
        cursor.expect_room(num_tensors, _MIN_TENSOR_BYTES, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = cursor.string("metadata key")
            if key in metadata:
                raise cursor.damaged(f"the metadata key {quoted(key)} comes twice")
            metadata[key] = cursor.value(quoted(key))
        raw = [_read_info(cursor) for _ in range(num_tensors)]
        start = _data_start(cursor, metadata)

    tensors: dict[str, TensorInfo] = {}
    for name, dimensions, type_id, offset in raw:
        if name in tensors:
            raise cursor.damaged(f"the tensor {quoted(name)} comes twice")
        if type_id not in block_sizes:
            raise NotImplementedError(f"{path.name}: tensor {quoted(name)} has the unknown type {type_id}.")
        tensors[name] = _place(cursor, name, dimensions, type_id, start + offset, block_sizes[type_id], size)
    _refuse_overlaps(cursor, tensors)
    return GGUFHeader(metadata, tensors)


def read_tensor(path: Path, info: TensorInfo) -> np.ndarray:
    """Return the stored bytes of a tensor, uint8 `[..., row_bytes]`.

    Read rather than mapped: a file that shrinks meanwhile is then an error, and not a fatal signal.
    """
    data = np.fromfile(path, np.uint8, info.num_bytes, offset=info.offset)
    if data.size != info.num_bytes:
        raise ValueError(f"{path.name} is a damaged or truncated GGUF file: it shrank while it was read.")
    return data.reshape(*info.shape[:-1], info.row_bytes)


class _Cursor:
    """Reads values one after another, never beyond what the file (or the limit for headers) holds."""

    def __init__(self, file: BinaryIO, name: str, limit: int):
        self.file, self.name, self.limit = file, name, limit

    def damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.name} is a damaged or truncated GGUF file: {what}.")

    def expect_room(self, count: int, bytes_each: int, what: str) -> None:
        room = self.limit - self.file.tell()
        if count * bytes_each > room:
            raise self.damaged(f"{count} {what} do not fit into the {max(room, 0)} bytes that follow")

    def take(self, count: int, what: str) -> bytes:
        self.expect_room(count, 1, f"bytes of the {what}")
        data = self.file.read(count)
        if len(data) != count:
            raise self.damaged(f"the file ends within the {what}")
        return data

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0]

    def string(self, what: str) -> str:
        data = self.take(self.scalar("Q", f"length of the {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"the {what} is not UTF-8 ({error.reason})") from None

    def value(self, key: str) -> Any:
        kind = self.scalar("I", f"type of {key}")
        if kind == _STRING:
            return self.string(f"value of {key}")
        if kind != _ARRAY:
            return self.scalar(self._code(kind, key), f"value of {key}")
        kind, length = self.scalar("I", f"type of {key}"), self.scalar("Q", f"length of {key}")
        if kind == _ARRAY:
            raise self.damaged(f"{key} is an array of arrays, which no known key is")
        if length > MAX_ARRAY_LENGTH:
            raise self.damaged(f"{key} has {length} entries, more than {MAX_ARRAY_LENGTH}")
        if kind == _STRING:
            self.expect_room(length, 8, f"strings of {key}")
            return [self.string(f"value of {key}") for _ in range(length)]
        code = self._code(kind, key)
        self.expect_room(length, struct.calcsize(code), f"entries of {key}")
        return list(struct.unpack(f"<{length}{code}", self.take(length * struct.calcsize(code), key)))

    def _code(self, kind: int, key: str) -> str:
        if kind not in _SCALARS:
            raise self.damaged(f"{key} has the unknown type {kind}")
        return _SCALARS[kind]


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("name of a tensor")
    num_dimensions = cursor.scalar("I", f"number of dimensions of {quoted(name)}")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise cursor.damaged(
            f"the tensor {quoted(name)} has {num_dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}"
        )
    dimensions = tuple(cursor.scalar("Q", f"shape of {quoted(name)}") for _ in range(num_dimensions))
    type_id = cursor.scalar("I", f"type of {quoted(name)}")
    return name, dimensions, type_id, cursor.scalar("Q", f"offset of {quoted(name)}")


def _data_start(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {quoted(alignment)}, which is no power of two")
    return -(-cursor.file.tell() // alignment) * alignment


def _place(
    cursor: _Cursor,
    name: str,
    dimensions: tuple[int, ...],
    type_id: int,
    offset: int,
    block: tuple[int, int],
    file_size: int,
) -> TensorInfo:
    elements, num_bytes = block
    if 0 in dimensions or dimensions[0] % elements:
        raise cursor.damaged(
            f"the tensor {quoted(name)} has the dimensions {dimensions}, not a multiple of {elements} a row"
        )
    row_bytes = dimensions[0] // elements * num_bytes
    size = row_bytes * math.prod(dimensions[1:])
    if offset + size > file_size:
        raise cursor.damaged(
            f"the tensor {quoted(name)} ends at byte {offset + size}, but the file at {file_size}"
        )
    return TensorInfo(tuple(reversed(dimensions)), type_id, offset, row_bytes, size)


def _refuse_overlaps(cursor: _Cursor, tensors: dict[str, TensorInfo]) -> None:
    placed = sorted(tensors.items(), key=lambda item: item[1].offset)
    for (before, first), (after, second) in itertools.pairwise(placed):
        if first.offset + first.num_bytes > second.offset:
            raise cursor.damaged(f"the tensors {quoted(before)} and {quoted(after)} overlap")
