"""Stored embeddings as a teacher: what a student is given, what it should say, and which rows.

A row's answer is looked up, never computed: nothing here can answer a new input.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.formats import check_embeddings, check_split
from core.tensors.manifests import check_texts, shown
from core.tensors.shards import Array

FORMAT = ("embeddings", 1)
ROWS = ("train_rows", "held_out_rows")
LABELS = ("ids", "groups", "texts")


@dataclass(frozen=True)
class Embeddings:
    """n rows of a teacher's embedding space, and which of them may be trained on."""

    ids: list[str]
    """[n] unique."""
    embeddings: Array
    """[n, D] float16, float32 or float64, finite, no zero rows: what the teacher says."""
    train_rows: Array
    """[t >= 1] int64, ascending; with ``held_out_rows`` each row once."""
    held_out_rows: Array
    """[h] int64, ascending; empty where nothing is held out yet."""
    inputs: Array | None = None
    """[n, d] what a student is given, same rules; None: the embeddings themselves."""
    groups: list[str] | None = None
    """[n] a label per row, or none."""
    texts: list[str] | None = None
    """[n] what each row embeds, for people, or none."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """Where the rows come from and how they were split; of an upload its sender's claims."""

    @property
    def given(self) -> Array:
        """Return what a student is given, [n, d]."""
        return self.embeddings if self.inputs is None else self.inputs

    def meta(self) -> dict[str, Any]:
        """Return the facts a plan needs."""
        return {
            "rows": len(self.train_rows),
            "all_rows": len(self.embeddings),
            "dim": int(self.given.shape[1]),
            "target_dim": int(self.embeddings.shape[1]),
            "held_out": len(self.held_out_rows),
            "groups": len(set(self.groups or ())),
            "texts": self.texts is not None,
            "pairs": self.manifest.get("pairs"),
        }


def whole(embeddings: Array, *, ids: list[str] | None = None, **beside: Any) -> Embeddings:
    """Return embeddings of which every row may be trained on; without ids, row numbers.

    Args:
        embeddings: [n, D].
        ids: [n] unique.
        beside: inputs, groups, texts, manifest.
    """
    rows = len(np.atleast_1d(embeddings))
    return Embeddings(
        ids=[str(row) for row in range(rows)] if ids is None else ids,
        embeddings=embeddings,
        train_rows=np.arange(rows, dtype=np.int64),
        held_out_rows=np.zeros(0, np.int64),
        **beside,
    )


def check_stored(found: Embeddings) -> None:
    """Raise DataInvalid naming the field, the value and what is needed."""
    check_embeddings("embeddings", found.embeddings)
    rows = len(found.embeddings)
    if found.inputs is not None:
        check_embeddings("inputs", found.inputs)
        if len(found.inputs) != rows:
            raise DataInvalid(f"inputs: {len(found.inputs)} rows for {rows} embeddings")
    for name in LABELS:
        _check_labels(name, getattr(found, name), rows)
    twice = [name for name, count in Counter(found.ids).items() if count > 1]
    if twice:
        raise DataInvalid(
            f"ids: {shown(twice[0])} appears more than once ({len(twice)} such ids); make ids "
            "unique"
        )
    _check_split(found, rows)
    _check_manifest(found)


def _check_labels(name: str, labels: list[str] | None, rows: int) -> None:
    if labels is None:
        return
    if len(labels) != rows:
        raise DataInvalid(f"{name}: {len(labels)} entries for {rows} embeddings")
    # A text may have lines; a name may not.
    lines = str.maketrans("\n\r\t", "   ") if name == "texts" else {}
    check_texts(name, [label.translate(lines) for label in labels] if lines else labels)


def _check_split(found: Embeddings, rows: int) -> None:
    for name in ROWS:
        part = getattr(found, name)
        if part.dtype != np.int64 or part.ndim != 1:
            raise DataInvalid(
                f"{name}: {part.dtype} of shape {list(part.shape)}; needed int64 [rows]"
            )
        if (part[1:] <= part[:-1]).any():
            raise DataInvalid(f"{name}: needed ascending row numbers, each once")
    if not len(found.train_rows):
        raise DataInvalid("train_rows: none; needed at least 1 row to train on")
    check_split(found.train_rows, found.held_out_rows, rows=rows)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


_FACTS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "pairs": (lambda v: v is None or _is_sha256(v), "null or the SHA-256 of pairs"),
    "stored": (lambda v: v is None or _is_sha256(v), "null or the SHA-256 of embeddings"),
    "given": (lambda v: v in ("queries", "targets", "stored"), "queries, targets or stored"),
    "split": (lambda v: v in ("query", "cluster"), "query or cluster"),
    "seed": (lambda v: type(v) is int and 0 <= v < 2**31, "a whole number, 0 to 2147483647"),
    "test_fraction": (
        lambda v: type(v) in (int, float) and 0 < v < 1,
        "a number above 0 and below 1",
    ),
    "source": (lambda v: v == "imported", "imported"),
}
"""What a manifest may say beside format, version and counts, and how it must be said."""


def _check_manifest(found: Embeddings) -> None:
    written = {**_named(), **found.meta()}
    for name, value in found.manifest.items():
        if name in _FACTS:
            check, needed = _FACTS[name]
            if not check(value):
                raise DataInvalid(f"manifest: {name} is {shown(value)}; needed {needed}")
        elif name not in written:
            raise DataInvalid(f"manifest: {shown(name)} is not known; known: {', '.join(_FACTS)}")
        elif type(value) is not type(written[name]) or value != written[name]:
            raise DataInvalid(f"manifest: {name} is {shown(value)}; needed {shown(written[name])}")


def _named() -> dict[str, Any]:
    return dict(zip(("format", "version"), FORMAT, strict=True))


def save_embeddings(path: Path, found: Embeddings) -> None:
    """Write checked embeddings as one .safetensors; equal ones give equal bytes."""
    check_stored(found)
    tensors = {name: getattr(found, name) for name in ("embeddings", *ROWS)}
    if found.inputs is not None:
        tensors["inputs"] = found.inputs
    for name in LABELS:
        labels = getattr(found, name)
        if labels is not None:
            tensors[name], tensors[f"{name}_offsets"] = shards.pack_text(labels)
    shards.save(path, tensors, {**found.manifest, **_named(), **found.meta()})


def load_embeddings(path: Path) -> Embeddings:
    """Read and check what save_embeddings wrote.

    Raises:
        DataInvalid: another format, a tensor missing, damaged text, or embeddings that are none.
    """
    tensors, manifest = shards.load(path)
    told = manifest.get("format"), manifest.get("version")
    if told != FORMAT:
        raise DataInvalid(
            f"manifest: format {shown(told[0])}, version {shown(told[1])}; needed "
            f"{FORMAT[0]!r}, version {FORMAT[1]}"
        )
    labels = {name: read_labels(tensors, name) for name in LABELS}
    missing = [name for name in ("embeddings", *ROWS) if name not in tensors]
    if labels["ids"] is None:
        missing.append("ids")
    if missing:
        raise DataInvalid(
            f"{', '.join(missing)}: missing; the file holds {', '.join(sorted(tensors))}"
        )
    facts = {name: value for name, value in manifest.items() if name in _FACTS}
    arrays = {name: tensors.get(name) for name in ("embeddings", "inputs", *ROWS)}
    found = Embeddings(**arrays, **labels, manifest=facts)  # type: ignore[arg-type]
    check_stored(found)
    # All it says, also of its arrays; what is kept is what they do not say.
    _check_manifest(Embeddings(**{**vars(found), "manifest": manifest}))
    return found


def read_labels(tensors: Mapping[str, Array], name: str) -> list[str] | None:
    """Return packed text of a .safetensors, None where there is none; half is DataInvalid."""
    halves = (name in tensors, f"{name}_offsets" in tensors)
    if not any(halves):
        return None
    if not all(halves):
        lost = f"{name}_offsets" if halves[0] else name
        raise DataInvalid(f"{lost}: missing beside the other half of the packed {name}")
    return shards.unpack_text(tensors[name], tensors[f"{name}_offsets"])
