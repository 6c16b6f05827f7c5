"""Imports a foreign file in a short-lived process of its own: limits, no secrets, no way back.

Parent and child exchange JSON and one output file; nothing is pickled between them.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import core
from core.artifacts.limits import MIB, Limits
from core.errors import ChunkCrashed, DataInvalid, StillroomError, TooLarge

_ERRORS: Mapping[str, type[StillroomError]] = {
    "data_invalid": DataInvalid,
    "too_large": TooLarge,
}
# Isolated mode hides the working folder and PYTHONPATH; the package's own root is handed over,
# which serves a checkout, an editable install and an installed package alike.
_START = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from core.artifacts.sandbox_main import main; main(sys.argv[2])"
)
_ENDINGS = (
    *(".gz", ".tar", ".tgz", ".zip", ".npz", ".db", ".pt", ".pth"),
    *(".jsonl", ".ndjson", ".tsv", ".safetensors"),
)
"""What a file's name loses once it is in canonical form."""
_MOST_ANSWER_BYTES = 4 * MIB
_ANSWER = {"format", "meta", "notes"}


@dataclass(frozen=True)
class Imported:
    """A foreign file in canonical form."""

    path: Path
    """In the working folder, under a made-up name."""
    format: str
    """``pairs``, ``embeddings``, ``federated_model``, ``lda_model``, ``codebook``, ``prompts``,
    ``bivectors_cache`` or ``targets_cache``."""
    file_name: str
    """The name a person gets when downloading; never part of a path."""
    media_type: str
    meta: Mapping[str, Any]
    notes: list[str]
    """What was left out or mended, in words."""


def import_file(
    source: Path, *, file_name: str, workdir: Path, limits: Limits | None = None
) -> Imported:
    """Turn an uploaded file of any allowed format into its canonical .safetensors.

    ``file_name`` is what the client called it: metadata only. On any error nothing is left in
    ``workdir``.

    Raises:
        DataInvalid: not an allowed format, broken, or reading it crashed or ran out of time.
        TooLarge: over a limit.
        ChunkCrashed: the import process itself did not start.
        OSError: the disk is full or broken.
    """
    with tempfile.TemporaryDirectory(prefix="import-", dir=workdir) as name:
        folder = Path(name)
        answer = _run(source.resolve(), folder, limits or Limits())
        _raise_error(answer)
        made = folder / "out.safetensors"
        if made.is_symlink() or not made.is_file():
            raise DataInvalid("reading the file gave no result")
        kept = made.replace(workdir / f"imported-{uuid.uuid4().hex}.safetensors")
    return Imported(
        path=kept,
        format=str(answer["format"]),
        file_name=canonical_name(file_name),
        media_type="application/octet-stream",
        meta=dict(answer["meta"]),
        notes=[str(note) for note in answer["notes"]],
    )


def canonical_name(file_name: str) -> str:
    """Return a harmless display name: the last part, printable, ending in .safetensors."""
    last = PurePosixPath(file_name.replace("\\", "/")).name
    shown = "".join(letter for letter in last if letter.isprintable())
    for ending in _ENDINGS:
        shown = shown.removesuffix(ending)
    return f"{shown.strip('. ')[:150] or 'imported'}.safetensors"


def _run(source: Path, folder: Path, limits: Limits) -> dict[str, Any]:
    """Run the child to its end and return its answer."""
    request = json.dumps({"source": str(source), "limits": asdict(limits)})
    root = str(Path(core.__path__[0]).parent)
    with (folder / "stderr").open("wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", "-c", _START, root, request],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd=folder,
            # No secrets; one thread, since each reserves address space of its own.
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            code = child.wait(limits.wall_seconds)
        except subprocess.TimeoutExpired as error:
            raise DataInvalid(
                f"reading the file took more than {limits.wall_seconds:g} s and was stopped"
            ) from error
        finally:
            _end(child)
    return _answer(folder, code)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a child that still runs, with its session: out of time, or the parent interrupted."""
    # Not after it was reaped: its number may be another process's by then.
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _answer(folder: Path, code: int) -> dict[str, Any]:
    if code < 0:
        raise DataInvalid(
            f"reading the file was stopped by {_signal(-code)}; it is damaged or needs more than "
            "the limits of an import"
        )
    place = folder / "answer.json"
    if code > 0 or place.is_symlink() or not place.is_file():
        last = (folder / "stderr").read_bytes()[-500:].decode(errors="replace").strip()
        raise ChunkCrashed(f"the import process ended with {code}: {last or 'no message'}")
    with place.open("rb") as file:
        try:
            found = json.loads(file.read(_MOST_ANSWER_BYTES))
        except ValueError as error:
            raise ChunkCrashed("the import process gave a broken answer") from error
    if not isinstance(found, dict) or not ("error" in found or set(found) >= _ANSWER):
        raise ChunkCrashed("the import process gave a broken answer")
    return found


def _signal(number: int) -> str:
    reasons = {
        signal.SIGXCPU: "the limit on processor time",
        signal.SIGKILL: "the system (out of memory or processor time)",
        signal.SIGALRM: "the limit on time",
    }
    return reasons.get(signal.Signals(number), signal.Signals(number).name)


def _raise_error(answer: Mapping[str, Any]) -> None:
    code, message = answer.get("error"), str(answer.get("message"))
    if code == "os_error":
        raise OSError(int(answer["errno"]), message)
    if code is not None:
        raise _ERRORS.get(str(code), DataInvalid)(message)
