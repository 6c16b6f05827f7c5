"""Serves stored bytes: ranges, validators, digests, and the honest file name."""

import base64
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from api.problems import problem

_STEP_BYTES = 1 << 20
_RANGE = re.compile(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.IGNORECASE | re.ASCII)
_MEDIA_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+", re.ASCII)


def serve(
    request: Request, path: Path, *, sha256: str, file_name: str, media_type: str
) -> Response:
    """Answer GET or HEAD for a stored file; several ranges at once are answered whole."""
    etag = f'"{sha256}"'
    headers = _headers(sha256, etag, file_name)
    if _matches(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    size = path.stat().st_size
    status, start, end = 200, 0, size
    wanted = _range(request, etag)
    if wanted is not None:
        span = _resolve(wanted, size)
        if span is None:
            told = f"Range {request.headers['range']!r} is outside the {size} bytes"
            return problem(request.scope, 416, told, headers={"Content-Range": f"bytes */{size}"})
        status, (start, end) = 206, span
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    else:
        headers["Content-Digest"] = headers["Repr-Digest"]
    headers["Content-Length"] = str(end - start)
    headers["Content-Type"] = _media_type(media_type)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    return StreamingResponse(_read(path, start, end), status, headers)


def _headers(sha256: str, etag: str, file_name: str) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    return {
        "ETag": etag,
        "Repr-Digest": f"sha-256=:{digest}:",
        "Accept-Ranges": "bytes",
        "Content-Disposition": disposition(file_name),
        # The bytes under a hash never change; they are not for shared caches.
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
        # Should a browser be talked into showing the file: no script, no origin.
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }


def disposition(file_name: str) -> str:
    """Return Content-Disposition as RFC 6266 has it: an ASCII name, and the true one."""
    name = clean_name(file_name)
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = re.sub(r'["%;\\]', "_", plain).strip(" .") or "download"
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


def clean_name(file_name: str) -> str:
    """Drop folders, control and direction marks, leading dots; at most 150 characters."""
    last = re.split(r"[/\\]", file_name)[-1]
    kept = "".join(c for c in last if unicodedata.category(c)[0] != "C")
    return kept.strip().lstrip(".")[:150] or "download"


def _media_type(given: str) -> str:
    return given if _MEDIA_TYPE.fullmatch(given) else "application/octet-stream"


def _matches(given: str, etag: str) -> bool:
    """If-None-Match compares weakly."""
    marks = (mark.strip().removeprefix("W/") for mark in given.split(","))
    return any(mark in (etag, "*") for mark in marks)


def _range(request: Request, etag: str) -> tuple[str, str] | None:
    """Return the bounds of a single byte range, None where the whole is to be sent."""
    found = _RANGE.fullmatch(request.headers.get("range", ""))
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if first and last and int(last) < int(first):
        return None
    condition = request.headers.get("if-range")
    return (first, last) if condition is None or condition == etag else None


def _resolve(wanted: tuple[str, str], size: int) -> tuple[int, int] | None:
    """Return [start, end) within ``size``, None where nothing is left of the range."""
    first, last = wanted
    if first:
        start, end = int(first), int(last) + 1 if last else size
    else:
        start, end = max(size - int(last), 0), size
    end = min(end, size)
    return (start, end) if start < end else None


def _read(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (step := file.read(min(_STEP_BYTES, end - start))):
            start += len(step)
            yield step
