"""The two cache files of document 000: what they hold, how they are written, what a file may claim.

``NAME.bivectors.npz``: ``bivectors`` [C, d, d] and ``cluster_ids`` [C] text.
``rotational_targets_cache.npz``: ``targets`` [n, d] and ``query_digests`` [n, 16] uint8.
Both: ``fingerprint`` and ``settings``, texts. The document names no arrays: these names are ours.
Once uploaded they are .safetensors of the formats ``bivectors_cache`` and ``targets_cache``.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.npz import NpzWriter, open_npz
from core.tensors.shards import Array

BIVECTORS = "bivectors"
TARGETS = "targets"
BIVECTOR_NAMES = (BIVECTORS, "B", "logs", "log_rotations")
"""Names under which a foreign .npz may hold its bivectors; ours first."""
TARGET_NAMES = (TARGETS, "teacher_targets", "rotational_targets", "cached_targets")
DTYPES = ("float32", "float64")
DIGEST_BYTES = 16
SETTINGS_BYTES = 65_536
"""Of the settings' JSON text at most."""
LARGEST_ENTRY = math.pi * (1 + 1e-3)
"""Of a bivector: no principal logarithm turns by more than pi, so no entry is larger."""
SKEW_ROUNDING = 1e-4
"""Radians by which L + L^T may be off zero in a foreign file; its skew part is kept."""
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Claims:
    """What a cache file says of itself. Whoever uses the file checks it, or does not use it."""

    fingerprint: str | None = None
    """Of the teacher: 64 hex digits."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the teacher was told."""


def digest_rows(rows: Array) -> Array:
    """Return [n, 16] uint8, BLAKE2b of each row in float32 with -0.0 as 0.0: which query it is."""
    found = np.empty((len(rows), DIGEST_BYTES), np.uint8)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS].astype(np.float32) + np.float32(0)
        for at, row in enumerate(block, start):
            digest = hashlib.blake2b(row, digest_size=DIGEST_BYTES).digest()
            found[at] = np.frombuffer(digest, np.uint8)
    return found


def check_claims(fingerprint: str | None, settings: str | None) -> Claims:
    """Return what two texts claim.

    Raises:
        DataInvalid: the one is no hash, or the other no JSON object of at most 64 KiB.
    """
    if fingerprint is not None and not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise DataInvalid(
            f"fingerprint: {fingerprint[:70]!r}; needed 64 lower-case hexadecimal digits"
        )
    if settings is None:
        return Claims(fingerprint)
    try:
        told = json.loads(settings, parse_constant=_no_constant)
        json.dumps(told, allow_nan=False)  # 1e999 is read as infinity
    except (ValueError, RecursionError) as error:
        raise DataInvalid("settings: not JSON") from error
    if not isinstance(told, dict) or len(settings) > SETTINGS_BYTES:
        raise DataInvalid(f"settings: needed a JSON object of at most {SETTINGS_BYTES} bytes")
    return Claims(fingerprint, told)


def check_bivectors(block: Array, *, first: int) -> Array:
    """Return the skew part of some clusters' logarithms.

    Args:
        block: [c, d, d] float32 or float64.
        first: number of the first cluster, for messages.

    Raises:
        DataInvalid: an entry is not finite or beyond pi, or L + L^T is not zero up to rounding.
    """
    for cluster, L in enumerate(block, first):
        largest = float(np.abs(L).max())
        if not largest <= LARGEST_ENTRY:
            raise DataInvalid(
                f"bivectors: cluster {cluster} holds {largest:.4g}; a principal logarithm is "
                "finite and turns by at most pi"
            )
        off = float(np.abs(L + L.T).max())
        if off > SKEW_ROUNDING:
            raise DataInvalid(
                f"bivectors: cluster {cluster} is off skew by {off:.3g} (allowed {SKEW_ROUNDING}); "
                "the logarithm of a rotation is skew"
            )
    skew: Array = (block - block.transpose(0, 2, 1)) / 2
    return skew


def check_targets(block: Array, *, first: int) -> Array:
    """Return some targets, [b, d]; DataInvalid names the row that is not finite or all zeros."""
    good = np.isfinite(block).all(axis=1) & block.any(axis=1)
    if not good.all():
        row = first + int(np.argmin(good))
        raise DataInvalid(f"targets: row {row} holds NaN or infinity, or is all zeros")
    return block


def check_array(name: str, dtype: np.dtype[np.generic], shape: Sequence[int]) -> None:
    """Raise DataInvalid unless an array is as ``bivectors`` or ``targets`` must be."""
    if name == BIVECTORS:
        fits = len(shape) == 3 and shape[0] >= 1 and shape[1] >= 2 and shape[1] == shape[2]
        needed = "[clusters >= 1, dim >= 2, dim]"
    else:
        fits = len(shape) == 2 and shape[0] >= 1 and shape[1] >= 2
        needed = "[rows >= 1, dim >= 2]"
    if not fits:
        raise DataInvalid(f"{name}: shape {list(shape)}; needed {needed}")
    if dtype.name not in DTYPES:
        raise DataInvalid(f"{name}: dtype {dtype}; allowed: {', '.join(DTYPES)}")


CHECKS: Mapping[str, Callable[..., Array]] = {BIVECTORS: check_bivectors, TARGETS: check_targets}


def describe(name: str, shape: Sequence[int], dtype: np.dtype[np.generic]) -> dict[str, Any]:
    """Return the facts about a cache that a plan needs."""
    counted = "clusters" if name == BIVECTORS else "rows"
    return {counted: shape[0], "dim": shape[1], "dtype": dtype.name}


def write_npz(
    file: BinaryIO, name: str, values: shards.Stream, beside: Mapping[str, Array], claims: Claims
) -> None:
    """Write a cache file in document 000's layout; memory for one block of ``values``.

    Args:
        file: empty, seekable.
        name: BIVECTORS or TARGETS.
        values: [C, d, d] or [n, d].
        beside: small arrays: ``cluster_ids`` or ``query_digests``.
        claims: who made it, with what settings.
    """
    settings = json.dumps(claims.settings, sort_keys=True, allow_nan=False)
    with NpzWriter(file) as writer:
        for small, array in sorted(beside.items()):
            writer.add(small, array)
        if claims.fingerprint is not None:
            writer.add("fingerprint", np.array(claims.fingerprint))
        writer.add("settings", np.array(settings))
        writer.add_blocks(name, values.dtype, values.shape, values.blocks)


def read_rows(path: Path, name: str, start: int, stop: int) -> Array:
    """Read rows start..stop-1 of a cache, as .safetensors or as an .npz of our own making."""
    if _is_zip(path):
        with open_npz(path) as found:
            return found.rows(name, start, stop)
    return shards.load_rows(path, name, start, stop)


def read_claims(path: Path) -> Claims:
    """Read what a cache says of itself, in either form."""
    if not _is_zip(path):
        told = shards.load_manifest(path)
        return Claims(told.get("fingerprint"), told.get("settings") or {})
    with open_npz(path) as found:
        texts = [
            str(found.array(name, most_bytes=8 * SETTINGS_BYTES)) if name in found.names else None
            for name in ("fingerprint", "settings")
        ]
    return check_claims(texts[0], texts[1])


def read_cluster_ids(path: Path) -> list[str] | None:
    """Read the clusters' names in the order of the file; None where it has none."""
    if _is_zip(path):
        with open_npz(path) as found:
            if "cluster_ids" not in found.names:
                return None
            return [str(name) for name in found.array("cluster_ids", most_bytes=1 << 28)]
    tensors, _ = _small_tensors(path)
    if "cluster_ids" not in tensors:
        return None
    return shards.unpack_text(tensors["cluster_ids"], tensors["cluster_ids_offsets"])


def read_digests(path: Path, start: int, stop: int) -> Array | None:
    """Read the digests of rows start..stop-1, [stop - start, 16] uint8; None where it has none."""
    if _is_zip(path):
        with open_npz(path) as found:
            absent = "query_digests" not in found.names
    else:
        absent = "query_digests" not in shards.names(path)
    return None if absent else read_rows(path, "query_digests", start, stop)


def _small_tensors(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    wanted = [name for name in shards.names(path) if name not in (BIVECTORS, TARGETS)]
    return shards.load(path, only=wanted)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def replace_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file beside ``path`` and rename it there: whole or absent, whenever it is killed."""
    temp = path.with_name(f".{path.name}.part")
    with temp.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temp.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def cut(rows: Array, size: int) -> Iterator[Array]:
    """Yield rows in blocks of ``size``."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def streamed(dtype: str, shape: Sequence[int], blocks: Iterable[Array]) -> shards.Stream:
    """Return a stream of a dtype by its name."""
    return shards.Stream(np.dtype(dtype), tuple(shape), blocks)
