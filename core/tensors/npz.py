"""Tables of arrays as .npz: written as a stream, the same bytes every time; read in blocks.

For files of our own making and a user's local ones. What was uploaded is unpacked in the sandbox.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, Self

import numpy as np

from core.errors import DataInvalid
from core.tensors import npy
from core.tensors.shards import Array

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The oldest date a zip holds: when a file was written must not change its bytes."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    NotImplementedError,
    OverflowError,
    struct.error,
)


class NpzWriter:
    """Writes one array after another into an open file; not compressed, ZIP64 where it must be."""

    def __init__(self, file: BinaryIO) -> None:
        """Take an empty file that can seek; the caller opens, syncs and closes it."""
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Write the list of members; after an error it leaves a file that nobody should keep."""
        self._zip.close()

    def add(self, name: str, array: Array) -> None:
        """Write a small array whole."""
        self.add_blocks(name, array.dtype, array.shape, [np.atleast_1d(array)])

    def add_blocks(
        self,
        name: str,
        dtype: np.dtype[np.generic],
        shape: tuple[int, ...],
        blocks: Iterable[Array],
    ) -> None:
        """Write an array whose blocks, one after another along the first axis, come as they come.

        Raises:
            ValueError: a block is of another dtype, or the blocks do not fill the shape.
        """
        head = npy.header_bytes(dtype, shape)
        left = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
        info.create_system, info.external_attr = 3, 0o644 << 16
        info.file_size = len(head) + left  # by which the format decides on ZIP64
        with self._zip.open(info, "w") as member:
            member.write(head)
            for block in blocks:
                if block.dtype != dtype:
                    raise ValueError(f"{name}: a block of {block.dtype} in an array of {dtype}")
                left -= block.nbytes
                member.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        if left:
            raise ValueError(f"{name}: the blocks miss the shape {list(shape)} by {left} bytes")


class NpzFile:
    """An open .npz; every array is read through ``core.tensors.npy``, never unpickled."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        """Take an archive that ``open_npz`` opened and checked."""
        self.path = path
        self._zip = archive
        self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    @property
    def names(self) -> set[str]:
        """The arrays in the file."""
        return set(self._members)

    def header(self, name: str) -> npy.Header:
        """Return dtype and shape of an array, without its data."""
        with self._open(name) as (stream, size_bytes, shown):
            return npy.read_header(stream, size_bytes=size_bytes, name=shown)

    def array(self, name: str, *, most_bytes: int) -> Array:
        """Read an array that takes at most ``most_bytes``."""
        if self._info(name).file_size > most_bytes:
            raise DataInvalid(
                f"{self._shown(name)}: {self._info(name).file_size} bytes; at most {most_bytes}"
            )
        with self._open(name) as (stream, size_bytes, shown):
            return npy.read_array(stream, size_bytes=size_bytes, name=shown)

    def blocks(self, name: str, *, block_bytes: int) -> Iterator[Array]:
        """Yield the rows of an array, some ``block_bytes`` at a time; its checksum is checked."""
        with self._open(name) as (stream, size_bytes, shown):
            header = npy.read_header(stream, size_bytes=size_bytes, name=shown)
            yield from npy.read_blocks(stream, header, block_bytes=block_bytes, name=shown)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Read rows start..stop-1 alone, of an array written by ``NpzWriter``; no checksum.

        Raises:
            DataInvalid: the array is packed or has its columns first, or lacks those rows.
        """
        info, shown = self._info(name), self._shown(name)
        with self.path.open("rb") as file, _broken(shown):
            file.seek(info.header_offset)
            magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            if magic != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
                raise DataInvalid(f"{shown}: packed; rows alone are read from plain arrays")
            file.seek(name_bytes + extra_bytes, 1)
            header = npy.read_header(file, size_bytes=info.file_size, name=shown)
            if header.fortran or not header.shape or not 0 <= start < stop <= header.shape[0]:
                raise DataInvalid(f"{shown}: shape {list(header.shape)}; needed {start} to {stop}")
            file.seek(start * header.row_bytes, 1)
            return npy.read_rows(file, header, stop - start, name=shown)

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            there = ", ".join(sorted(self._members)[:12]) or "nothing"
            raise DataInvalid(f"{self._shown(name)}: missing; the file holds {there}")
        return self._members[name]

    def _shown(self, name: str) -> str:
        return f"{self.path.name}: {name}"

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], int, str]]:
        info, shown = self._info(name), self._shown(name)
        with _broken(shown), self._zip.open(info) as stream:
            yield stream, info.file_size, shown


@contextmanager
def open_npz(path: Path) -> Iterator[NpzFile]:
    """Open an .npz for reading.

    Raises:
        DataInvalid: it is no zip of plain .npy members, each once, or it is damaged.
        OSError: there is no such file, or the disk is broken.
    """
    with path.open("rb") as file:
        with _broken(path.name):
            archive = zipfile.ZipFile(file)
        with archive:
            names = [info.filename for info in archive.infolist()]
            if len(set(names)) < len(names):
                raise DataInvalid(f"{path.name}: holds an array twice")
            for info in archive.infolist():
                _check_member(path.name, info)
            yield NpzFile(path, archive)


def _check_member(file_name: str, info: zipfile.ZipInfo) -> None:
    plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if not plain or info.flag_bits & 1 or not info.filename.endswith(".npy"):
        raise DataInvalid(
            f"{file_name}: member {info.filename[:80]!r}; needed arrays as numpy.savez writes them"
        )


@contextmanager
def _broken(shown: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise DataInvalid(f"{shown}: truncated or damaged ({error})") from error
