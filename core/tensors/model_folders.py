"""Finds a model's folder inside the operator's roots, and lists and opens what is wanted of it.

No path from outside is followed out of a root: names are checked, and what a link leads to as well.
Messages name no root: where the operator keeps models is nobody else's business.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import DataInvalid, SpecInvalid
from core.tensors.language_models import FILE_NAME, INDEX

MIB = 1 << 20
CONFIG, TOKENIZER, ONE_SHARD = "config.json", "tokenizer.json", "model.safetensors"
SMALL: Mapping[str, int] = {
    CONFIG: MIB,
    "generation_config.json": MIB,
    TOKENIZER: 64 * MIB,
    "tokenizer_config.json": 16 * MIB,
    "special_tokens_map.json": 16 * MIB,
    "chat_template.json": 4 * MIB,
    "chat_template.jinja": 4 * MIB,
}
"""What is wanted beside the shards -> how large it may be; the first and tokenizer.json must be."""
MOST_INDEX_BYTES = 16 * MIB
MOST_SHARDS = 4096
OUTWARD = re.compile(
    r"auto_map|trust_remote_code|custom_\w+|fusion_config|_?name_or_path|_commit_hash|\w+_files?"
    r"|transformers_weights|\w+_implementation(_internal)?"
)
"""Keys that name code to be run, a kernel to be fetched, or a path of another machine."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Found:
    """A folder inside a root; both are real paths, without links."""

    root: Path
    folder: Path
    source: str
    """Where the model came from, in words."""


def find_folder(roots: Sequence[Path], folder: str) -> Found:
    """Return the folder of this relative path in the first root that has it.

    Raises:
        SpecInvalid: no root is set, none has it, or it leads out of its root.
    """
    _check_roots(roots, "/folder")
    outside = False
    for root in roots:
        place = _real(root / folder)
        if place is None or not place.is_dir():
            continue
        top = root.resolve()
        if place != top and place.is_relative_to(top):
            return Found(top, place, f"folder {folder}")
        outside = True
    why = "leads out of the operator's roots" if outside else f"in none of {_counted(roots)}"
    raise SpecInvalid(
        f"folder {folder!r}: {why}; needed a folder's path below one of STILL_MODEL_ROOTS",
        pointer="/folder",
    )


def find_hub(roots: Sequence[Path], hub: str, revision: str) -> Found:
    """Return the snapshot of a hub id in the first root that holds a cache of it.

    Args:
        roots: each may be a hub cache: ``models--ORG--NAME/refs/REVISION`` names a commit,
            ``models--ORG--NAME/snapshots/COMMIT`` is the folder.
        hub: ``ORG/NAME``.
        revision: a branch or tag, or a whole commit.

    Raises:
        SpecInvalid: no root is set, or none has it; nothing is ever downloaded.
    """
    _check_roots(roots, "/hub")
    cache = f"models--{hub.replace('/', '--')}"
    there = [root for root in roots if _real(root / cache) is not None]
    for root in there:
        top, commit = root.resolve(), _commit(root, cache, revision)
        place = None if commit is None else _real(root / cache / "snapshots" / commit)
        if place is not None and place.is_dir() and place.is_relative_to(top):
            return Found(top, place, f"hub {hub}@{commit}")
    if there:
        raise SpecInvalid(
            f"revision {revision!r} of {hub!r} is not in the cache; nothing is downloaded: fetch "
            "it there first",
            pointer="/revision",
        )
    raise SpecInvalid(
        f"hub {hub!r}: {cache} is in none of {_counted(roots)}; nothing is downloaded: point "
        "STILL_MODEL_ROOTS at a hub cache that holds it",
        pointer="/hub",
    )


def _check_roots(roots: Sequence[Path], pointer: str) -> None:
    if not roots:
        raise SpecInvalid(
            "models cannot be imported here: STILL_MODEL_ROOTS is not set; the operator lists "
            'the folders that may be read, as in ["/srv/models"]',
            pointer=pointer,
        )


def _counted(roots: Sequence[Path]) -> str:
    return "the 1 root" if len(roots) == 1 else f"the {len(roots)} roots"


def _real(path: Path) -> Path | None:
    """Return where a path leads, through all links; None where it leads nowhere."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        return None


def _commit(root: Path, cache: str, revision: str) -> str | None:
    place = _real(root / cache / "refs" / revision)
    if place is None or not place.is_relative_to(root.resolve()) or not place.is_file():
        return revision if _COMMIT.fullmatch(revision) else None
    with place.open("rb") as file:
        told = file.read(64).decode("ascii", "replace").strip()
    return told if _COMMIT.fullmatch(told) else None


def list_files(found: Found) -> dict[str, int]:
    """Return the size of every wanted file, by name, sorted.

    Of the weights as transformers takes them: model.safetensors, else what its index names.

    Raises:
        DataInvalid: a file is missing, too large, no file, or leads out of the root.
    """
    sizes = {name: _size(found, name) for name in SMALL if _is_there(found, name)}
    for name, most in SMALL.items():
        if sizes.get(name, 0) > most:
            raise DataInvalid(f"{name}: {sizes[name]} bytes; allowed: at most {most}")
    for name in (CONFIG, TOKENIZER):
        if name not in sizes:
            raise DataInvalid(f"{name}: missing; {_why(name)}")
    sizes |= {name: _size(found, name) for name in _shards(found)}
    return dict(sorted(sizes.items()))


def _why(name: str) -> str:
    if name == TOKENIZER:
        return (
            "texts are aligned by the offsets that a fast tokenizer gives; save the tokenizer with "
            "transformers to make it of the older files"
        )
    return "the folder is no model of transformers"


def _shards(found: Found) -> list[str]:
    if _is_there(found, ONE_SHARD):
        return [ONE_SHARD]
    if not _is_there(found, INDEX):
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in _names(found))
        raise DataInvalid(
            f"{ONE_SHARD}: missing, and no {INDEX}; needed weights as safetensors"
            + (", pickled ones are never read" if pickled else "")
        )
    told = read_json(found, INDEX, most=MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(name, str) for name in told.values()):
        raise DataInvalid(f"{INDEX}: weight_map; needed an object: weight to file")
    shards = sorted(set(told.values()))
    if not 1 <= len(shards) <= MOST_SHARDS:
        raise DataInvalid(f"{INDEX}: {len(shards)} files; allowed: 1 to {MOST_SHARDS}")
    for name in shards:
        if not FILE_NAME.fullmatch(name) or not name.endswith(".safetensors"):
            raise DataInvalid(
                f"{INDEX}: file {name[:60]!r}; needed a name in the folder that ends in "
                ".safetensors"
            )
    return shards


def _names(found: Found) -> list[str]:
    try:
        return os.listdir(found.folder)
    except OSError as error:
        raise DataInvalid(f"the folder cannot be read: {error.strerror}") from error


def _is_there(found: Found, name: str) -> bool:
    """Whether the folder has an entry of this name, be it a link that leads nowhere."""
    return os.path.lexists(found.folder / name)


def _size(found: Found, name: str) -> int:
    with open_file(found, name) as file:
        return os.fstat(file.fileno()).st_size


def open_file(found: Found, name: str) -> BinaryIO:
    """Open a file of the folder; a link may lead anywhere inside the same root.

    Raises:
        DataInvalid: missing, no regular file, or outside.
    """
    place = _real(found.folder / name)
    if place is None:
        raise DataInvalid(f"{name}: missing, or a link that leads nowhere")
    if not place.is_relative_to(found.root):
        raise DataInvalid(f"{name}: a link that leads out of the operator's root")
    try:
        # The path is real now; whoever makes a link of it meanwhile is refused. Non-blocking, or a
        # pipe with no writer would hold the worker for ever.
        handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataInvalid(f"{name}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DataInvalid(f"{name}: not a regular file")
    return os.fdopen(handle, "rb")


def read_json(found: Found, name: str, *, most: int) -> dict[str, Any]:
    """Read a file that holds a JSON object of at most ``most`` bytes.

    Raises:
        DataInvalid: too large, no JSON, or no object.
    """
    with open_file(found, name) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise DataInvalid(f"{name}: more than {most} bytes")
    return parse_json(data, name)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """Read a JSON object that is JSON to the letter: UTF-8, no NaN.

    Raises:
        DataInvalid: it is not; the message begins with ``name``.
    """
    try:
        told = json.loads(data.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DataInvalid(f"{name}: not readable JSON: {str(error)[:200]}") from error
    if not isinstance(told, dict):
        raise DataInvalid(f"{name}: {type(told).__name__}; needed a JSON object")
    return told


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def without_outward(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what names code or paths (see ``OUTWARD``)."""
    return {key: value for key, value in told.items() if not OUTWARD.fullmatch(key)}
