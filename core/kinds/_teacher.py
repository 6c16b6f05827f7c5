"""A teacher and its targets, both from the cache where they can be; shared by several kinds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from core.kinds._base import Chunk, Input, Metric, Produced
from core.kinds._files import blocks, float_bytes
from core.specs.sizes import Sizes
from core.specs.teachers import Weighing, check_reads, default_teacher

if TYPE_CHECKING:
    from core.distill.teachers._base import RotationTeacher, TeacherModel
    from core.specs.teachers import OfRotations, Teacher
    from core.tensors.formats import Federated
    from core.tensors.shards import Array

CLUSTERS_PER_BLOCK = 16
"""Bivector blocks are cut alike everywhere, so that any job finds what another computed."""
ROWS_PER_BLOCK = 8192
"""So are target blocks, unless a job says otherwise."""
ROWS_PER_STEP = 1024
"""Targets computed between two reports of progress."""


def teacher_bytes(model: Mapping[str, Any]) -> int:
    """Return the memory of a teacher over a model: maps, bivectors, training queries, work."""
    sizes = Sizes.of(model)
    maps = 2 if model.get("mode", "maps") == "maps" else 0  # an LDA of answers has none
    rows = model.get("all_rows", sizes.rows)
    return (
        maps * float_bytes(sizes.clusters, sizes.dim, sizes.width)
        + float_bytes(rows, sizes.dim)
        + float_bytes(rows, sizes.width)
        + 2 * float_bytes(sizes.clusters, sizes.dim + sizes.width)
    )


def told_or_default(told: Teacher | None, model: Input) -> Teacher:
    """Return the teacher that is meant over a model.

    Raises:
        SpecInvalid: it does not answer over models of that format, or of that width.
    """
    teacher: Teacher = told or default_teacher(model.format)
    check_reads(teacher, model.format)
    teacher.check_width(model.meta["dim"])
    return teacher


def stored_bytes(spec: Teacher, pairs: Mapping[str, Any] | None) -> int:
    """Return what a teacher that looks its answers up takes for pairs: they, sums and means."""
    if spec.answers_new or pairs is None:
        return 0
    return 6 * float_bytes(pairs["rows"], pairs["dim"])


_kept: dict[tuple[str, str, str, str | None], TeacherModel] = {}
"""The last teacher this process built: chunks of a job come one after another. Keyed by content."""


def bivector_block(
    chunk: Chunk, model: Federated, spec: Weighing, start: int, stop: int
) -> Produced:
    """Return the file with the logarithms (and their norms) of clusters start..stop-1.

    From the cache or new.
    """
    from core.distill.teachers._logs import bivector_block as compute
    from core.distill.teachers._logs import bivector_key
    from core.tensors import shards

    key = bivector_key(model, spec, start, stop)
    found = chunk.cached(key)
    if found is not None:
        return found
    path = chunk.workdir / f"bivectors-{start}-{stop}.safetensors"
    # Nothing of where the clusters stand: equal rotations of another model find this very file.
    manifest = {"format": "bivectors", "version": 1}
    made = compute(model, spec, start, stop)
    tensors = {"bivectors": made.values.numpy(), "norms": made.norms.numpy()}
    shards.save(path, tensors, manifest)
    meta = {"clusters": stop - start, "dim": model.rotations.shape[1]}
    return Produced(path, "bivectors", path.name, meta=meta, cache_key=key)


def load_teacher(
    chunk: Chunk, sha256: str, spec: Teacher, *, pairs: str | None = None
) -> TeacherModel:
    """Build the teacher a spec names over a stored model, its bivectors from the cache.

    ``pairs``: SHA-256 of those whose queries it is asked; told to who answers stored pairs alone.
    """
    name = (sha256, spec.model_dump_json(), chunk.device, pairs if not spec.answers_new else None)
    if name not in _kept:
        _kept.clear()
        teacher = _build(chunk, chunk.fetch(sha256), spec)
        if name[3] is not None:
            from core.tensors.formats import load_pairs

            teacher = teacher.knowing(load_pairs(chunk.fetch(name[3])))
        _kept[name] = teacher
    return _kept[name]


def load_rotations(
    chunk: Chunk, sha256: str, spec: OfRotations, *, pairs: str | None = None
) -> RotationTeacher:
    """Build a teacher over a federated model; see ``load_teacher``."""
    return cast("RotationTeacher", load_teacher(chunk, sha256, spec, pairs=pairs))


def teacher_fingerprint(chunk: Chunk, sha256: str, spec: Teacher, *, pairs: str | None) -> str:
    """Return what identifies the teacher over a stored model; no logarithm is computed for it."""
    from core.distill.teachers._base import teachers
    from core.tensors.formats import load_pairs
    from core.tensors.models import load_model

    teacher = teachers()[spec.name].build(load_model(chunk.fetch(sha256)), spec, "cpu", None)
    if pairs is not None and not spec.answers_new:
        teacher = teacher.knowing(load_pairs(chunk.fetch(pairs)))
    return teacher.fingerprint()


def _build(chunk: Chunk, model_path: Path, spec: Teacher) -> TeacherModel:
    import torch

    from core.distill.teachers._base import Bivectors, teachers
    from core.tensors import shards
    from core.tensors.formats import load_federated
    from core.tensors.models import load_model

    build = teachers()[spec.name].build
    if not spec.needs_logs or not isinstance(spec, Weighing):
        return build(load_model(model_path), spec, chunk.device, None)
    model = load_federated(model_path)
    clusters, d, _ = model.rotations.shape
    values = torch.empty(clusters, d, d, dtype=getattr(torch, spec.dtype))
    norms = torch.empty(clusters, dtype=torch.float64)
    for start, stop in blocks(clusters, CLUSTERS_PER_BLOCK):
        chunk.progress(start, clusters)
        tensors, _ = shards.load(bivector_block(chunk, model, spec, start, stop).path)
        values[start:stop] = torch.from_numpy(tensors["bivectors"])
        norms[start:stop] = torch.from_numpy(tensors["norms"])
    return build(model, spec, chunk.device, Bivectors(values, norms))


def target_block(
    chunk: Chunk, teacher: TeacherModel, queries: Array
) -> tuple[Produced, list[Metric]]:
    """Return the file with the targets of some queries, from the cache or new, and its speed.

    Scratch memory: three times the targets, beside the teacher's own for ROWS_PER_STEP queries.

    Args:
        chunk: for the cache, the folder and the progress.
        teacher: who answers.
        queries: [B, d] float32; one that is a training query does not route through itself.
    """
    import torch

    from core.distill.teachers._keys import target_key
    from core.tensors import shards

    excluded = teacher.own_rows(queries)
    key = target_key(teacher.fingerprint(), queries, excluded, device=chunk.device)
    found = chunk.cached(key)
    if found is not None:
        return found, []
    began = time.perf_counter()
    parts = []
    for first, last in blocks(len(queries), ROWS_PER_STEP):
        chunk.progress(first, len(queries))
        rows = torch.from_numpy(excluded[first:last])
        parts.append(teacher.targets(queries[first:last], exclude_rows=rows).cpu())
    seconds = time.perf_counter() - began
    path = chunk.workdir / "targets.safetensors"
    shards.save(path, {"targets": torch.cat(parts).numpy()}, {"format": "target_block"})
    made = Produced(path, "target_block", path.name, meta={"rows": len(queries)}, cache_key=key)
    return made, [Metric("targets_per_second", chunk.index, len(queries) / seconds)]
