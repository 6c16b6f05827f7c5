"""Reads .npy arrays and .npz tables without numpy's loader: no pickle, no eval, sizes checked."""

import math
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from core.artifacts.importers.archive import open_member, open_zip
from core.artifacts.limits import Budget
from core.errors import DataInvalid
from core.tensors.shards import Array

_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248]|[SU][1-9]\d{0,5})")
_HEADER = re.compile(
    r"\{\s*'descr'\s*:\s*(?P<descr>'[^']{1,16}'|\[.*\])\s*,\s*'fortran_order'\s*:\s*"
    r"(?P<fortran>True|False)\s*,\s*'shape'\s*:\s*\((?P<shape>[\d,\s]*)\)\s*,?\s*\}\s*",
    re.DOTALL,
)
_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class Table:
    """The arrays of an .npz that were asked for, and the names of those that were not."""

    arrays: dict[str, Array]
    ignored: list[str] = field(default_factory=list)


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


def read_npz(path: Path, *, wanted: Collection[str], name: str, budget: Budget) -> Table:
    """Read the wanted arrays of an .npz; those absent are absent from the answer."""
    arrays: dict[str, Array] = {}
    ignored: list[str] = []
    with open_zip(path, budget) as members:
        for member_name, member in members.items():
            key = member_name.removesuffix(".npy")
            if key not in wanted:
                ignored.append(key)
                continue
            if key in arrays:
                raise DataInvalid(f"{name}: {key!r} is in the file twice")
            with open_member(member) as (stream, size_bytes):
                array = read_npy(stream, size_bytes=size_bytes, name=f"{name}: {key}")
            budget.spend(size_bytes, f"{name}: {key}")
            arrays[key] = array
    return Table(arrays, sorted(ignored))


def read_npy(stream: IO[bytes], *, size_bytes: int, name: str) -> Array:
    """Read one array of ``size_bytes`` with its header; native byte order, C order."""
    header, header_bytes = _read_header(stream, name)
    match = _HEADER.fullmatch(header)
    if match is None:
        raise DataInvalid(f"{name}: not a readable .npy header: {header[:80]!r}")
    dtype = parse_dtype(match["descr"].strip("'"), name=name)
    if not re.fullmatch(r"\s*(?:\d{1,18}\s*(?:,\s*\d{1,18}\s*)*,?)?\s*", match["shape"]):
        raise DataInvalid(f"{name}: shape ({match['shape'][:60]}) is not a list of sizes")
    shape = tuple(int(size) for size in match["shape"].split(",") if size.strip())
    data_bytes = size_bytes - header_bytes
    check_shape(shape, itemsize=dtype.itemsize, size_bytes=data_bytes, name=name)
    flat = np.empty(math.prod(shape), dtype)
    _read_into(stream, flat.view(np.uint8).data, name)
    if stream.read(1):
        raise DataInvalid(f"{name}: bytes follow the array")
    array = flat.reshape(shape, order="F" if match["fortran"] == "True" else "C")
    return np.ascontiguousarray(array.astype(dtype.newbyteorder("="), copy=False)).reshape(shape)


def _read_header(stream: IO[bytes], name: str) -> tuple[str, int]:
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
