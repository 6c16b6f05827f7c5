"""Fetch a language model's folder: the artifact is a list of files, each an artifact of its own."""

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.downloads import Report, fetch
from client.errors import BadManifest, FileInTheWay
from client.references import is_sha256
from client.wire import Wire

FORMAT = "language_model"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""A server never chooses a folder, nor a file that is hidden."""
MOST_FILES = 10_000
MOST_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class Listed:
    """A file of the folder."""

    name: str
    sha256: str
    size_bytes: int


def read_manifest(data: bytes) -> Sequence[Listed]:
    """Return the files that a manifest lists, sorted by name.

    Raises:
        BadManifest: not such a list, a name that is none, or one twice where case does not count.
    """
    try:
        told = json.loads(data)
        if told["format"] != FORMAT:
            raise BadManifest(f"format {str(told['format'])[:60]!r}; needed {FORMAT!r}")
        files = [_listed(file) for file in told["files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadManifest(f"not a readable list of files: {error!r:.200}") from error
    names = {file.name.lower() for file in files}
    if len(names) < len(files):
        raise BadManifest("two files of one name")
    if not 1 <= len(files) <= MOST_FILES:
        raise BadManifest(f"{len(files)} files; allowed: 1 to {MOST_FILES}")
    return sorted(files, key=lambda file: file.name)


def _listed(told: Any) -> Listed:
    name, sha256, size_bytes = told["name"], told["sha256"], told["size_bytes"]
    if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
        raise BadManifest(f"file name {str(name)[:60]!r}; allowed: letters, digits, ., _ and -")
    if not isinstance(sha256, str) or not is_sha256(sha256):
        raise BadManifest(f"{name}: {str(sha256)[:80]!r} is no SHA-256")
    if type(size_bytes) is not int or size_bytes < 0:
        raise BadManifest(f"{name}: size_bytes {str(size_bytes)[:40]}")
    return Listed(name, sha256, size_bytes)


def fetch_folder(
    wire: Wire,
    sha256: str,
    folder: Path,
    *,
    overwrite: bool,
    reports: Callable[[str], Report] | None = None,
) -> Sequence[Path]:
    """Fetch every file that the manifest ``sha256`` lists into ``folder``, made if absent.

    Files that are there already are left alone, one that broke off goes on where it stopped.

    Args:
        wire: to the server.
        sha256: of the manifest.
        folder: whose other files are not touched.
        overwrite: whether a file of the same name that holds something else is replaced.
        reports: gives for a file's name what is told how far it is.

    Raises:
        BadManifest: the artifact is no such list; nothing was written.
        FileInTheWay: a file of the folder holds something else, or the folder is a file.
    """
    listed = _manifest(wire, sha256)
    if folder.exists() and not folder.is_dir():
        raise FileInTheWay(f"{folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for file in listed:
        report = None if reports is None else reports(file.name)
        path = folder / file.name
        paths.append(fetch(wire, file.sha256, path, overwrite=overwrite, on_progress=report))
        if report is not None:
            report(file.size_bytes, file.size_bytes)
    return paths


def _manifest(wire: Wire, sha256: str) -> Sequence[Listed]:
    with tempfile.TemporaryDirectory(prefix="stillroom-") as made:
        path = Path(made) / "manifest.json"
        fetch(wire, sha256, path, overwrite=False, on_progress=None)
        if (size_bytes := path.stat().st_size) > MOST_MANIFEST_BYTES:
            raise BadManifest(f"{size_bytes} bytes; allowed: at most {MOST_MANIFEST_BYTES}")
        return read_manifest(path.read_bytes())
