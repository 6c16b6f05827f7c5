"""A federated model in document 000's layout: NAME.pkl beside a folder of .npz. ``y = q @ W``."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from core.artifacts.importers import restricted_pickle
from core.artifacts.importers.npy import read_npz
from core.artifacts.importers.pairs import as_text
from core.artifacts.limits import Budget
from core.errors import DataInvalid, TooLarge
from core.rotations.scaled import ScaledRotation, split
from core.tensors.formats import Federated, check_embeddings, save_federated
from core.tensors.manifests import check_temperature, check_texts, shown
from core.tensors.shards import Array

ROUTING = ("query_embeddings", "target_embeddings", "idx_to_cluster_keys", "idx_to_cluster_values")
CLUSTER = ("W_stack", "target_embeddings", "indices")


@dataclass(frozen=True)
class Folder:
    """The model's files by their name inside the archive."""

    pickle: Path
    npz: Mapping[str, Path]
    """File name inside ``NAME/`` -> path."""
    notes: list[str]


@dataclass(frozen=True)
class _Routing:
    queries: Array
    targets: Array
    cluster_of: Array


def from_members(
    members: Mapping[str, Path], target: Path, *, budget: Budget
) -> tuple[dict[str, Any], list[str]]:
    """Read an unpacked archive, write ``target``; return the model's meta and notes."""
    folder = find_folder(members)
    facts = read_facts(folder.pickle, budget=budget)
    ids = _cluster_ids(facts, budget)
    temperature = _temperature(facts["temperature"])
    routing = _read_routing(folder.npz["routing_data.npz"], ids, budget)
    notes = list(folder.notes)
    files, spare = _cluster_files(folder.npz, ids)
    notes += [f"ignored, no such cluster: {name}" for name in spare[:50]]
    dim = routing.queries.shape[1]
    _check_memory(len(ids), dim, len(routing.queries), budget)
    centroids = _centroids(facts, ids, routing, notes)
    parts = _read_clusters(files, ids, routing, notes, budget)
    model = _assemble(ids, temperature, routing, centroids, parts)
    save_federated(target, model)
    if mended := model.manifest["reflected_clusters"]:
        notes.append(
            f"reflected, for their determinant was -1: clusters {', '.join(map(str, mended))}"
        )
    return model.meta(), notes


def find_folder(members: Mapping[str, Path]) -> Folder:
    """Find the one NAME.pkl and its folder among an archive's members."""
    pickles = [name for name in members if name.endswith((".pkl", ".pickle")) and _is_real(name)]
    if len(pickles) != 1:
        shown = ", ".join(sorted(members)[:10]) or "nothing"
        raise DataInvalid(
            f"the archive holds {len(pickles)} .pkl files among {shown}; needed: one NAME.pkl and "
            "its folder NAME/ with routing_data.npz and cluster_*.npz"
        )
    stem = pickles[0].rsplit(".", 1)[0]
    homes = [name.rsplit("/", 1)[0] for name in members if name.endswith("/routing_data.npz")]
    home = stem if stem in homes else homes[0] if len(homes) == 1 else None
    if home is None:
        raise DataInvalid(
            f"the archive holds no {stem}/routing_data.npz; pack {pickles[0]} together with its "
            f"folder {stem}/"
        )
    inside = {
        name.removeprefix(f"{home}/"): path
        for name, path in members.items()
        if name.startswith(f"{home}/")
    }
    npz = {name: path for name, path in inside.items() if name.endswith(".npz") and "/" not in name}
    used = {pickles[0], *(f"{home}/{name}" for name in npz)}
    notes = [f"ignored, not part of the model: {name}" for name in sorted(set(members) - used)[:50]]
    return Folder(members[pickles[0]], npz, notes)


def _is_real(name: str) -> bool:
    # macOS archives carry a shadow of every file.
    return not name.startswith("__MACOSX/") and not name.rsplit("/", 1)[-1].startswith(".")


def read_facts(path: Path, *, budget: Budget) -> dict[str, Any]:
    """Read NAME.pkl, which must be a plain dict with the fields an import needs."""
    if path.stat().st_size > budget.limits.pickle_bytes:
        raise TooLarge(f"the .pkl is larger than {budget.limits.pickle_bytes} bytes")
    facts = restricted_pickle.loads(path.read_bytes(), limits=budget.limits)
    if not isinstance(facts, dict):
        raise DataInvalid(f"the .pkl holds a {type(facts).__name__}; needed a dict")
    if missing := [name for name in ("cluster_ids", "temperature") if name not in facts]:
        there = ", ".join(sorted(str(name)[:40] for name in facts)[:20]) or "nothing"
        raise DataInvalid(f"{', '.join(missing)}: missing from the .pkl, which holds {there}")
    return facts


def _temperature(value: Any) -> float:
    scalar = isinstance(value, np.ndarray) and value.shape == ()
    return check_temperature(value.item() if scalar else value)


def _cluster_ids(facts: Mapping[str, Any], budget: Budget) -> list[str]:
    found = facts["cluster_ids"]
    if isinstance(found, np.ndarray):
        found = as_text("cluster_ids", found)
    plain = isinstance(found, list | tuple) and all(
        isinstance(item, str | int | np.integer) and not isinstance(item, bool) for item in found
    )
    if not plain or not found:
        raise DataInvalid("cluster_ids: needed a list of one or more texts or whole numbers")
    ids = [str(item) for item in found]
    check_texts("cluster_ids", ids)
    if len(ids) > budget.limits.clusters or max(map(len, ids)) > 200:
        raise TooLarge(f"cluster_ids: at most {budget.limits.clusters} ids of 200 characters")
    if len(set(ids)) != len(ids):
        raise DataInvalid("cluster_ids: an id appears twice; make ids unique")
    told = facts.get("num_clusters")
    if told is not None and (not isinstance(told, int | np.integer) or told != len(ids)):
        raise DataInvalid(f"num_clusters: {shown(told)} beside {len(ids)} cluster_ids")
    return ids


def _lookup(ids: list[str]) -> dict[str, int]:
    """Map every accepted spelling of an id, with and without ``cluster_``, to its place."""
    spellings: dict[str, int] = {}
    for index, name in enumerate(ids):
        for other in (name.removeprefix("cluster_"), f"cluster_{name}"):
            spellings.setdefault(other, index)
    return {**spellings, **{name: index for index, name in enumerate(ids)}}


def _read_routing(path: Path, ids: list[str], budget: Budget) -> _Routing:
    arrays = read_npz(path, wanted=ROUTING, name="routing_data.npz", budget=budget).arrays
    if missing := [name for name in ROUTING if name not in arrays]:
        raise DataInvalid(f"routing_data.npz: {', '.join(missing)} missing")
    queries, targets = arrays["query_embeddings"], arrays["target_embeddings"]
    check_embeddings("routing_data.npz: query_embeddings", queries)
    check_embeddings("routing_data.npz: target_embeddings", targets)
    if queries.shape != targets.shape:
        raise DataInvalid(
            f"routing_data.npz: target_embeddings {list(targets.shape)} beside query_embeddings "
            f"{list(queries.shape)}; both must be the same, row by row"
        )
    if queries.shape[1] > budget.limits.dim:
        raise TooLarge(f"the model has {queries.shape[1]} dimensions; at most {budget.limits.dim}")
    keys, values = arrays["idx_to_cluster_keys"], arrays["idx_to_cluster_values"]
    cluster_of = _cluster_of(keys, as_text("idx_to_cluster_values", values), ids, len(queries))
    single = [array.astype(np.float32) for array in (queries, targets)]
    return _Routing(single[0], single[1], cluster_of)


def _cluster_of(keys: Array, values: list[str], ids: list[str], rows: int) -> Array:
    """Turn (query row, cluster id) into [rows] int64; every row once, no cluster empty."""
    numbers = _rows_in("idx_to_cluster_keys", keys, rows)
    if len(numbers) != len(values):
        raise DataInvalid(
            f"routing_data.npz: {len(numbers)} idx_to_cluster_keys beside {len(values)} values"
        )
    if len(np.unique(numbers)) != rows or len(numbers) != rows:
        raise DataInvalid(
            f"routing_data.npz: idx_to_cluster_keys name {len(np.unique(numbers))} of {rows} query "
            "rows; each row needs its cluster, once"
        )
    known = _lookup(ids)
    if unknown := [value for value in values if value not in known]:
        raise DataInvalid(
            f"routing_data.npz: idx_to_cluster_values name {unknown[0][:60]!r}, which is not in "
            f"cluster_ids ({', '.join(ids[:5])} ...)"
        )
    cluster_of = np.empty(rows, np.int64)
    cluster_of[numbers] = [known[value] for value in values]
    sizes = np.bincount(cluster_of, minlength=len(ids))
    if (sizes == 0).any():
        name = ids[int(np.argmin(sizes))]
        raise DataInvalid(
            f"cluster {name} is empty ({int((sizes == 0).sum())} such): no query row belongs to "
            "it; drop it from cluster_ids"
        )
    return cluster_of


def _rows_in(name: str, values: Array, rows: int) -> Array:
    """Return whole numbers in [0, rows) as int64."""
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise DataInvalid(f"{name}: {values.dtype} {list(values.shape)}; needed whole numbers [n]")
    outside = (values < 0) | (values >= rows)
    if outside.any():
        at = int(np.argmax(outside))
        raise DataInvalid(f"{name}: entry {at} is {values[at]}; allowed 0 to {rows - 1}")
    return values.astype(np.int64)


def _cluster_files(npz: Mapping[str, Path], ids: list[str]) -> tuple[dict[int, Path], list[str]]:
    """Match each cluster to its file, named after the id with or without ``cluster_``."""
    known = _lookup(ids)
    files: dict[int, Path] = {}
    spare: list[str] = []
    # Exact names first, so that a second spelling never takes another cluster's place.
    names = [name for name in npz if name != "routing_data.npz"]
    for name in sorted(names, key=lambda name: (name.removesuffix(".npz") not in ids, name)):
        index = known.get(name.removesuffix(".npz"))
        if index is None or index in files:
            spare.append(name)
        else:
            files[index] = npz[name]
    if missing := [name for index, name in enumerate(ids) if index not in files]:
        raise DataInvalid(
            f"cluster {missing[0]}: no file {missing[0]}.npz or cluster_{missing[0]}.npz in the "
            f"folder ({len(missing)} of {len(ids)} clusters lack theirs)"
        )
    return files, sorted(spare)


def _check_memory(clusters: int, dim: int, rows: int, budget: Budget) -> None:
    # The tensors, and the copy that writing them takes.
    needed = 2 * 4 * (clusters * dim * dim + 2 * rows * dim)
    if needed > budget.limits.memory_bytes:
        raise TooLarge(
            f"{clusters} clusters of dimension {dim} need about {needed} bytes of memory to "
            f"import; the limit is {budget.limits.memory_bytes}"
        )


def _centroids(
    facts: Mapping[str, Any], ids: list[str], routing: _Routing, notes: list[str]
) -> Array:
    """Return [C, d] float32 centroids: those in the .pkl, or the means of the clusters' queries."""
    found = facts.get("cluster_centroids")
    dim = routing.queries.shape[1]
    if found is None or (isinstance(found, dict | list) and not found):
        notes.append("no cluster_centroids: the means of the clusters' queries are used")
        sums = np.zeros((len(ids), dim))
        np.add.at(sums, routing.cluster_of, routing.queries)
        return (sums / np.bincount(routing.cluster_of)[:, None]).astype(np.float32)
    if isinstance(found, dict):
        known = {str(name): vector for name, vector in found.items()}
        if lacking := [name for name in ids if name not in known]:
            raise DataInvalid(f"cluster_centroids: none for cluster {lacking[0]}")
        found = [known[name] for name in ids]
    return _stack(found, (len(ids), dim))


def _stack(found: Any, shape: tuple[int, int]) -> Array:
    try:
        stacked = np.asarray(found)
    except ValueError as error:
        raise DataInvalid(f"cluster_centroids: rows of different lengths ({error})") from error
    if stacked.shape != shape or stacked.dtype.kind not in "fiu":
        raise DataInvalid(
            f"cluster_centroids: {stacked.dtype} of shape {list(stacked.shape)}; needed numbers "
            f"{list(shape)}"
        )
    # Finite first: widening a signalling NaN warns.
    if not np.isfinite(stacked).all() or not (np.abs(stacked.astype(np.float64)) < 1e15).all():
        raise DataInvalid("cluster_centroids: NaN, infinity or entries beyond 1e15")
    return stacked.astype(np.float32)


def _read_clusters(
    files: Mapping[int, Path],
    ids: list[str],
    routing: _Routing,
    notes: list[str],
    budget: Budget,
) -> list[ScaledRotation]:
    parts, differing = [], 0
    for index, name in enumerate(ids):
        arrays = read_npz(
            files[index], wanted=CLUSTER, name=f"cluster {name}", budget=budget
        ).arrays
        part = split(_matrix(arrays, name, routing.queries.shape[1]), cluster=name)
        parts.append(replace(part, rotation=part.rotation.astype(np.float32)))
        differing += not _indices_agree(arrays, name, routing, index)
    if differing:
        notes.append(f"indices of {differing} clusters differ from routing_data.npz, which is used")
    return parts


def _matrix(arrays: Mapping[str, Array], name: str, dim: int) -> Array:
    if "W_stack" not in arrays:
        raise DataInvalid(f"cluster {name}: W_stack missing from its .npz")
    stack = arrays["W_stack"]
    matrix = stack[0] if stack.ndim == 3 and len(stack) == 1 else stack
    if matrix.shape != (dim, dim) or matrix.dtype.name not in ("float16", "float32", "float64"):
        raise DataInvalid(
            f"cluster {name}: W_stack {stack.dtype} {list(stack.shape)}; needed floats "
            f"[1, {dim}, {dim}], the queries' dimension"
        )
    return matrix


def _indices_agree(arrays: Mapping[str, Array], name: str, routing: _Routing, index: int) -> bool:
    """Check a cluster's own rows; tell whether they are those the routing gives it."""
    rows, dim = routing.targets.shape
    mine = np.flatnonzero(routing.cluster_of == index)
    own = mine
    if "indices" in arrays:
        own = _rows_in(f"cluster {name}: indices", arrays["indices"], rows)
    if "target_embeddings" in arrays:
        check_embeddings(f"cluster {name}: target_embeddings", arrays["target_embeddings"])
        found, needed = arrays["target_embeddings"].shape, (len(own), dim)
        if found != needed:
            raise DataInvalid(
                f"cluster {name}: target_embeddings {list(found)}; its indices need {list(needed)}"
            )
    return np.array_equal(np.sort(own), mine)


def _assemble(
    ids: list[str],
    temperature: float,
    routing: _Routing,
    centroids: Array,
    parts: list[ScaledRotation],
) -> Federated:
    rows, dim = routing.queries.shape
    manifest = {
        "temperature": temperature,
        "source": "imported",
        "anchor": "none",
        "cluster_ids": ids,
        "reflected_clusters": [
            name for name, part in zip(ids, parts, strict=True) if part.reflected
        ],
        "largest_deviation": float(f"{max(part.deviation for part in parts):.3g}"),
    }
    return Federated(
        rotations=np.stack([part.rotation for part in parts]),
        scales=np.array([part.scale for part in parts], np.float32),
        anchor=np.eye(dim, dtype=np.float32),
        centroids=centroids,
        queries=routing.queries,
        targets=routing.targets,
        cluster_of=routing.cluster_of,
        train_rows=np.arange(rows, dtype=np.int64),
        held_out_rows=np.empty(0, np.int64),
        manifest=manifest,
    )
