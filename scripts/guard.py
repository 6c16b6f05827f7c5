"""Ends every process of a team once standard input closes, however the team's own process died.

A process belongs to the team if its number was told on a line of standard input, or if its
environment carries the team's mark: children of children too, whatever session they are in.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

MARK = "STILLROOM_TEAM"
PATIENCE_S = 5.0
"""So long PostgreSQL may take to free its shared memory; everything else is killed at once."""
EVERY_S = 0.05
_NAME, _STATE, _BORN = 1, 2, 21


def members(mark: str, told: Mapping[int, str] | None = None) -> Iterator[int]:
    """Yield the processes of the team that still run; ``told``: number -> when it was born."""
    wanted, told = f"{MARK}={mark}".encode(), told or {}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with suppress(OSError):  # it ended meanwhile, or is another user's
            marked = wanted in (folder / "environ").read_bytes().split(b"\0")
            # Some write their title over their environment. A number alone may be another's by now.
            if marked or (pid in told and told[pid] == born(pid) and _stat(pid)[_STATE] != "Z"):
                yield pid


def born(pid: int) -> str | None:
    """Return when a process started, in the kernel's own count; None if it is gone."""
    with suppress(OSError):
        return _stat(pid)[_BORN]
    return None


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat; the name, in brackets, may hold anything."""
    text = Path(f"/proc/{pid}/stat").read_text()
    name = text[text.index("(") + 1 : text.rindex(")")]
    return [str(pid), name, *text[text.rindex(")") + 2 :].split()]


def end_all(mark: str, told: Mapping[int, str]) -> None:
    """Kill every member; return when none is left."""
    until = time.monotonic() + PATIENCE_S
    asked: set[int] = set()
    while left := [pid for pid in members(mark, told) if pid != os.getpid()]:
        for pid in left:
            with suppress(OSError):
                gently = _stat(pid)[_NAME] == "postgres" and time.monotonic() < until
                if not (gently and pid in asked):
                    os.kill(pid, signal.SIGQUIT if gently else signal.SIGKILL)
                asked.add(pid)
        time.sleep(EVERY_S)


def main() -> None:
    """Learn of members until the end of standard input; then end them, and remove the folders."""
    mark, *folders = sys.argv[1:]
    told: dict[int, str] = {}
    for line in sys.stdin:
        pid = int(line)
        told[pid] = born(pid) or "gone"
    end_all(mark, told)
    until = time.monotonic() + PATIENCE_S
    for folder in folders:
        # Again: a backend whose server was killed may write one last file.
        while Path(folder).exists() and time.monotonic() < until:
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(EVERY_S)


if __name__ == "__main__":
    main()
