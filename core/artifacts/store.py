"""Blobs under the SHA-256 of their bytes. A blob is whole or absent; no client names a path."""

import fcntl
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Protocol

from core.errors import DataInvalid, NotFound

_HEX = re.compile(r"[0-9a-f]{64}")
_STEP_BYTES = 1 << 20

Referenced = Container[str] | Callable[[str], bool]
"""The hashes that rows still name, or a question that answers for one hash."""


@dataclass(frozen=True)
class Blob:
    """What the store knows of a file."""

    sha256: str
    size_bytes: int


class Store(Protocol):
    """Where blobs live."""

    def identity(self) -> str:
        """Return the store's own name, the same for ever."""

    def put(self, path: Path) -> Blob:
        """Keep a copy of the file at ``path``; putting the same bytes again changes nothing."""

    def path(self, sha256: str) -> Path:
        """Return a local, read-only path of the blob, or raise NotFound."""

    def open(self, sha256: str) -> BinaryIO:
        """Open the blob for reading, or raise NotFound."""

    def has(self, sha256: str) -> bool:
        """Tell whether the whole blob is here."""

    def delete(self, sha256: str) -> None:
        """Remove the blob; one that is gone already is fine."""

    def sweep(
        self, referenced: Referenced, *, older_than: timedelta, now: datetime, dry_run: bool = False
    ) -> list[str]:
        """Remove, and name, what nothing refers to and is older than ``older_than``."""


class LocalStore:
    """Blobs as files: ``blobs/ab/cdef...`` beside ``tmp/``, on one filesystem.

    Temp file, fsync, rename, fsync of the folder: a crash leaves at most a file in ``tmp/``, which
    the sweep takes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._blobs = self.root / "blobs"
        self._tmp = self.root / "tmp"
        for folder in (self._blobs, self._tmp):
            folder.mkdir(parents=True, exist_ok=True)

    def identity(self) -> str:
        """Return this store's own random name, made once: a copy of a database can tell by it."""
        file = self.root / "store-id"
        if not file.exists():
            fresh = self._tmp / f"id-{uuid.uuid4().hex}"
            fresh.write_text(uuid.uuid4().hex)
            with suppress(FileExistsError):
                file.hardlink_to(fresh)
            fresh.unlink()
        return file.read_text()

    def put(self, path: Path) -> Blob:
        """Keep a copy of the file at ``path`` and return its hash and size.

        The hash is of the bytes written, so a source that changes meanwhile cannot lie. Raises
        DataInvalid where ``path`` is no regular file, OSError where the disk is full.
        """
        temp = self._tmp / f"put-{uuid.uuid4().hex}"
        try:
            blob = _copy(path, temp)
            self._publish(temp, blob.sha256)
        finally:
            temp.unlink(missing_ok=True)
        return blob

    def path(self, sha256: str) -> Path:
        """Return the blob's read-only path, or raise NotFound."""
        place = self._place(sha256)
        if not place.is_file():
            raise NotFound(f"no stored file has the hash {sha256}")
        return place

    def open(self, sha256: str) -> BinaryIO:
        """Open the blob for reading, or raise NotFound."""
        try:
            return self._place(sha256).open("rb")
        except FileNotFoundError as error:
            raise NotFound(f"no stored file has the hash {sha256}") from error

    def has(self, sha256: str) -> bool:
        """Tell whether the whole blob is here."""
        return self._place(sha256).is_file()

    def delete(self, sha256: str) -> None:
        """Remove the blob; one that is gone already is fine."""
        place = self._place(sha256)
        place.unlink(missing_ok=True)
        if place.parent.is_dir():
            _sync_folder(place.parent)

    def sweep(
        self, referenced: Referenced, *, older_than: timedelta, now: datetime, dry_run: bool = False
    ) -> list[str]:
        """Remove orphan blobs and stale temp files older than ``older_than``; return their names.

        Age counts from the last ``put``. ``referenced`` is asked again under the store's lock, so
        bytes put a moment ago are never taken. Foreign files under the root are left alone.
        """
        limit = (now - older_than).timestamp()
        asks = referenced if callable(referenced) else referenced.__contains__
        orphans = [sha for sha in self._list() if self._is_orphan(sha, asks, limit)]
        temps = [t for t in sorted(self._tmp.iterdir()) if t.is_file() and _older(t, limit)]
        if not dry_run:
            orphans = [sha for sha in orphans if self._take(sha, asks, limit)]
            for temp in temps:
                temp.unlink(missing_ok=True)
        return orphans + [f"tmp/{temp.name}" for temp in temps]

    def _place(self, sha256: str) -> Path:
        if not _HEX.fullmatch(sha256):
            raise NotFound("a stored file is named by 64 lower-case hexadecimal digits")
        return self._blobs / sha256[:2] / sha256[2:]

    def _publish(self, temp: Path, sha256: str) -> None:
        place = self._place(sha256)
        if not place.parent.is_dir():
            place.parent.mkdir(exist_ok=True)
            _sync_folder(self._blobs)
        # Also where the blob exists: the same bytes, a new age for the sweep, bit rot healed.
        with self._lock(fcntl.LOCK_SH):
            temp.replace(place)
        _sync_folder(place.parent)

    @contextmanager
    def _lock(self, how: int) -> Iterator[None]:
        # Held for one rename or one unlink: it only keeps a sweep from taking what is just put.
        with (self.root / "lock").open("ab") as file:
            fcntl.flock(file, how)
            yield

    def _list(self) -> Iterator[str]:
        for folder in sorted(self._blobs.iterdir()):
            if folder.is_dir():
                names = (folder.name + entry.name for entry in sorted(folder.iterdir()))
                yield from (name for name in names if _HEX.fullmatch(name))

    def _is_orphan(self, sha256: str, asks: Callable[[str], bool], limit: float) -> bool:
        return _older(self._place(sha256), limit) and not asks(sha256)

    def _take(self, sha256: str, asks: Callable[[str], bool], limit: float) -> bool:
        with self._lock(fcntl.LOCK_EX):
            if not self._is_orphan(sha256, asks, limit):
                return False
            self.delete(sha256)
        return True


def _copy(source: Path, temp: Path) -> Blob:
    """Copy to a new read-only file, hashing the bytes on the way; on disk when it returns."""
    digest, size_bytes = hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with _open_regular(source) as reader, os.fdopen(os.open(temp, flags, 0o600), "wb") as writer:
        while step := reader.read(_STEP_BYTES):
            digest.update(step)
            size_bytes += len(step)
            writer.write(step)
        writer.flush()
        os.fchmod(writer.fileno(), 0o444)
        os.fsync(writer.fileno())
    return Blob(digest.hexdigest(), size_bytes)


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file: no link is followed, no pipe is waited for."""
    try:
        # Non-blocking, or a pipe with no writer would hold the worker for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise DataInvalid(f"{path.name}: a link, not a file") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DataInvalid(f"{path.name}: not a regular file")
    return os.fdopen(handle, "rb")


def _older(path: Path, limit: float) -> bool:
    try:
        return path.stat(follow_symlinks=False).st_mtime < limit
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
