"""Fetch an artifact into a file: resumed where it broke off, checked, then put in place."""

import hashlib
import os
import re
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import httpx2

from client.errors import ApiError, FileInTheWay, HashMismatch, StillroomError, Unreachable
from client.references import artifact_path
from client.wire import Patience, Wire

Report = Callable[[int, int | None], None]
"""Called with bytes done and bytes in all, where known."""


def sha256_of(path: Path, on_progress: Report | None = None) -> str:
    """Return the SHA-256 of a file in lower-case hex."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            done += len(block)
            if on_progress is not None:
                on_progress(done, total)
    return digest.hexdigest()


def fetch(
    wire: Wire, sha256: str, path: Path, *, overwrite: bool, on_progress: Report | None
) -> Path:
    """Fetch ``sha256`` into ``path``; a file that already holds those bytes is left alone.

    Raises:
        FileInTheWay: ``path`` holds something else and ``overwrite`` is false.
        HashMismatch: the bytes were wrong twice, the second time fetched from the start.
        BadReference: ``sha256`` is none.
    """
    artifact_path(sha256)
    if path.is_dir():
        raise FileInTheWay(f"{path} is a folder")
    if path.exists():
        if sha256_of(path) == sha256:
            return path
        if not overwrite:
            raise FileInTheWay(f"{path} exists and holds something else")
    part = path.with_name(f".{path.name[:100]}.{sha256[:16]}.part")
    for _ in range(2):
        _complete(wire, sha256, part, on_progress)
        if sha256_of(part) == sha256:
            _adopt(part, path)
            return path
        part.unlink()
    raise HashMismatch(f"{path.name}: the bytes received do not have SHA-256 {sha256}")


def _adopt(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _complete(wire: Wire, sha256: str, part: Path, on_progress: Report | None) -> None:
    """Append to ``part`` until the server says that this was all."""
    patience = Patience(wire)

    def report(done: int, total: int | None) -> None:
        patience.worked()
        if on_progress is not None:
            on_progress(done, total)

    while True:
        try:
            return _append(wire, sha256, part, report)
        except ApiError as error:
            if error.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and part.exists():
                return None
            patience.after(error)
        except StillroomError as error:
            patience.after(error)


def _append(wire: Wire, sha256: str, part: Path, report: Report) -> None:
    """Ask for what is missing and write it; a server that sends all starts the file anew."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": f'"{sha256}"'}
    path = artifact_path(sha256, "content")
    with wire.stream("GET", path, headers=headers) as response:
        done = _start(wire, response, have)
        length = response.headers.get("content-length", "")
        total = done + int(length) if length.isdigit() else None
        with part.open("r+b" if part.exists() else "wb") as file:
            file.truncate(done)
            file.seek(done)
            for block in response.iter_raw():
                file.write(block)
                done += len(block)
                report(done, total)


def _start(wire: Wire, response: httpx2.Response, have: int) -> int:
    """Return the offset in the file of the first byte that will come."""
    if response.status_code != HTTPStatus.PARTIAL_CONTENT:
        return 0
    said = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
    if said is None or int(said[1]) != have:
        raise Unreachable(wire.url, f"asked for bytes from {have}, was sent others")
    return have
