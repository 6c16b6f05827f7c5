"""Send a file in parts; a broken connection or a new process goes on where the server stands.

The upload's id is remembered by the file's SHA-256, so the same bytes are never sent twice to a
server that still has them.
"""

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx2

from client.downloads import Report, sha256_of
from client.errors import ApiError, StillroomError
from client.references import upload_path
from client.views import Artifact, Upload
from client.wire import Patience, Wire

PART_BYTES = 8 << 20
"""Small enough to lose to a broken connection; the server may ask for less."""
IMPORT_S = 900.0
"""How long the server may check and import a file before it answers."""
FRESH_STARTS = 3
BROKEN = frozenset({"data_invalid", "upload_failed", "upload_incomplete"})
"""An upload that ended so can never be completed: a later run must begin a new one."""


@dataclass(frozen=True)
class Memory:
    """Upload ids by SHA-256 and server, one small JSON file each."""

    folder: Path

    def recall(self, sha256: str, url: str) -> str | None:
        """Return the upload begun for these bytes on that server, if any."""
        found = self._read(sha256).get(url)
        return found if isinstance(found, str) else None

    def remember(self, sha256: str, url: str, upload_id: str | None) -> None:
        """Keep an upload's id, or forget it where None. A cache: failing to write is no error."""
        known = {**self._read(sha256), url: upload_id}
        path = self.folder / f"{sha256}.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({k: v for k, v in known.items() if v}))
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()

    def _read(self, sha256: str) -> dict[str, object]:
        try:
            known = json.loads((self.folder / f"{sha256}.json").read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


@dataclass(frozen=True)
class _File:
    path: Path
    size_bytes: int
    sha256: str


def send(wire: Wire, memory: Memory, path: Path, on_progress: Report | None) -> Artifact:
    """Send ``path`` and return the artifact the server made of it."""
    file = _File(path, path.stat().st_size, sha256_of(path))
    for start in range(FRESH_STARTS):
        upload, resumed = _open(wire, memory, file)
        try:
            _send_parts(wire, file, upload, on_progress)
            return _finish(wire, upload["id"])
        except ApiError as error:
            lost = error.status == HTTPStatus.NOT_FOUND
            if lost or error.code in BROKEN:
                memory.remember(file.sha256, wire.url, None)
            if not (lost or resumed) or start == FRESH_STARTS - 1:
                raise
    raise AssertionError("the last start returns or raises")


def _open(wire: Wire, memory: Memory, file: _File) -> tuple[Upload, bool]:
    """Return the upload to go on with and whether an earlier run began it."""
    known = memory.recall(file.sha256, wire.url)
    if known is not None:
        upload = _look(wire, known)
        if upload is not None and upload["state"] != "failed":
            return upload, True
    # A file's name may hold bytes that are no text; the name is only shown.
    name = file.path.name.encode(errors="replace").decode()
    about = {"file_name": name, "size_bytes": file.size_bytes, "sha256": file.sha256}
    opened: Upload = wire.call("POST", "/v1/uploads", json=about)
    memory.remember(file.sha256, wire.url, opened["id"])
    return opened, False


def _look(wire: Wire, upload_id: str) -> Upload | None:
    try:
        found: Upload = wire.call("GET", upload_path(upload_id))
    except ApiError as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return None
        raise
    return found


def _send_parts(wire: Wire, file: _File, upload: Upload, on_progress: Report | None) -> None:
    """Send parts until the server has every byte; after a failure ask it where it stands."""
    patience = Patience(wire)
    size = min(PART_BYTES, upload["part_limit_bytes"])
    with file.path.open("rb") as content:
        while upload["state"] == "open" and upload["received_bytes"] < file.size_bytes:
            if on_progress is not None:
                on_progress(upload["received_bytes"], file.size_bytes)
            content.seek(upload["received_bytes"])
            before = upload["received_bytes"]
            upload = _send_part(wire, upload, content.read(size), patience)
            if upload["received_bytes"] > before:
                patience.worked()
    if on_progress is not None:
        on_progress(file.size_bytes, file.size_bytes)


def _send_part(wire: Wire, upload: Upload, part: bytes, patience: Patience) -> Upload:
    headers = {
        "Upload-Offset": str(upload["received_bytes"]),
        "Content-Type": "application/octet-stream",
    }
    path = upload_path(upload["id"])
    try:
        sent: Upload = wire.once("PATCH", path, content=part, headers=headers)
    except StillroomError as error:
        _pardon(error, "upload_incomplete", "conflict")
        patience.after(error)
        there: Upload = wire.call("GET", path)
        return there
    return sent


def _finish(wire: Wire, upload_id: str) -> Artifact:
    """Have the file checked and imported; asking again is harmless."""
    patience = Patience(wire)
    path = upload_path(upload_id)
    timeout = httpx2.Timeout(wire.http.timeout.connect, read=IMPORT_S)
    until = time.monotonic() + IMPORT_S
    while True:
        try:
            artifact: Artifact = wire.once(
                "POST", upload_path(upload_id, "complete"), timeout=timeout
            )
        except StillroomError as error:
            upload: Upload = wire.call("GET", path)
            if upload["state"] == "failed":
                raise _failure(upload, error) from error
            if upload["state"] == "importing" and time.monotonic() < until:
                patience.pause()
                continue
            _pardon(error, "conflict")
            patience.after(error)
        else:
            return artifact


def _pardon(error: StillroomError, *codes: str) -> None:
    """Let these be tried again: a broken request may still be held open on the other side."""
    if isinstance(error, ApiError) and error.code in codes:
        error.retryable = True


def _failure(upload: Upload, error: StillroomError) -> StillroomError:
    """Say why an upload failed: in the answer's words, or where that was lost in the upload's."""
    if isinstance(error, ApiError) and error.status == HTTPStatus.UNPROCESSABLE_ENTITY:
        return error
    said = upload["error"]
    if isinstance(said, dict):
        said = said.get("message") or said.get("detail") or said
    return ApiError(422, "upload_failed", str(said or "the upload failed"))
