"""The data formats: pairs and federated models, their files, and what makes one invalid."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.manifests import check_manifest, check_temperature, check_texts, shown
from core.tensors.shards import Array

FLOATS = ("float16", "float32", "float64")
TINY, HUGE = 1e-15, 1e15
"""Bounds of a row's largest entry: its squared norm neither under- nor overflows float32."""


@dataclass(frozen=True)
class Pairs:
    """Queries and the targets they belong to, row by row."""

    ids: list[str]
    """[Q] unique."""
    queries: Array
    """[Q, d] float16, float32 or float64, finite, no zero rows."""
    targets: Array
    """[Q, d] same dtype rules."""
    groups: list[str] | None = None
    """[Q] a label per row, or none."""

    def meta(self) -> dict[str, Any]:
        """Return the facts a plan needs."""
        rows, dim = self.queries.shape
        return {"rows": rows, "dim": dim, "groups": len(set(self.groups or ()))}


def check_embeddings(name: str, array: Array) -> None:
    """Raise DataInvalid unless ``array`` is [n >= 1, d >= 2], a float dtype, finite, non-zero."""
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
        raise DataInvalid(f"{name}: shape {list(array.shape)}; needed [rows >= 1, dim >= 2]")
    if array.dtype.name not in FLOATS:
        raise DataInvalid(f"{name}: dtype {array.dtype}; allowed: {', '.join(FLOATS)}")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise DataInvalid(
            f"{name}: row {row} holds NaN or infinity ({int((~finite).sum())} such rows in all); "
            "remove those rows or embed them again"
        )
    zero = ~array.any(axis=1)
    if zero.any():
        row = int(np.argmax(zero))
        raise DataInvalid(f"{name}: row {row} is all zeros; a direction is needed, remove the row")
    largest = np.abs(array).max(axis=1).astype(np.float64)
    odd = (largest < TINY) | (largest > HUGE)
    if odd.any():
        row = int(np.argmax(odd))
        raise DataInvalid(
            f"{name}: the largest entry of row {row} is {largest[row]:.3g}; norms in float32 need "
            f"it between {TINY:g} and {HUGE:g}, scale the row"
        )


def check_pairs(pairs: Pairs) -> None:
    """Raise DataInvalid naming the field, the value and the fix."""
    check_embeddings("query_embeddings", pairs.queries)
    check_embeddings("target_embeddings", pairs.targets)
    if pairs.queries.shape != pairs.targets.shape:
        raise DataInvalid(
            f"target_embeddings: shape {list(pairs.targets.shape)} beside query_embeddings "
            f"{list(pairs.queries.shape)}; both must be the same"
        )
    for name, texts in (("ids", pairs.ids), ("groups", pairs.groups)):
        if texts is not None and len(texts) != len(pairs.queries):
            raise DataInvalid(f"{name}: {len(texts)} entries for {len(pairs.queries)} rows")
        check_texts(name, texts or ())
    twice = [name for name, count in Counter(pairs.ids).items() if count > 1]
    if twice:
        raise DataInvalid(
            f"ids: {twice[0]!r} appears more than once ({len(twice)} such ids); make ids unique"
        )


def save_pairs(path: Path, pairs: Pairs) -> None:
    """Write a checked set of pairs as one .safetensors."""
    check_pairs(pairs)
    tensors = {"query_embeddings": pairs.queries, "target_embeddings": pairs.targets}
    tensors["ids"], tensors["ids_offsets"] = shards.pack_text(pairs.ids)
    if pairs.groups is not None:
        tensors["groups"], tensors["groups_offsets"] = shards.pack_text(pairs.groups)
    shards.save(path, tensors, {"format": "pairs", "version": 1, **pairs.meta()})


def load_pairs(path: Path) -> Pairs:
    """Read what save_pairs wrote; DataInvalid where a tensor is missing or text is damaged."""
    tensors, _ = shards.load(path)
    groups = None
    _need(tensors, ("query_embeddings", "target_embeddings", "ids", "ids_offsets"))
    if "groups" in tensors:
        _need(tensors, ("groups_offsets",))
        groups = shards.unpack_text(tensors["groups"], tensors["groups_offsets"])
    return Pairs(
        ids=shards.unpack_text(tensors["ids"], tensors["ids_offsets"]),
        queries=tensors["query_embeddings"],
        targets=tensors["target_embeddings"],
        groups=groups,
    )


def _need(tensors: Mapping[str, Array], names: Iterable[str]) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        there = ", ".join(sorted(tensors)) or "nothing"
        raise DataInvalid(f"{', '.join(missing)}: missing; the file holds {there}")


@dataclass(frozen=True)
class Federated:
    """A federated model: one rotation per cluster, and the training queries that route to it.

    ``y = q @ (scales[c] * rotations[c])`` is cluster c's map; ``anchor`` is the global rotation G
    that the clusters' rotations were fitted around (the identity where there was none).
    """

    rotations: Array
    """[C, d, d] float32, orthogonal with determinant +1."""
    scales: Array
    """[C] float32, > 0; one where the model never scales."""
    anchor: Array
    """[d, d] float32, a rotation."""
    centroids: Array
    """[C, d] float32, of the clusters' training queries."""
    queries: Array
    """[n, d] float32, training queries."""
    targets: Array
    """[n, d] float32, their targets."""
    cluster_of: Array
    """[n] int64 in [0, C)."""
    train_rows: Array
    """[n] int64: rows of the pairs the model was fitted on; 0..n-1 for an imported model."""
    held_out_rows: Array
    """[h] int64: rows of the pairs never seen; empty for an imported model."""
    manifest: dict[str, Any]
    """temperature, how it was fitted (``pairs``: SHA-256 of what on), what was mended on import.

    In an uploaded model these are its sender's claims, checked for form and against the arrays.
    Whoever evaluates it on the pairs it names takes its word for which rows it never saw.
    """

    def meta(self) -> dict[str, Any]:
        """Return the facts a plan needs."""
        clusters, dim, _ = self.rotations.shape
        return {
            "clusters": clusters,
            "dim": dim,
            "rows": len(self.queries),
            "held_out": len(self.held_out_rows),
            "temperature": check_temperature(self.manifest.get("temperature")),
            "pairs": self.manifest.get("pairs"),
        }


_FEDERATED_TENSORS = {
    "rotations": "rotations",
    "scales": "scales",
    "anchor": "anchor",
    "centroids": "centroids",
    "query_embeddings": "queries",
    "target_embeddings": "targets",
    "cluster_of": "cluster_of",
    "train_rows": "train_rows",
    "held_out_rows": "held_out_rows",
}


def check_federated(model: Federated) -> None:
    """Raise DataInvalid naming the field, the value and the fix."""
    _check_shapes(model)
    check_embeddings("query_embeddings", model.queries)
    check_embeddings("target_embeddings", model.targets)
    for name in ("rotations", "scales", "anchor", "centroids"):
        if not np.isfinite(getattr(model, name)).all():
            raise DataInvalid(f"{name}: holds NaN or infinity")
    if (model.scales <= 0).any():
        worst = int(np.argmin(model.scales))
        raise DataInvalid(f"scales: cluster {worst} has {model.scales[worst]}; needed > 0")
    check_clusters(model.cluster_of, len(model.rotations))
    _check_rotations("rotations", model.rotations)
    _check_rotations("anchor", model.anchor[None])
    check_split(model.train_rows, model.held_out_rows)
    written = {"format": "federated_model", "version": 1, **model.meta()}
    clusters, rows = len(model.rotations), len(model.queries)
    check_manifest(model.manifest, written, clusters=clusters, rows=rows)
    _check_sources(model)


def _check_shapes(model: Federated) -> None:
    if model.rotations.ndim != 3 or not len(model.rotations):
        raise DataInvalid(
            f"rotations: shape {list(model.rotations.shape)}; needed [clusters >= 1, dim, dim]"
        )
    (clusters, dim, _), rows = model.rotations.shape, len(np.atleast_1d(model.queries))
    needed: Layout = {
        "rotations": ((clusters, dim, dim), "float32"),
        "scales": ((clusters,), "float32"),
        "anchor": ((dim, dim), "float32"),
        "centroids": ((clusters, dim), "float32"),
        "queries": ((rows, dim), "float32"),
        "targets": ((rows, dim), "float32"),
        "cluster_of": ((rows,), "int64"),
        "train_rows": ((rows,), "int64"),
        "held_out_rows": ((model.held_out_rows.size,), "int64"),
    }
    check_layout(model, needed)


Layout = Mapping[str, tuple[tuple[int, ...], str]]
"""Field -> the shape and dtype it needs."""


def check_layout(model: object, needed: Layout) -> None:
    """Raise DataInvalid where an array of a model has another shape or dtype; None may be."""
    for name, (shape, dtype) in needed.items():
        found = getattr(model, name)
        if found is not None and (found.shape != shape or found.dtype.name != dtype):
            raise DataInvalid(
                f"{name}: {found.dtype} of shape {list(found.shape)}; needed {dtype} {list(shape)}"
            )


def check_split(train_rows: Array, held_out_rows: Array, *, rows: int | None = None) -> None:
    """Raise DataInvalid unless the two int64 arrays hold each of ``rows`` rows once.

    ``rows`` None: as many as the two have together.
    """
    both = np.sort(np.concatenate([train_rows, held_out_rows]))
    count = len(both) if rows is None else rows
    if not np.array_equal(both, np.arange(count)):
        raise DataInvalid(
            f"train_rows and held_out_rows: needed each row from 0 to {count - 1} once, in one of "
            "the two"
        )


def _check_sources(model: Federated) -> None:
    """Raise DataInvalid unless the rows of each source belong to its own clusters."""
    row = cluster = 0
    for source in model.manifest.get("sources", ()):
        rows, clusters = row + source["rows"], cluster + source["clusters"]
        own = model.cluster_of[row:rows]
        if own.min() < cluster or own.max() >= clusters:
            raise DataInvalid(
                f"manifest: sources: rows {row} to {rows - 1} must belong to clusters {cluster} to "
                f"{clusters - 1} of their source"
            )
        row, cluster = rows, clusters


def check_clusters(cluster_of: Array, clusters: int) -> None:
    """Raise DataInvalid where a row's cluster does not exist or a cluster has no row."""
    outside = (cluster_of < 0) | (cluster_of >= clusters)
    if outside.any():
        row = int(np.argmax(outside))
        raise DataInvalid(
            f"cluster_of: row {row} names cluster {cluster_of[row]}; there are {clusters}"
        )
    sizes = np.bincount(cluster_of, minlength=clusters)
    if (sizes == 0).any():
        empty = int(np.argmin(sizes))
        raise DataInvalid(f"cluster {empty} is empty: no training query belongs to it; drop it")


def _check_rotations(name: str, rotations: Array) -> None:
    dim = rotations.shape[1]
    for index, rotation in enumerate(rotations):
        wide = rotation.astype(np.float64)
        off = float(np.abs(wide.T @ wide - np.eye(dim)).max())
        if off > 1e-4:
            raise DataInvalid(f"{name}: matrix {index} is off orthogonal by {off:.3g}")
        # Not det: it underflows, the sign does not.
        if np.linalg.slogdet(wide)[0] < 0:
            raise DataInvalid(f"{name}: matrix {index} reflects (determinant -1); needed +1")


def save_federated(path: Path, model: Federated) -> None:
    """Write a checked federated model as one .safetensors."""
    check_federated(model)
    tensors = {name: getattr(model, field) for name, field in _FEDERATED_TENSORS.items()}
    manifest = {**model.manifest, "format": "federated_model", "version": 1, **model.meta()}
    shards.save(path, tensors, manifest)


def load_federated(path: Path) -> Federated:
    """Read what save_federated wrote; DataInvalid where it is another format or lacks a tensor."""
    tensors, manifest = shards.load(path)
    told = manifest.get("format"), manifest.get("version")
    if told != ("federated_model", 1):
        raise DataInvalid(
            f"manifest: format {shown(told[0])}, version {shown(told[1])}; needed "
            "'federated_model', version 1"
        )
    _need(tensors, _FEDERATED_TENSORS)
    fields = {field: tensors[name] for name, field in _FEDERATED_TENSORS.items()}
    return Federated(**fields, manifest=manifest)
