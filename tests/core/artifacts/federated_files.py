"""Writes small federated models in document 000's layout, sound or broken in one chosen place."""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def rotation(dim: int, *, seed: int, reflect: bool = False) -> Array:
    """Return a random [dim, dim] float64 matrix, orthogonal, determinant +1 or -1."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]
    if (np.linalg.slogdet(q)[0] < 0) != reflect:
        q[:, 0] *= -1
    return q


class Model:
    """A model's parts as the writer sees them; change any before ``files``."""

    def __init__(
        self, *, ids: list[Any], maps: Array, queries: Array, targets: Array, cluster_of: Array
    ) -> None:
        self.maps, self.queries, self.targets, self.cluster_of = maps, queries, targets, cluster_of
        self.file_names = [f"{name}.npz" for name in ids]
        self.facts: dict[Any, Any] = {
            "cluster_ids": ids,
            "cluster_centroids": np.stack(
                [queries[cluster_of == c].mean(axis=0) for c in range(len(ids))]
            ),
            "temperature": 0.1,
            "global_target_ids": [f"t{row}" for row in range(len(queries))],
            "global_target_titles": [f"Title {row}" for row in range(len(queries))],
            "num_clusters": len(ids),
            "cluster_dir": Path("models/toy"),
            "data_path": "data/toy.jsonl",
            "metrics": {"hit@1": np.float32(0.9), "sizes": np.bincount(cluster_of)},
        }
        self.routing: dict[str, Array] = {
            "query_embeddings": queries,
            "target_embeddings": targets,
            "idx_to_cluster_keys": np.arange(len(queries)),
            "idx_to_cluster_values": np.array([str(ids[c]) for c in cluster_of]),
        }
        self.clusters: list[dict[str, Array]] = [
            {
                "W_stack": maps[c][None],
                "target_embeddings": targets[cluster_of == c],
                "indices": np.flatnonzero(cluster_of == c),
            }
            for c in range(len(ids))
        ]

    def files(self, *, name: str = "toy", protocol: int = 4) -> dict[str, bytes]:
        """Return member name -> bytes."""
        written = {
            f"{name}.pkl": pickle.dumps(self.facts, protocol),
            f"{name}/routing_data.npz": npz(self.routing),
        }
        for file_name, arrays in zip(self.file_names, self.clusters, strict=True):
            written[f"{name}/{file_name}"] = npz(arrays)
        return written


def model(*, clusters: int = 3, per_cluster: int = 4, dim: int = 6, dtype: str = "f4") -> Model:
    """Return a sound small model to write or to break."""
    rng = np.random.default_rng(clusters * 1000 + dim)
    n = clusters * per_cluster
    queries = rng.normal(size=(n, dim))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    cluster_of = np.arange(n) % clusters
    maps = np.stack([rotation(dim, seed=c) for c in range(clusters)])
    targets = np.empty_like(queries)
    for c in range(clusters):
        targets[cluster_of == c] = queries[cluster_of == c] @ maps[c]
    return Model(
        ids=[f"cluster_{c}" for c in range(clusters)],
        maps=maps.astype(dtype),
        queries=queries.astype(dtype),
        targets=targets.astype(dtype),
        cluster_of=cluster_of,
    )


def npz(arrays: Mapping[str, Array], *, compressed: bool = False) -> bytes:
    """Return the bytes numpy writes, pickled where an array holds objects."""
    out = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(out, **dict(arrays))
    return out.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    """Return a deflated .zip."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(files: Mapping[str, bytes], *, mode: str = "w:gz") -> bytes:
    """Return a .tar or .tar.gz."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()
