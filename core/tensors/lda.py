"""LDA teachers: heads a query is weighed over, their file, and what makes one invalid.

Letters of document 001: N heads, d the width of a query, m the width of an answer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.formats import Layout, check_embeddings, check_layout, check_split
from core.tensors.manifests import (
    LDA_FACTS,
    check_manifest,
    check_temperature,
    check_texts,
    shown,
)
from core.tensors.shards import Array

Mode = Literal["answers", "maps"]
MODES: tuple[Mode, ...] = ("answers", "maps")
FORMAT = ("lda_model", 1)


@dataclass(frozen=True)
class LDA:
    """N heads, and the training queries they stand for.

    The weights of a query are w = softmax(q_hat C_hat^T / temperature), hats being unit length; it
    is answered by w A (mode ``answers``) or by sum_c w_c q W_c (mode ``maps``).
    """

    centroids: Array
    """C, [N, d] float32, no zero row; of any length."""
    answers: Array | None
    """A, [N, m] float32, an answer vector per head; None in mode ``maps``."""
    maps: Array | None
    """W, [N, d, m] float32, a linear map per head; None in mode ``answers``."""
    queries: Array
    """[n, d] float32, training queries."""
    targets: Array
    """[n, m] float32, their targets."""
    cluster_of: Array
    """[n] int64 in [0, N); a head of an imported model may have none."""
    cluster_ids: list[str]
    """[N] what the heads are called, each once."""
    train_rows: Array
    """[n] int64: rows of the pairs the model was fitted on; 0..n-1 for an imported model."""
    held_out_rows: Array
    """[h] int64: rows of the pairs never seen; empty for an imported model."""
    manifest: dict[str, Any]
    """temperature, how it was fitted (``pairs``: SHA-256 of what on), where it came from."""

    @property
    def mode(self) -> Mode:
        """Which of the two formulas answers."""
        return "maps" if self.answers is None else "answers"

    @property
    def temperature(self) -> float:
        """Of the softmax, in units of a cosine; DataInvalid unless the manifest holds one."""
        return check_temperature(self.manifest.get("temperature"))

    def meta(self) -> dict[str, Any]:
        """Return the facts a plan needs."""
        clusters, dim = self.centroids.shape
        return {
            "clusters": clusters,
            "dim": dim,
            "target_dim": self.targets.shape[1],
            "rows": len(self.queries),
            "held_out": len(self.held_out_rows),
            "temperature": self.temperature,
            "mode": self.mode,
            "pairs": self.manifest.get("pairs"),
        }


_TENSORS = {
    "centroids": "centroids",
    "query_embeddings": "queries",
    "target_embeddings": "targets",
    "cluster_of": "cluster_of",
    "train_rows": "train_rows",
    "held_out_rows": "held_out_rows",
}
"""What every file holds: tensor -> field. Beside them ``answers`` or ``maps``, and cluster_ids."""


def check_lda(model: LDA) -> None:
    """Raise DataInvalid naming the field, the value and the fix."""
    if (model.answers is None) == (model.maps is None):
        raise DataInvalid("answers, maps: needed exactly one of the two")
    check_embeddings("centroids", model.centroids)
    check_embeddings("query_embeddings", model.queries)
    check_embeddings("target_embeddings", model.targets)
    _check_shapes(model)
    if model.answers is not None:
        check_embeddings("answers", model.answers)
    check_finite("maps", model.maps)
    outside = (model.cluster_of < 0) | (model.cluster_of >= len(model.centroids))
    if outside.any():
        row = int(np.argmax(outside))
        raise DataInvalid(
            f"cluster_of: row {row} names head {model.cluster_of[row]}; there are "
            f"{len(model.centroids)}"
        )
    check_ids(model.cluster_ids, heads=len(model.centroids))
    check_split(model.train_rows, model.held_out_rows)
    named = dict(zip(("format", "version"), FORMAT, strict=True))
    check_manifest(
        model.manifest,
        {**named, **model.meta()},
        clusters=len(model.centroids),
        rows=len(model.queries),
        facts=LDA_FACTS,
    )


def check_finite(name: str, heads: Array | None) -> None:
    """Raise DataInvalid where one of N heads' arrays holds NaN or infinity: [N, ..] floating."""
    for number, head in enumerate(() if heads is None else heads):
        if not np.isfinite(head).all():
            raise DataInvalid(f"{name}: head {number} holds NaN or infinity")


def check_ids(cluster_ids: list[str], *, heads: int) -> None:
    """Raise DataInvalid unless there is one printable id a head, each once."""
    check_texts("cluster_ids", cluster_ids)
    if len(cluster_ids) != heads:
        raise DataInvalid(f"cluster_ids: {len(cluster_ids)} entries for {heads} heads")
    [(name, count)] = Counter(cluster_ids).most_common(1)
    if count > 1:
        raise DataInvalid(f"cluster_ids: {shown(name)} appears {count} times; make ids unique")


def _check_shapes(model: LDA) -> None:
    (heads, dim), rows, width = model.centroids.shape, len(model.queries), model.targets.shape[1]
    needed: Layout = {
        "centroids": ((heads, dim), "float32"),
        "answers": ((heads, width), "float32"),
        "maps": ((heads, dim, width), "float32"),
        "queries": ((rows, dim), "float32"),
        "targets": ((rows, width), "float32"),
        "cluster_of": ((rows,), "int64"),
        "train_rows": ((rows,), "int64"),
        "held_out_rows": ((model.held_out_rows.size,), "int64"),
    }
    check_layout(model, needed)


def save_lda(path: Path, model: LDA) -> None:
    """Write a checked LDA model as one .safetensors; equal models give equal bytes."""
    check_lda(model)
    tensors = {name: getattr(model, field) for name, field in _TENSORS.items()}
    tensors[model.mode] = getattr(model, model.mode)
    tensors["cluster_ids"], tensors["cluster_ids_offsets"] = shards.pack_text(model.cluster_ids)
    named = dict(zip(("format", "version"), FORMAT, strict=True))
    shards.save(path, tensors, {**model.manifest, **named, **model.meta()})


def load_lda(path: Path) -> LDA:
    """Read what save_lda wrote, unchecked; DataInvalid: another format, or a tensor is missing."""
    tensors, manifest = shards.load(path)
    told = manifest.get("format"), manifest.get("version")
    if told != FORMAT:
        raise DataInvalid(
            f"manifest: format {shown(told[0])}, version {shown(told[1])}; needed "
            f"{FORMAT[0]!r}, version {FORMAT[1]}"
        )
    mode = manifest.get("mode")
    if mode not in MODES:
        raise DataInvalid(f"manifest: mode is {shown(mode)}; allowed: {', '.join(MODES)}")
    needed = {*_TENSORS, mode, "cluster_ids", "cluster_ids_offsets"}
    if missing := sorted(needed - set(tensors)):
        raise DataInvalid(f"{', '.join(missing)}: missing; the file holds {', '.join(tensors)}")
    fields = {field: tensors[name] for name, field in _TENSORS.items()}
    return LDA(
        **fields,
        answers=tensors.get("answers"),
        maps=tensors.get("maps"),
        cluster_ids=shards.unpack_text(tensors["cluster_ids"], tensors["cluster_ids_offsets"]),
        manifest=manifest,
    )


def without_questions(
    centroids: Array,
    *,
    answers: Array | None = None,
    maps: Array | None = None,
    cluster_ids: list[str],
    manifest: dict[str, Any],
) -> LDA:
    """Make a model whose training queries are not known: the centroids stand in their place.

    Their targets are the heads' answers, or in mode ``maps`` the centroids mapped by their own
    head, in float64.
    """
    heads = len(centroids)
    targets = answers
    if targets is None and maps is not None:
        mapped = [row.astype(np.float64) @ own for row, own in zip(centroids, maps, strict=True)]
        targets = np.stack(mapped).astype(np.float32)
    return LDA(
        centroids=centroids,
        answers=answers,
        maps=maps,
        queries=centroids,
        targets=np.zeros((0, 0), np.float32) if targets is None else targets,
        cluster_of=np.arange(heads),
        cluster_ids=cluster_ids,
        train_rows=np.arange(heads),
        held_out_rows=np.zeros(0, np.int64),
        manifest={**manifest, "questions": "centroids"},
    )
