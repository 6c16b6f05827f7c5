"""Unpacks .zip, .tar and .tar.gz safely. Members' names are keys of a table, never paths."""

import errno
import gzip
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from core.artifacts.limits import MIB, Budget
from core.errors import DataInvalid, StillroomError, TooLarge

_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    gzip.BadGzipFile,
    EOFError,
    ValueError,
    NotImplementedError,
    IndexError,
    OverflowError,
    RecursionError,
    struct.error,
)
_PLAIN_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def check_name(name: str) -> str:
    """Return the member's name normalised, or raise DataInvalid where it could leave a folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    bad = (
        not parts
        or len(name) > 512
        or len(parts) > 16
        or name.startswith("/")
        or ".." in parts
        or "\\" in name
        or parts[0][1:2] == ":"
        or not name.isprintable()
    )
    if bad:
        raise DataInvalid(
            f"the archive holds a member named {name[:80]!r}; names must be relative, without "
            "'..', backslashes, drive letters or control characters"
        )
    return "/".join(parts)


@contextmanager
def open_zip(path: Path, budget: Budget) -> Iterator[Mapping[str, tuple[zipfile.ZipFile, str]]]:
    """Open a zip whose listing is safe: name -> what ``open_member`` needs."""
    with _broken("zip"), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        _check_count(len(infos), budget)
        found: dict[str, tuple[zipfile.ZipFile, str]] = {}
        for info in infos:
            name = _check_zip_member(info)
            # What a member takes in the file is told too: never believe more than the whole file.
            packed_bytes = min(info.compress_size, path.stat().st_size)
            budget.check_member(name, size_bytes=info.file_size, compressed_bytes=packed_bytes)
            if info.is_dir():
                continue
            if name in found:
                raise DataInvalid(f"the archive holds {name!r} twice")
            found[name] = (archive, info.filename)
        yield found


@contextmanager
def open_member(member: tuple[zipfile.ZipFile, str]) -> Iterator[tuple[IO[bytes], int]]:
    """Open one member for reading; gives its stream and told size."""
    archive, name = member
    with _broken("zip"), archive.open(name) as stream:
        yield stream, archive.getinfo(name).file_size


def extract_zip(path: Path, folder: Path, budget: Budget) -> dict[str, Path]:
    """Unpack every member into ``folder`` under a made-up name; return member name -> path."""
    files: dict[str, Path] = {}
    with open_zip(path, budget) as members:
        for name, member in members.items():
            target = folder / f"member-{len(files)}"
            with open_member(member) as (stream, size_bytes):
                _copy(stream, target, name, size_bytes, budget)
            files[name] = target
    return files


def extract_tar(path: Path, folder: Path, budget: Budget) -> dict[str, Path]:
    """Unpack a .tar or .tar.gz like extract_zip; only plain files and folders may be in it."""
    files: dict[str, Path] = {}
    with _broken("tar"), _Forward(path, budget) as stream:
        # Sizes and offsets come from headers: the stream refuses to go back, whatever they say.
        with tarfile.open(mode="r:", fileobj=stream) as archive:
            for count, member in enumerate(archive):
                _check_count(count + 1, budget)
                name = check_name(member.name)
                if member.isdir():
                    continue
                _check_tar_member(member, name, budget)
                if name in files:
                    raise DataInvalid(f"the archive holds {name!r} twice")
                files[name] = folder / f"member-{len(files)}"
                _copy_tar_member(archive, member, files[name], budget)
        stream.drain()
    return files


def _check_count(members: int, budget: Budget) -> None:
    if members > budget.limits.members:
        raise TooLarge(f"the archive holds more than {budget.limits.members} members")


def _check_zip_member(info: zipfile.ZipInfo) -> str:
    name = check_name(info.orig_filename)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataInvalid(f"the archive member {name!r} is a link or a device; pack plain files")
    if info.flag_bits & 0x1:
        raise DataInvalid(f"the archive member {name!r} is encrypted; pack it without a password")
    if info.compress_type not in _PLAIN_METHODS:
        raise DataInvalid(f"the archive member {name!r} must be stored or deflated")
    return name


def _check_tar_member(member: tarfile.TarInfo, name: str, budget: Budget) -> None:
    if not member.isreg() or member.issparse():
        raise DataInvalid(f"the archive member {name!r} is a link, a device or sparse; pack files")
    if member.size < 0:
        raise DataInvalid(f"the archive member {name!r} has a negative size")
    if member.size > budget.limits.member_bytes:
        raise TooLarge(f"{name}: {member.size} bytes; the limit is {budget.limits.member_bytes}")


def _copy_tar_member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path, budget: Budget
) -> None:
    stream = archive.extractfile(member)
    if stream is None:
        raise DataInvalid(f"the archive member {member.name!r} is not a file")
    _copy(stream, target, member.name, member.size, budget)


def _copy(stream: IO[bytes], target: Path, name: str, size_bytes: int, budget: Budget) -> None:
    written = 0
    with target.open("xb") as out:
        while step := stream.read(MIB):
            written += len(step)
            budget.spend(len(step), name)
            if written > size_bytes:
                raise DataInvalid(f"{name}: longer than the {size_bytes} bytes its header tells")
            out.write(step)
    if written != size_bytes:
        raise DataInvalid(f"{name}: ends after {written} of {size_bytes} bytes; upload it again")


@contextmanager
def _broken(what: str) -> Iterator[None]:
    try:
        yield
    except StillroomError:
        raise
    except (*_BROKEN, OSError) as error:
        # A listing may point before the file's start; a real disk error stays one.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DataInvalid(
            f"the {what} archive is truncated or damaged ({error}); pack and upload it again"
        ) from error


class _Forward(io.RawIOBase):
    """A file, gunzipped where it is gzip, that only moves forward and counts what it inflates."""

    def __init__(self, path: Path, budget: Budget) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._budget = budget
        self._packed_bytes = path.stat().st_size
        self._at = 0
        gzipped = self._file.read(2) == b"\x1f\x8b"
        self._file.seek(0)
        self._stream = gzip.GzipFile(fileobj=self._file) if gzipped else self._file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= 8 * MIB:
            raise TooLarge(f"the tar archive has a header of {size} bytes")
        data = self._stream.read(size)
        self._at += len(data)
        limits = self._budget.limits
        if self._at > limits.inflated_bytes + limits.members * 1024:
            raise TooLarge(f"the archive unpacks to more than {limits.inflated_bytes} bytes in all")
        grown = self._at > limits.ratio_floor_bytes
        if grown and self._at > limits.ratio * self._packed_bytes:
            raise TooLarge(f"the archive unpacks to more than {limits.ratio} times its size")
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence != io.SEEK_SET or offset < self._at:
            raise DataInvalid("the tar archive's headers point backwards")
        while self._at < offset and self.read(min(MIB, offset - self._at)):
            pass
        return self._at

    def drain(self) -> None:
        """Read to the end, so that a gzip checksum is checked and a cut tail is noticed."""
        while self.read(MIB):
            pass

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()
