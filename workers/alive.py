"""The file that tells when the beat last ticked. Nobody else on the machine can put it there."""

import hashlib
import os
import stat
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from core.settings import Settings
from workers.settings import StartRefused

BEAT_LATE = timedelta(seconds=20)


@dataclass(frozen=True)
class AliveFile:
    """A file in a folder of our own; its age is that of the last tick."""

    path: Path

    @classmethod
    def of(cls, settings: Settings) -> "AliveFile":
        """Return that of the beat with these settings: each database and node has another."""
        service = f"{settings.url}\n{settings.data_dir}\n{settings.node_name}"
        name = f"beat-{hashlib.sha256(service.encode()).hexdigest()[:16]}"
        return cls(Path(tempfile.gettempdir()) / f"stillroom-{os.getuid()}" / name)

    def prepare(self) -> None:
        """Make the folder; raises StartRefused where it is not ours alone."""
        folder = self.path.parent
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StartRefused(f"the beat's folder {folder}: {error.strerror}") from error
        if not self._ours():
            raise StartRefused(f"{folder} is no folder of this user alone: remove it")

    def touch(self) -> None:
        """Tell of a tick; follows no link."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(self.path, flags, 0o600)
        try:
            os.utime(file)
        finally:
            os.close(file)

    def remove(self) -> None:
        """Tell that no tick will come."""
        self.path.unlink(missing_ok=True)

    def wrong(self) -> str | None:
        """Return what is wrong with the beat, or None."""
        try:
            age = time.time() - self.path.lstat().st_mtime
        except OSError:
            return "no tick yet"
        if not self._ours():
            return f"{self.path.parent} is no folder of this user alone"
        return f"the last tick was {age:.0f} s ago" if age > BEAT_LATE.total_seconds() else None

    def _ours(self) -> bool:
        there = self.path.parent.lstat()
        private = stat.S_ISDIR(there.st_mode) and not there.st_mode & 0o077
        return private and there.st_uid == os.getuid()
