"""The data formats: pairs and federated models, their files, and what makes one invalid."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.shards import Array

FLOATS = ("float16", "float32", "float64")
TINY, HUGE = 1e-15, 1e15
"""Bounds of a row's largest entry: its squared norm neither under- nor overflows float32."""
COLDEST, HOTTEST = 1e-35, 1e35
"""Bounds of a temperature: a share of a row's squared norm, so it is wide; float32 holds both."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


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


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Raise DataInvalid where a text holds a control character or half of a surrogate pair."""
    for row, text in enumerate(texts):
        if found := _UNPRINTABLE.search(text):
            raise DataInvalid(
                f"{name}: entry {row} ({shown(text)}) holds U+{ord(found[0]):04X}, a control "
                "character or half a character; take it out"
            )


def shown(value: Any) -> str:
    """Return a stranger's value as a message may hold it: short, printable."""
    if isinstance(value, str):
        return repr(value[:60])
    if value is None or isinstance(value, int | float | np.number):
        return str(value)[:60]
    return f"a {type(value).__name__}"


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
    _check_rows(model)
    _check_manifest(model)


def _check_shapes(model: Federated) -> None:
    if model.rotations.ndim != 3 or not len(model.rotations):
        raise DataInvalid(
            f"rotations: shape {list(model.rotations.shape)}; needed [clusters >= 1, dim, dim]"
        )
    (clusters, dim, _), rows = model.rotations.shape, len(np.atleast_1d(model.queries))
    expected: dict[str, tuple[tuple[int, ...], str]] = {
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
    for name, (shape, dtype) in expected.items():
        found = getattr(model, name)
        if found.shape != shape or found.dtype.name != dtype:
            raise DataInvalid(
                f"{name}: {found.dtype} of shape {list(found.shape)}; needed {dtype} {list(shape)}"
            )


def _check_rows(model: Federated) -> None:
    rows = np.sort(np.concatenate([model.train_rows, model.held_out_rows]))
    if not np.array_equal(rows, np.arange(len(rows))):
        raise DataInvalid(
            f"train_rows and held_out_rows: needed each row from 0 to {len(rows) - 1} once, in one "
            "of the two"
        )


def check_temperature(value: Any) -> float:
    """Return the temperature, or raise DataInvalid unless it is a number float32 can divide by."""
    number = isinstance(value, int | float | np.integer | np.floating)
    if number and not isinstance(value, bool) and COLDEST <= value <= HOTTEST:
        return float(value)
    raise DataInvalid(
        f"temperature: {shown(value)}; needed a finite number > 0, {COLDEST:g} to {HOTTEST:g}"
    )


Check = Callable[[Any], bool]


def _number(low: float, high: float, kind: Any = int | float) -> Check:
    return lambda v: isinstance(v, kind) and not isinstance(v, bool) and low <= v <= high


def _just(value: Any) -> Check:
    return lambda v: type(v) is type(value) and v == value


def _one_of(*values: str | None) -> Check:
    return lambda v: v in values


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(text, str) and not _UNPRINTABLE.search(text) for text in value
    )


def _object(fields: Mapping[str, Check], *, optional: str = "") -> Check:
    return lambda v: (
        isinstance(v, dict)
        and v.keys() | {optional} == fields.keys() | {optional}
        and all(fields[name](inner) for name, inner in v.items())
    )


_CLUSTERING = _object(
    {
        "method": _one_of("kmeans", "mst", "groups"),
        "max_clusters": _number(1, 4096, int),
        "min_cluster_size": _number(1, 1_000_000, int),
    },
    optional="max_clusters",
)
_SCORE = _object(
    {
        "strength": _number(0, 1e300),
        "temperature": _number(COLDEST, HOTTEST),
        "log_score": _number(-1e300, 1e300),
        "hit1": _number(0, 1),
        "cosine": _number(-1.01, 1.01),
    }
)
_FACTS: Mapping[str, tuple[Check, str]] = {
    "temperature": (_number(COLDEST, HOTTEST), f"a number, {COLDEST:g} to {HOTTEST:g}"),
    "pairs": (
        lambda v: v is None or _sha256(v),
        "null or the SHA-256 of pairs, 64 lower-case hex digits",
    ),
    "anchor": (_one_of("global", "identity", "none"), "global, identity or none"),
    "clustering": (_CLUSTERING, "method, max_clusters, min_cluster_size as a job gives them"),
    "compat": (_one_of("legacy", None), "legacy or null"),
    "top_k": (_number(1, 1024, int), "a whole number, 1 to 1024"),
    "seed": (_number(0, 2**31 - 1, int), "a whole number, 0 to 2147483647"),
    "test_fraction": (_number(0, 1), "a number, 0 to 1"),
    "strength": (_number(0, 1e300), "a finite number >= 0"),
    "scores": (
        lambda v: isinstance(v, list) and all(map(_SCORE, v)),
        "a list of strength, temperature, log_score, hit1 and cosine, all finite numbers",
    ),
    "source": (_one_of("imported"), "imported"),
    "cluster_ids": (_texts, "a list of texts without control characters"),
    "reflected_clusters": (_texts, "a list of texts without control characters"),
    "largest_deviation": (_number(0, 1), "a number, 0 to 1"),
}
"""What a manifest may say beside format, version and counts, and how it must be said."""


def _check_manifest(model: Federated) -> None:
    """Refuse a manifest that says anything unknown, malformed or other than the arrays."""
    manifest = model.manifest
    written = {"format": "federated_model", "version": 1, **model.meta()}
    for name, found in manifest.items():
        if name not in written and name not in _FACTS:
            raise DataInvalid(f"manifest: {shown(name)} is not known; known: {', '.join(_FACTS)}")
        check, needed = _FACTS.get(name) or (_just(written[name]), shown(written[name]))
        if not check(found):
            raise DataInvalid(f"manifest: {name} is {shown(found)}; needed {needed}")
    ids = manifest.get("cluster_ids")
    if ids is not None and (len(ids) != len(model.rotations) or len(set(ids)) != len(ids)):
        raise DataInvalid(f"manifest: cluster_ids; needed {len(model.rotations)} different ones")
    if set(manifest.get("reflected_clusters", ())) - set(ids or ()):
        raise DataInvalid("manifest: reflected_clusters; needed some of cluster_ids")


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
