"""TensorFlow checkpoints (`model.ckpt.index` and `model.ckpt.data-00000-of-00001`) without TensorFlow.

The index is a sorted string table: blocks of prefix-compressed keys, a block of the blocks' places, and a footer of 48 bytes
that ends in a magic number. Its first entry, "", says how many data files there are; every other is a variable's name with its
dtype, shape, data file, offset and size. Every length, place and checksum of the index is checked before it is used; the
variables' own checksums are not.

    https://github.com/google/leveldb/blob/main/doc/table_format.md                                       the table
    https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/tensor_bundle.proto     what its entries hold
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgpt.checkpoints.names import CheckpointError

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
TRAILER = 5  # after a block: one byte of compression, four of checksum
MAX_INDEX_BYTES = 2**22  # GPT-2 XL's is under 50 kB
# tensorflow/core/framework/types.proto
DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}


@dataclass(frozen=True)
class Variable:
    """Where a variable lies; dtype is None where it is not a float."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int

    def read(self) -> Tensor:
        """The variable, from its data file."""
        assert self.dtype is not None
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            data = bytearray(file.read(self.size))
        if len(data) != self.size:
            raise CheckpointError(f"{self.file} was cut while it was read")
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape) if data else torch.empty(self.shape)


def is_index(path: Path) -> bool:
    """Whether a file ends as a table does."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        return size >= FOOTER and file.read() == struct.pack("<Q", MAGIC)


def variables(index: Path) -> dict[str, Variable]:
    """Name -> variable of a checkpoint, by its .index file. CheckpointError for anything that isn't one, or isn't whole."""
    size = index.stat().st_size
    if size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{index} has {size:,} bytes; at most {MAX_INDEX_BYTES:,} are read")
    try:
        return _variables(index, index.read_bytes())
    except (_Malformed, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index} is not a whole TensorFlow index: {error}") from error


class _Malformed(Exception):
    pass


def _variables(index: Path, data: bytes) -> dict[str, Variable]:
    if len(data) < FOOTER or struct.unpack("<Q", data[-8:])[0] != MAGIC:
        raise _Malformed("it doesn't end in a table's footer")
    entries: dict[str, bytes] = {}
    metaindex, at = _handle(data, len(data) - FOOTER)
    _block(data, *metaindex)  # holds nothing, and is to be whole all the same
    (start, length), _ = _handle(data, at)
    for _, place in _entries(_block(data, start, length)):
        (start, length), _ = _handle(place, 0)
        for key, value in _entries(_block(data, start, length)):
            name = key.decode()
            if name in entries:
                raise _Malformed(f"it has {name!r} twice")
            entries[name] = value
    if "" not in entries:
        raise _Malformed("it has no header")
    header = _fields(entries.pop(""))
    shards = _int(header, 1, default=1)
    if not 1 <= shards <= 10_000:
        raise _Malformed(f"it is said to have {shards} data files")
    if _int(header, 2):
        raise _Malformed("its data is big-endian, and only little-endian is read")
    sizes: dict[Path, int] = {}
    out = {}
    for name, value in entries.items():
        fields = _fields(value)
        if 7 in fields:
            raise _Malformed(f"{name!r} is stored in slices, which aren't read")
        shard, offset, size = (_int(fields, number) for number in (3, 4, 5))
        if shard >= shards:
            raise _Malformed(f"{name!r} is in data file {shard} of {shards}")
        file = index.with_suffix(f".data-{shard:05d}-of-{shards:05d}")
        if file not in sizes:
            if not file.is_file():
                raise CheckpointError(f"{index} needs {file.name}, which isn't there")
            sizes[file] = file.stat().st_size
        if offset + size > sizes[file]:
            raise CheckpointError(f"{name!r} should end at byte {offset + size:,} of {file}, which has {sizes[file]:,}")
        shape = _shape(fields.get(2, b""))
        dtype = DTYPES.get(_int(fields, 1))
        if dtype is not None and math.prod(shape) * dtype.itemsize != size:
            raise _Malformed(f"{name!r} of shape {list(shape)} and {dtype} is said to have {size:,} bytes")
        out[name] = Variable(dtype, shape, file, offset, size)
    return out


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, place after it) of at most 64 bits."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise _Malformed("a number is cut")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
    raise _Malformed("a number has more than 64 bits")


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """((offset, size) of a block, place after it)."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(data: bytes, offset: int, size: int) -> bytes:
    end = offset + size
    if end + TRAILER > len(data) - FOOTER:
        raise _Malformed(f"a block should end at byte {end + TRAILER:,}, past the end")
    if data[end] != 0:
        raise _Malformed("it is compressed (snappy), which isn't read; TensorFlow writes checkpoints uncompressed")
    (stored,) = struct.unpack_from("<I", data, end + 1)
    if _masked(_crc32c(data[offset : end + 1])) != stored:
        raise _Malformed("a checksum is wrong")
    return data[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of a block: each key is the first bytes of the one before and some of its own."""
    if len(block) < 4:
        raise _Malformed("a block is cut")
    (restarts,) = struct.unpack_from("<I", block, len(block) - 4)
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise _Malformed("a block is cut")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + own + length > end:
            raise _Malformed("an entry is longer than its block")
        key = key[:shared] + block[at : at + own]
        at += own
        yield key, block[at : at + length]
        at += length


def _fields(message: bytes) -> dict[int, int | bytes]:
    """Field number -> value of a protocol buffer; of a repeated field the last, of dimensions see `_shape`."""
    return dict(_repeated(message))


def _repeated(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise _Malformed(f"a field is of wire type {kind}")
        length, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + length > len(message):
            raise _Malformed("a field is cut")
        yield tag >> 3, message[at : at + length]
        at += length


def _int(fields: dict[int, int | bytes], number: int, default: int = 0) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise _Malformed(f"field {number} isn't a number")
    return value


def _shape(message: int | bytes) -> tuple[int, ...]:
    if not isinstance(message, bytes):
        raise _Malformed("a shape isn't a message")
    sizes = []
    for number, value in _repeated(message):
        if number == 3 and value:
            raise _Malformed("a variable's rank is unknown")
        if number == 2:
            sizes.append(_int(_fields(value), 1) if isinstance(value, bytes) else -1)
    if len(sizes) > 8 or any(not 0 <= size < 2**40 for size in sizes):
        raise _Malformed(f"a variable has shape {sizes[:9]}")
    return tuple(sizes)


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC_TABLE = _crc_table()


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked(crc: int) -> int:
    """As tables keep checksums, so that a checksum of checksums isn't degenerate."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
