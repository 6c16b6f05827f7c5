"""What names a teacher's results in the cache: SHA-256 over all they depend on, never a path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import torch

from core.tensors.shards import Array


def digest(facts: Mapping[str, object], *arrays: Array) -> str:
    """Hash facts and arrays with their dtypes and shapes, so that no two inputs look alike."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for array in arrays:
        found.update(f"|{array.dtype.str}{array.shape}|".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def target_key(
    fingerprint: str, queries: Array, exclude_rows: Array | None = None, *, device: str
) -> str:
    """Return the cache key of one block of targets.

    Bytes differ in their last bits between devices and thread counts. The kind of device is in
    the key, so that a GPU's block is never taken for a CPU's; the number of threads is not:
    whichever block was stored first is the one every job reads.

    Args:
        fingerprint: of the teacher.
        queries: [Q, d] of the block.
        exclude_rows: as given to ``targets``.
        device: where they are computed; of ``cuda:1`` only ``cuda`` counts.
    """
    excluded = np.zeros(0, np.int64) if exclude_rows is None else exclude_rows.astype(np.int64)
    facts = {
        "what": "targets",
        "teacher": fingerprint,
        "excludes": exclude_rows is not None,
        "device": torch.device(device).type,
    }
    return digest(facts, queries, excluded)
