"""Pairs of embeddings from an .npz or a foreign .safetensors, checked and in one canonical form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core.artifacts.importers.npy import read_npz
from core.artifacts.limits import Budget
from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.formats import Pairs, save_pairs
from core.tensors.shards import Array

NEEDED = ("query_embeddings", "target_embeddings")
TEXTS = ("ids", "groups")


def from_npz(source: Path, target: Path, *, budget: Budget) -> tuple[dict[str, Any], list[str]]:
    """Read an .npz, write ``target``; return the pairs' meta and notes on what was left out."""
    table = read_npz(source, wanted=(*NEEDED, *TEXTS), name="the .npz", budget=budget)
    if missing := [name for name in NEEDED if name not in table.arrays]:
        raise DataInvalid(
            f"{', '.join(missing)}: missing from the .npz, which holds "
            f"{', '.join(sorted([*table.arrays, *table.ignored])[:20]) or 'nothing'}; needed "
            "query_embeddings and target_embeddings, optional ids and groups"
        )
    return _write(target, table.arrays, table.ignored)


def from_tensors(target: Path, tensors: Mapping[str, Array]) -> tuple[dict[str, Any], list[str]]:
    """Write the pairs found in a .safetensors canonically; return their meta and notes."""
    arrays: dict[str, Array | list[str]] = {name: tensors[name] for name in NEEDED}
    known = set(NEEDED)
    for name in TEXTS:
        if f"{name}_offsets" in tensors:
            if name not in tensors:
                raise DataInvalid(f"{name}: missing beside {name}_offsets")
            arrays[name] = shards.unpack_text(tensors[name], tensors[f"{name}_offsets"])
            known |= {name, f"{name}_offsets"}
        elif name in tensors:
            arrays[name] = tensors[name]
            known.add(name)
    return _write(target, arrays, sorted(set(tensors) - known))


def _write(
    target: Path, arrays: Mapping[str, Any], ignored: list[str]
) -> tuple[dict[str, Any], list[str]]:
    notes = [f"ignored, no such field: {name[:100]}" for name in ignored[:50]]
    queries = arrays["query_embeddings"]
    if "ids" in arrays:
        ids = as_text("ids", arrays["ids"])
    else:
        ids = [str(row) for row in range(len(np.atleast_1d(queries)))]
        notes.append("no ids in the file: row numbers are used")
    groups = as_text("groups", arrays["groups"]) if "groups" in arrays else None
    pairs = Pairs(ids=ids, queries=queries, targets=arrays["target_embeddings"], groups=groups)
    save_pairs(target, pairs)
    return pairs.meta(), notes


def as_text(name: str, values: Array | list[str]) -> list[str]:
    """Return labels as text: unicode, UTF-8 bytes or whole numbers, one axis."""
    if isinstance(values, list):
        return values
    if values.ndim != 1 or values.dtype.kind not in "USiu":
        raise DataInvalid(
            f"{name}: {values.dtype} of shape {list(values.shape)}; needed one axis of text, "
            "bytes or whole numbers"
        )
    try:
        if values.dtype.kind == "S":
            return [value.decode() for value in values.tolist()]
        texts = [str(value) for value in values.tolist()]
        for text in texts:
            text.encode()
    except ValueError as error:
        raise DataInvalid(f"{name}: not valid text ({error})") from error
    return texts
