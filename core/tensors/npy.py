"""The .npy format without numpy's loader: no pickle, no eval, sizes checked; whole or by rows."""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from core.errors import DataInvalid
from core.tensors.shards import Array

_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248]|[SU][1-9]\d{0,5})")
_HEADER = re.compile(
    r"\{\s*'descr'\s*:\s*(?P<descr>'[^']{1,16}'|\[.*\])\s*,\s*'fortran_order'\s*:\s*"
    r"(?P<fortran>True|False)\s*,\s*'shape'\s*:\s*\((?P<shape>[\d,\s]*)\)\s*,?\s*\}\s*",
    re.DOTALL,
)
_MAGIC = b"\x93NUMPY"
_ALIGNED = 64
"""Bytes to a multiple of which a written header is padded, as the format wants it."""


@dataclass(frozen=True)
class Header:
    """What stands before the data of an .npy."""

    dtype: np.dtype[np.generic]
    """As in the file, of whichever byte order."""
    shape: tuple[int, ...]
    fortran: bool
    """Columns first."""
    size_bytes: int
    """Of the header itself."""

    @property
    def row_bytes(self) -> int:
        """What one entry of the first axis takes."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def parse_dtype(code: str, *, name: str) -> np.dtype[np.generic]:
    """Return the dtype of a code like ``<f4``; DataInvalid for objects, records and the rest."""
    if "O" in code:
        raise DataInvalid(
            f"{name}: an object array (Python objects inside); save it with a plain dtype, "
            "for example np.asarray(x, dtype='float32') or dtype=str"
        )
    if not _DTYPE.fullmatch(code):
        raise DataInvalid(
            f"{name}: dtype {code[:40]!r}; allowed: bool, integers, float16, float32, float64, text"
        )
    return np.dtype(code)


def check_shape(shape: tuple[int, ...], *, itemsize: int, size_bytes: int, name: str) -> None:
    """Raise DataInvalid unless the shape takes exactly ``size_bytes``."""
    if len(shape) > 8:
        raise DataInvalid(f"{name}: {len(shape)} axes; at most 8 are read")
    if math.prod(shape) * itemsize != size_bytes:
        raise DataInvalid(
            f"{name}: shape {list(shape)} needs {math.prod(shape) * itemsize} bytes and "
            f"{size_bytes} are there; the file is truncated or its header is wrong"
        )


def read_header(stream: IO[bytes], *, size_bytes: int, name: str) -> Header:
    """Read what stands before the data of an array of ``size_bytes`` in all, and check it."""
    text, header_bytes = _header_text(stream, name)
    match = _HEADER.fullmatch(text)
    if match is None:
        raise DataInvalid(f"{name}: not a readable .npy header: {text[:80]!r}")
    dtype = parse_dtype(match["descr"].strip("'"), name=name)
    if not re.fullmatch(r"\s*(?:\d{1,18}\s*(?:,\s*\d{1,18}\s*)*,?)?\s*", match["shape"]):
        raise DataInvalid(f"{name}: shape ({match['shape'][:60]}) is not a list of sizes")
    shape = tuple(int(size) for size in match["shape"].split(",") if size.strip())
    check_shape(shape, itemsize=dtype.itemsize, size_bytes=size_bytes - header_bytes, name=name)
    return Header(dtype, shape, match["fortran"] == "True", header_bytes)


def read_array(stream: IO[bytes], *, size_bytes: int, name: str) -> Array:
    """Read one array of ``size_bytes`` with its header; native byte order, C order."""
    header = read_header(stream, size_bytes=size_bytes, name=name)
    return _rest(stream, header, name)


def read_blocks(
    stream: IO[bytes], header: Header, *, block_bytes: int, name: str
) -> Iterator[Array]:
    """Yield the rows after a header, some ``block_bytes`` at a time, at least one row each.

    An array with its columns first comes as one block: its rows are spread over the whole file.

    Raises:
        DataInvalid: the data end early or late; told before the last block is handed out.
    """
    if header.fortran or header.row_bytes == 0 or len(header.shape) < 2:
        yield _rest(stream, header, name)
        return
    rows = max(1, block_bytes // header.row_bytes)
    for start in range(0, header.shape[0], rows):
        stop = min(start + rows, header.shape[0])
        block = read_rows(stream, header, stop - start, name=name)
        if stop == header.shape[0]:
            _check_end(stream, name)
        yield block


def read_rows(stream: IO[bytes], header: Header, rows: int, *, name: str) -> Array:
    """Read the next ``rows`` rows of a C-ordered array, wherever the stream stands."""
    return _fill(stream, header, (rows, *header.shape[1:]), name)


def header_bytes(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> bytes:
    """Return what to write before the data of a C-ordered array: format version 1.0."""
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    padding = -(len(_MAGIC) + 4 + len(text) + 1) % _ALIGNED
    text = f"{text}{' ' * padding}\n"
    return _MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin-1")


def _rest(stream: IO[bytes], header: Header, name: str) -> Array:
    """Read all data after the header."""
    array = _fill(stream, header, header.shape, name)
    _check_end(stream, name)
    return array


def _fill(stream: IO[bytes], header: Header, shape: tuple[int, ...], name: str) -> Array:
    flat = np.empty(math.prod(shape), header.dtype)
    _read_into(stream, flat.view(np.uint8).data, name)
    array = flat.reshape(shape, order="F" if header.fortran else "C")
    native = array.astype(header.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(native).reshape(shape)


def _check_end(stream: IO[bytes], name: str) -> None:
    if stream.read(1):
        raise DataInvalid(f"{name}: bytes follow the array")


def _header_text(stream: IO[bytes], name: str) -> tuple[str, int]:
    """Return the header's text and how many bytes come before the data."""
    start = stream.read(8)
    if start[:6] != _MAGIC or len(start) < 8 or start[6] not in (1, 2, 3):
        raise DataInvalid(f"{name}: not an .npy array")
    width, code = (2, "<H") if start[6] == 1 else (4, "<I")
    packed = stream.read(width)
    length = struct.unpack(code, packed)[0] if len(packed) == width else 0
    if length > 16_384:
        raise DataInvalid(f"{name}: an .npy header of {length} bytes; plain arrays need 128")
    raw = stream.read(length)
    if length == 0 or len(raw) != length:
        raise DataInvalid(f"{name}: truncated inside the .npy header")
    return raw.decode("latin-1"), 8 + width + length


def _read_into(stream: IO[bytes], target: memoryview, name: str) -> None:
    done = 0
    while done < len(target):
        step = stream.read(min(len(target) - done, 1 << 20))
        if not step:
            raise DataInvalid(f"{name}: ends after {done} of {len(target)} bytes; upload it again")
        target[done : done + len(step)] = step
        done += len(step)
