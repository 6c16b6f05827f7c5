"""The inside of the sandbox: confine this process first, then read the one file."""

import errno
import json
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from core.artifacts.importers import sniff
from core.artifacts.limits import Limits
from core.errors import DataInvalid, StillroomError, TooLarge

_FORBIDDEN = (
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.startfile",
    "subprocess.",
    "socket.",
    "ctypes.",
    "pty.",
    "pickle.find_class",
    "urllib.",
    "webbrowser.",
)
"""Audit events no importer raises; each is refused once the file is open to reading."""


def main(request: str) -> None:
    """Read the file named in the request; leave ``out.safetensors`` and ``answer.json`` here."""
    asked = json.loads(request)
    limits = Limits(**asked["limits"])
    confine(limits)
    answer = _guarded(Path(asked["source"]), limits)
    Path("answer.json").write_text(json.dumps(answer))


def confine(limits: Limits) -> None:
    """Set this process's limits for good, and refuse what no importer does."""
    bounds = {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_FSIZE: limits.output_bytes,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_NPROC: limits.processes,
        resource.RLIMIT_CORE: 0,
    }
    for which, most in bounds.items():
        hard = resource.getrlimit(which)[1]
        kept = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (kept, kept))
    # Where the parent died, nobody else watches the clock.
    signal.alarm(int(limits.wall_seconds) + 5)
    sys.addaudithook(_refuse)


def _refuse(event: str, _args: tuple[Any, ...]) -> None:
    if event.startswith(_FORBIDDEN):
        raise PermissionError(f"reading a file never needs {event}")


def _guarded(source: Path, limits: Limits) -> dict[str, Any]:
    scratch = Path("scratch")
    scratch.mkdir()
    try:
        found = sniff.read(source, Path("out.safetensors"), scratch=scratch, limits=limits)
    except StillroomError as error:
        return _error(error)
    except MemoryError:
        return _error(TooLarge(f"reading it needs more than {limits.memory_bytes} bytes of memory"))
    except OSError as error:
        return _os_error(error, limits)
    except Exception as error:  # noqa: BLE001  whatever a foreign file provokes is about the file
        # The tensor library tells a failed write only in words.
        if told := re.search(r"\(os error (\d+)\)", str(error)):
            return _os_error(OSError(int(told[1]), str(error)), limits)
        return _error(DataInvalid(f"the file is damaged ({type(error).__name__}: {error})"))
    return {"format": found.format, "meta": found.meta, "notes": found.notes}


def _error(error: StillroomError) -> dict[str, Any]:
    shown = "".join(letter if letter.isprintable() else "?" for letter in error.message[:2000])
    return {"error": error.code(), "message": shown}


def _os_error(error: OSError, limits: Limits) -> dict[str, Any]:
    if error.errno == errno.EFBIG:
        return _error(TooLarge(f"it unpacks to a file of more than {limits.output_bytes} bytes"))
    if error.errno is None or isinstance(error, PermissionError):
        return _error(DataInvalid(f"the file is damaged ({error})"))
    return {"error": "os_error", "errno": error.errno, "message": str(error.strerror)}
