"""Stored embeddings from an .npz or a .safetensors, checked and in one canonical form."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core.artifacts.importers.npy import read_npz
from core.artifacts.importers.pairs import NEEDED as PAIRS
from core.artifacts.importers.pairs import as_text
from core.artifacts.limits import Budget
from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.embeddings import (
    LABELS,
    load_embeddings,
    read_labels,
    save_embeddings,
    whole,
)

NEEDED = "embeddings"
OPTIONAL = ("inputs", *LABELS)


def looks_like(names: Collection[str]) -> bool:
    """Tell whether a table with arrays of these names is meant as stored embeddings."""
    return NEEDED in names and not set(PAIRS) <= set(names)


def from_npz(source: Path, target: Path, *, budget: Budget) -> tuple[dict[str, Any], list[str]]:
    """Read an .npz, write ``target``; return the meta and notes on what was left out."""
    table = read_npz(source, wanted=(NEEDED, *OPTIONAL), name="the .npz", budget=budget)
    return write(target, table.arrays, notes=ignored(table.ignored))


def from_file(source: Path, target: Path) -> tuple[dict[str, Any], list[str]]:
    """Rewrite what this service wrote as ``embeddings``; return its meta and no notes."""
    found = load_embeddings(source)
    save_embeddings(target, found)
    return found.meta(), []


def from_tensors(source: Path, target: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a foreign .safetensors, write ``target``; return the meta and notes."""
    tensors, _ = shards.load(source)
    values: dict[str, Any] = {}
    known = {NEEDED, "inputs", *LABELS, *(f"{name}_offsets" for name in LABELS)}
    for name in (NEEDED, *OPTIONAL):
        if f"{name}_offsets" in tensors:
            values[name] = read_labels(tensors, name)
        elif name in tensors:
            values[name] = tensors[name]
    return write(target, values, notes=ignored(sorted(set(tensors) - known)))


def ignored(names: Collection[str]) -> list[str]:
    """Return a note on each field that nothing here reads."""
    return [f"ignored, no such field: {name[:100]}" for name in list(names)[:50]]


def write(
    target: Path, values: Mapping[str, Any], *, notes: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Write canonical embeddings whose rows may all be trained on; return meta and all notes.

    Args:
        target: the file.
        values: ``embeddings``, an array; optional ``inputs``, an array, and ``ids``, ``groups``,
            ``texts``: text, bytes or whole numbers, a list or an array of one axis.
        notes: what was left out so far.
    """
    labels = {name: _labels(name, values[name]) for name in LABELS if name in values}
    ids = labels.pop("ids", None)
    if ids is None:
        notes = [*notes, "no ids in the file: row numbers are used"]
    beside = {"manifest": {"source": "imported"}, **labels}
    found = whole(values[NEEDED], ids=ids, inputs=values.get("inputs"), **beside)
    save_embeddings(target, found)
    return found.meta(), notes


def _labels(name: str, values: Any) -> list[str]:
    if isinstance(values, np.ndarray):
        return as_text(name, values)
    if not isinstance(values, list | tuple):
        raise DataInvalid(f"{name}: a {type(values).__name__}; needed a list of text")
    for row, value in enumerate(values):
        if type(value) not in (str, int):
            raise DataInvalid(
                f"{name}: entry {row} is a {type(value).__name__}; needed text or whole numbers"
            )
    return [str(value) for value in values]
