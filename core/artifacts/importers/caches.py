"""Bivectors and targets of a teacher from .npz or .safetensors, checked block by block.

Memory is a block's, whatever the file's size. What the file claims is kept as a claim.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core.artifacts.importers.archive import open_member, open_zip
from core.artifacts.importers.npy import read_npz
from core.artifacts.importers.pairs import as_text
from core.artifacts.limits import MIB, Budget, Limits
from core.errors import DataInvalid, TooLarge
from core.tensors import caches, npy, shards
from core.tensors.caches import (
    BIVECTOR_NAMES,
    BIVECTORS,
    CHECKS,
    DIGEST_BYTES,
    TARGET_NAMES,
    TARGETS,
    Claims,
)
from core.tensors.manifests import check_texts
from core.tensors.shards import Array, Stream

FORMATS: Mapping[str, str] = {BIVECTORS: "bivectors_cache", TARGETS: "targets_cache"}
"""Format by what the file holds."""
_BESIDE = {BIVECTORS: "cluster_ids", TARGETS: "query_digests"}
_CLAIMS = ("fingerprint", "settings")
_BLOCK_BYTES = 16 * MIB

Found = tuple[str, dict[str, Any], list[str]]
"""Format, meta, notes."""


def holds_cache(arrays: Collection[str]) -> bool:
    """Tell whether an .npz of these arrays is one of the two cache files."""
    return bool({*BIVECTOR_NAMES, *TARGET_NAMES} & set(arrays)) and not (
        {"query_embeddings", "target_embeddings"} & set(arrays)
    )


def from_npz(source: Path, target: Path, *, arrays: Collection[str], budget: Budget) -> Found:
    """Read one of the two .npz and write ``target``.

    Raises:
        DataInvalid: both in one file, one under two names, or a value that cannot be.
    """
    known = [name for name in (*BIVECTOR_NAMES, *TARGET_NAMES) if name in arrays]
    if len(known) > 1:
        raise DataInvalid(
            f"{', '.join(known)}: one .npz holds either bivectors ({', '.join(BIVECTOR_NAMES)}) "
            f"or targets ({', '.join(TARGET_NAMES)}), once"
        )
    what = BIVECTORS if known[0] in BIVECTOR_NAMES else TARGETS
    wanted = (_BESIDE[what], *_CLAIMS)
    small = read_npz(source, wanted=wanted, name="the .npz", budget=budget)
    with open_zip(source, budget) as members, open_member(members[f"{known[0]}.npy"]) as opened:
        stream, size_bytes = opened
        budget.spend(size_bytes, known[0])
        header = npy.read_header(stream, size_bytes=size_bytes, name=f"the .npz: {known[0]}")
        _check(what, header.dtype, header.shape, budget.limits)
        blocks = npy.read_blocks(stream, header, block_bytes=_BLOCK_BYTES, name=known[0])
        values = Stream(header.dtype.newbyteorder("="), header.shape, _checked(what, blocks))
        texts = [_text(name, small.arrays.get(name)) for name in _CLAIMS]
        claims = caches.check_claims(texts[0], texts[1])
        ignored = [name for name in small.ignored if name != known[0]]
        return _write(target, what, values, small.arrays.get(_BESIDE[what]), claims, ignored)


def from_tensors(source: Path, target: Path, *, what: str, limits: Limits) -> Found:
    """Read what ``from_npz`` wrote (BIVECTORS or TARGETS) like any stranger's file."""
    names = shards.names(source)
    if what not in names:
        raise DataInvalid(f"{what}: missing; the file holds {', '.join(sorted(names)[:12])}")
    dtype, shape = shards.describe(source, what)
    _check(what, dtype, shape, limits)
    rows = max(1, _BLOCK_BYTES // (int(np.prod(shape[1:])) * dtype.itemsize))
    blocks = (
        shards.load_rows(source, what, start, min(start + rows, shape[0]))
        for start in range(0, shape[0], rows)
    )
    beside: Any = None
    if _BESIDE[what] in names:
        beside = shards.load(source, only=[_BESIDE[what]])[0][_BESIDE[what]]
        if what == BIVECTORS:
            offsets = shards.load(source, only=["cluster_ids_offsets"])[0]["cluster_ids_offsets"]
            beside = shards.unpack_text(beside, offsets)
    told = shards.load_manifest(source)
    fingerprint, settings = told.get("fingerprint"), told.get("settings") or {}
    if not isinstance(fingerprint, str | None) or not isinstance(settings, dict):
        raise DataInvalid("manifest: fingerprint must be a text, settings an object")
    claims = caches.check_claims(fingerprint, json.dumps(settings))
    ignored = sorted(names - {what, _BESIDE[what], "cluster_ids_offsets"})
    return _write(
        target, what, Stream(dtype, shape, _checked(what, blocks)), beside, claims, ignored
    )


def _check(what: str, dtype: np.dtype[np.generic], shape: tuple[int, ...], limits: Limits) -> None:
    caches.check_array(what, dtype, shape)
    if shape[1] > limits.dim or (what == BIVECTORS and shape[0] > limits.clusters):
        raise TooLarge(
            f"{what}: shape {list(shape)}; at most {limits.clusters} clusters and {limits.dim} "
            "dimensions are read"
        )


def _checked(what: str, blocks: Iterator[Array]) -> Iterator[Array]:
    first = 0
    for block in blocks:
        yield CHECKS[what](block, first=first)
        first += len(block)


def _text(name: str, value: Array | None) -> str | None:
    if value is None:
        return None
    if value.size != 1:
        raise DataInvalid(f"{name}: shape {list(value.shape)}; needed one text")
    return as_text(name, value.reshape(1))[0]


def _write(
    target: Path,
    what: str,
    values: Stream,
    beside: Any,
    claims: Claims,
    ignored: list[str],
) -> Found:
    """Write the canonical form; the blocks are checked as they pass."""
    notes = [f"ignored, no such field: {name[:100]}" for name in ignored[:50]]
    small = {}
    if beside is None:
        notes.append(_ABSENT[what])
    elif what == TARGETS:
        small["query_digests"] = _check_digests(beside, values.shape[0])
    else:
        ids = as_text("cluster_ids", beside)
        _check_ids(ids, values.shape[0])
        small["cluster_ids"], small["cluster_ids_offsets"] = shards.pack_text(ids)
    meta = caches.describe(what, values.shape, values.dtype)
    manifest = {
        "format": FORMATS[what],
        "version": 1,
        **meta,
        "fingerprint": claims.fingerprint,
        "settings": dict(claims.settings),
    }
    streams = {name: Stream(array.dtype, array.shape, [array]) for name, array in small.items()}
    shards.save_streams(target, {**streams, what: values}, manifest)
    return FORMATS[what], meta, notes


_ABSENT = {
    BIVECTORS: "no cluster_ids in the file: taken to be in the order of the model's clusters",
    TARGETS: "no query_digests in the file: taken to be in the order of the queries",
}


def _check_digests(digests: Array, rows: int) -> Array:
    if digests.dtype != np.uint8 or digests.shape != (rows, DIGEST_BYTES):
        raise DataInvalid(
            f"query_digests: {digests.dtype} of shape {list(digests.shape)}; needed uint8 "
            f"[{rows}, {DIGEST_BYTES}]"
        )
    return digests


def _check_ids(ids: list[str], clusters: int) -> None:
    check_texts("cluster_ids", ids)
    if len(ids) != clusters or len(set(ids)) != clusters:
        raise DataInvalid(
            f"cluster_ids: {len(set(ids))} different ones of {len(ids)} for {clusters} clusters"
        )
