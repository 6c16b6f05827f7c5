"""The logarithms of a model's rotations in one process and one file, in document 000's layout.

No service is needed: this is what a training script calls. What a file holds is checked against
the model's rotations before it is used, so that its name and length say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from core.distill.checking import check_bivectors
from core.distill.teachers._base import Bivectors
from core.distill.teachers._logs import NARROWED, bivector_block
from core.errors import DataInvalid
from core.rotations.action import spectral_norms
from core.specs.teachers import Weighing
from core.tensors import caches
from core.tensors.formats import Federated
from core.tensors.npz import open_npz
from core.tensors.shards import Array, Stream

CLUSTERS_AT_ONCE = 4
"""Between two reports, and in memory beside the result."""


def cached_bivectors(
    model: Federated,
    spec: Weighing,
    *,
    path: Path | None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Bivectors:
    """Return all logarithms, from the file where it has them; else they are computed and written.

    Args:
        model: whose.
        spec: of the teacher: its dtype, and whether log W or log(G^T W) is blended.
        path: the .npz; none: nothing is read or written.
        report: called with the clusters done and C.

    Raises:
        DataInvalid: the file is damaged or of another model; it is left as it is.
    """
    if path is not None and path.exists():
        try:
            return _load(model, spec, path, report)
        except DataInvalid as error:
            told = f"{path}: {error.message}; name another --bivector-cache or remove the file"
            raise DataInvalid(told) from error
    clusters = len(model.rotations)
    parts = []
    for first in range(0, clusters, CLUSTERS_AT_ONCE):
        report(first, clusters)
        parts.append(bivector_block(model, spec, first, min(first + CLUSTERS_AT_ONCE, clusters)))
    found = Bivectors(
        torch.cat([part.values for part in parts]), torch.cat([part.norms for part in parts])
    )
    if path is not None:
        _save(path, model, found)
    report(clusters, clusters)
    return found


def _load(
    model: Federated, spec: Weighing, path: Path, report: Callable[[int, int], None]
) -> Bivectors:
    """Read and check a file, a few clusters at a time."""
    dtype = np.dtype(spec.dtype)
    values = np.empty(model.rotations.shape, dtype)
    done = 0
    with open_npz(path) as file:
        name = next((name for name in caches.BIVECTOR_NAMES if name in file.names), None)
        if name is None:
            raise DataInvalid(f"holds {', '.join(file.names) or 'nothing'}; needed bivectors")
        header = file.header(name)
        caches.check_array(caches.BIVECTORS, header.dtype, header.shape)
        if header.shape != values.shape:
            raise DataInvalid(
                f"bivectors: shape {list(header.shape)}; the model needs {list(values.shape)}"
            )
        size = CLUSTERS_AT_ONCE * values[0].size * header.dtype.itemsize
        for block in file.blocks(name, block_bytes=size):
            report(done, len(values))
            skew = caches.check_bivectors(block, first=done).astype(dtype)
            check_bivectors(model, spec, skew, first=done)
            values[done : done + len(skew)] = skew
            done += len(skew)
    report(done, len(values))
    found = torch.from_numpy(values)
    return Bivectors(found, spectral_norms(found) * (1 + NARROWED))


def _save(path: Path, model: Federated, found: Bivectors) -> None:
    """Write the file beside its place, sync, rename."""
    values: Array = found.values.numpy()
    ids = model.manifest.get("cluster_ids") or [str(n) for n in range(len(values))]
    path.parent.mkdir(parents=True, exist_ok=True)
    caches.replace_file(
        path,
        lambda file: caches.write_npz(
            file,
            caches.BIVECTORS,
            Stream(values.dtype, values.shape, caches.cut(values, CLUSTERS_AT_ONCE)),
            {"cluster_ids": np.array(ids)},
            caches.Claims(),
        ),
    )
