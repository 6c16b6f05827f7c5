"""Take in bivectors and targets that were computed elsewhere, after checking them.

Nothing here believes a file, and the cache that all projects share takes nothing from one:

* Bivectors are checked cluster by cluster: exp(L_c) must be the rotation. Even so the shared blocks
  are the logarithms this service computes (0.15 s a cluster of width 768), for a checked file's
  bytes still matter: near the angle pi several logarithms pass and blend differently, an error as
  small as rounding may be put into the one plane where it counts, and whatever is stored first is
  what other projects' bytes come from. After the job the model's bivectors are in the cache.
* Of targets ``verify`` rows of each block are recomputed. The blocks belong to the job that brought
  them: it has no cache key, so no other job finds them. Where ``verify`` reaches the rows
  of a block, all were recomputed, and the block is the shared one that cache_targets would make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from core.errors import DataInvalid, SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Metric, Produced, Stage
from core.kinds._files import (
    BLOCK_ENTRIES,
    blocks,
    float_bytes,
    query_rows,
    read_json,
    vector_blocks,
    write_json,
    write_targets,
)
from core.kinds._teacher import (
    CLUSTERS_PER_BLOCK,
    ROWS_PER_BLOCK,
    bivector_block,
    load_rotations,
    target_block,
    teacher_bytes,
)
from core.specs.base import JobSpec, Reads, Reference
from core.specs.teachers import OfRotations, Rotational
from core.tensors import caches, shards

if TYPE_CHECKING:
    from core.distill.teachers._base import RotationTeacher
    from core.tensors.formats import Federated
    from core.tensors.shards import Array


class Spec(JobSpec):
    """Which files, and the teacher they are said to be of."""

    kind: Literal["import_cache"] = "import_cache"
    model: Annotated[Reference, Reads("federated_model")] = Field(description="The teacher's.")
    bivectors: Annotated[Reference, Reads("bivectors_cache", "bivectors_npz")] | None = Field(
        None, description="An uploaded .bivectors.npz; every cluster is checked."
    )
    targets: Annotated[Reference, Reads("targets_cache", "targets_npz")] | None = Field(
        None, description="An uploaded .npz of targets; see ``verify``."
    )
    pairs: Annotated[Reference, Reads("pairs")] | None = Field(
        None, description="Whose queries the targets answer; null: the model's own."
    )
    teacher: OfRotations = Rotational()
    verify: int = Field(
        64,
        ge=1,
        le=1_000_000,
        description="Rows of each block of targets that are recomputed, drawn at random.",
    )
    rows_per_chunk: int = Field(
        ROWS_PER_BLOCK,
        ge=16,
        le=1_000_000,
        description="Queries per target block; fewer where it would pass 16 Mi numbers.",
    )

    @model_validator(mode="after")
    def _something_to_import(self) -> Self:
        if self.bivectors is None and self.targets is None:
            raise ValueError("bivectors, targets: nothing to import; give one of them, or both")
        if self.pairs is not None and self.targets is None:
            raise ValueError("pairs: say whose queries targets answer; there are no targets")
        return self


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Logarithms fanned over clusters, targets over queries, then the list of blocks."""
    model = inputs["model"].meta
    asked = inputs["pairs" if "pairs" in inputs else "model"].meta
    expected = {"bivectors": ("clusters", model), "targets": ("rows", asked)}
    for name, (counted, facts) in expected.items():
        if name in inputs:
            _check_fits(name, counted, inputs[name].meta, facts, spec)
    spec.teacher.check_width(model["dim"])
    teacher = teacher_bytes(model)
    wide = float_bytes(CLUSTERS_PER_BLOCK, model["dim"], model["dim"])
    block = float_bytes(min(BLOCK_ENTRIES, asked["rows"] * asked["dim"]))
    rows = len(_blocks(spec, asked)) if "targets" in inputs else 0
    wanted = spec.teacher.needs_logs or "bivectors" in inputs
    bivectors = len(blocks(model["clusters"], CLUSTERS_PER_BLOCK)) if wanted else 0
    return [
        Stage("bivectors", bivectors, memory_bytes=teacher + 6 * wide),
        Stage("targets", rows, memory_bytes=teacher + 6 * block),
        Stage("list", 1),
    ]


def _check_fits(
    name: str, counted: str, found: Mapping[str, Any], needed: Mapping[str, Any], spec: Spec
) -> None:
    whose = "the model has (one per training query)" if spec.pairs is None else "the pairs have"
    for fact in (counted, "dim"):
        if found[fact] != needed[fact]:
            raise SpecInvalid(
                f"{name}: {found[fact]} {fact}; needed {needed[fact]}, as {whose}",
                pointer=f"/{name}",
            )
    if spec.teacher.dtype == "float64" and found["dtype"] != "float64":
        raise SpecInvalid(
            f"{name}: {found['dtype']} for a teacher of float64; allowed: float64, or "
            "teacher.dtype 'float32'",
            pointer=f"/{name}",
        )


def _blocks(spec: Spec, asked: Mapping[str, Any]) -> list[tuple[int, int]]:
    return vector_blocks(asked["rows"], spec.rows_per_chunk, dim=asked["dim"])


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    steps = {"bivectors": _bivectors, "targets": _targets, "list": _list}
    return steps[chunk.stage](spec, chunk)


def _bivectors(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Check a block of clusters, and see to it that the cache holds the service's own."""
    from core.tensors.formats import load_federated

    model = load_federated(chunk.fetch(chunk.input("model").sha256))
    start, stop = blocks(len(model.rotations), CLUSTERS_PER_BLOCK)[chunk.index]
    chunk.progress(0, 1)
    metrics = [] if spec.bivectors is None else _check_block(spec, chunk, model, start, stop)
    made = bivector_block(chunk, model, spec.teacher, start, stop)
    return ChunkResult(checkpoints={"bivectors": made}, metrics=metrics)


def _check_block(spec: Spec, chunk: Chunk, model: Federated, start: int, stop: int) -> list[Metric]:
    from core.distill.checking import check_bivectors

    path = chunk.fetch(chunk.input("bivectors").sha256)
    places = _places(path, model)
    found = []
    for cluster in range(start, stop):
        chunk.progress(cluster - start, 2 * (stop - start))
        place = places[cluster]
        given = caches.read_rows(path, caches.BIVECTORS, place, place + 1)
        residual = float(check_bivectors(model, spec.teacher, given, first=cluster)[0])
        found.append(Metric("bivector_residual", cluster, residual))
    return found


def _places(path: Path, model: Federated) -> list[int]:
    """Return where in the file each of the model's clusters stands."""
    ids, wanted = caches.read_cluster_ids(path), model.manifest.get("cluster_ids")
    if ids is None or wanted is None:
        return list(range(len(model.rotations)))
    if set(ids) != set(wanted):
        odd = min(set(ids) ^ set(wanted))
        raise DataInvalid(
            f"cluster_ids: {odd[:60]!r} stands in {'the file' if odd in ids else 'the model'} "
            "alone; the bivectors are of another model"
        )
    place = {name: row for row, name in enumerate(ids)}
    return [place[name] for name in wanted]


def _targets(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Check a block of targets and keep it: as the job's own, or all recomputed."""
    from core.distill import checking

    asked = chunk.input("model" if spec.pairs is None else "pairs")
    pairs = None if spec.pairs is None else asked.sha256
    teacher = load_rotations(chunk, chunk.input("model").sha256, spec.teacher, pairs=pairs)
    start, stop = _blocks(spec, asked.meta)[chunk.index]
    queries = query_rows(chunk, asked.sha256, start, stop)
    given = _given(chunk, teacher, queries, start, stop)
    allowed = checking.allowed_difference(
        tolerance=spec.teacher.exactness(),
        temperature=teacher.temperature,
        reach=checking.longest(queries) * checking.longest(teacher.model.queries),
        dtype=spec.teacher.dtype,
    )
    vague = allowed > checking.MOST_ALLOWED
    count = len(given) if vague else spec.verify
    rows = checking.sample_rows(given, count, seed=spec.seed)
    metrics: list[Metric] = []
    if len(rows) == len(given):
        made, metrics = target_block(chunk, teacher, queries)
        computed = shards.load(made.path)[0]["targets"]
    else:
        made = _own_block(chunk, given.astype(spec.teacher.dtype, copy=False))
        computed = _recomputed(teacher, queries[rows])
    allowed = min(allowed, checking.MOST_ALLOWED)
    worst = checking.check_targets(given[rows], computed, start + rows, allowed=allowed)
    metrics = [*metrics, Metric("target_difference", chunk.index, worst)]
    counted = {"rows_recomputed": len(rows)}
    looked = write_json(chunk.workdir / "looked_at.json", counted, format_name="looked_at")
    return ChunkResult(checkpoints={"targets": made, "looked_at": looked}, metrics=metrics)


def _given(chunk: Chunk, teacher: RotationTeacher, queries: Array, start: int, stop: int) -> Array:
    """Return the file's block, after holding against it what the file says of itself."""
    from core.distill.checking import check_digests

    path = chunk.fetch(chunk.input("targets").sha256)
    told = caches.read_claims(path).fingerprint
    if told is not None and told != teacher.fingerprint():
        raise DataInvalid(
            f"fingerprint: the file says it is of teacher {told[:12]}…, this one is "
            f"{teacher.fingerprint()[:12]}…; compare model and teacher with those it was made with"
        )
    digests = caches.read_digests(path, start, stop)
    if digests is not None:
        check_digests(digests, caches.digest_rows(queries), first=start)
    return caches.read_rows(path, caches.TARGETS, start, stop)


def _own_block(chunk: Chunk, targets: Array) -> Produced:
    path = chunk.workdir / "targets.safetensors"
    shards.save(path, {"targets": targets}, {"format": "target_block"})
    return Produced(path, "target_block", path.name, meta={"rows": len(targets)})


def _recomputed(teacher: RotationTeacher, queries: Array) -> Array:
    """Return the teacher's answers; one that is a training query does not route through itself."""
    import torch

    found: list[Array] = []
    for first, last in blocks(len(queries), ROWS_PER_BLOCK):
        some = queries[first:last]
        own = torch.from_numpy(teacher.own_rows(some))
        found.append(teacher.targets(some, exclude_rows=own).cpu().numpy())
    import numpy as np

    return np.concatenate(found)


def _list(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Write what was checked and, as cache_targets does, the list of target blocks."""
    model = chunk.input("model")
    teacher = spec.teacher.model_dump(mode="json")
    files = {
        name: chunk.input(name).sha256
        for name in ("bivectors", "targets", "pairs")
        if getattr(spec, name) is not None
    }
    checked: dict[str, Any] = {"model": model.sha256, "teacher": teacher, "files": files}
    if spec.bivectors is not None:
        checked["clusters_checked"] = model.meta["clusters"]
    outputs = {}
    if spec.targets is not None:
        made = chunk.outputs("targets")
        checked["rows"] = sum(block["targets"].meta["rows"] for block in made)
        looked = [read_json(block["looked_at"].path) for block in made]
        recomputed = sum(each["rows_recomputed"] for each in looked)
        checked["rows_recomputed"] = recomputed
        told = {**files, "rows_recomputed": recomputed}
        outputs["targets"] = write_targets(
            chunk, made, teacher=teacher, pairs=files.get("pairs"), imported=told
        )
    path = chunk.workdir / "checked.json"
    outputs["checked"] = write_json(path, checked, format_name="checked_cache")
    return ChunkResult(outputs=outputs)


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Check bivectors and targets computed elsewhere, and take the targets in.",
    example={"kind": "import_cache", "model": "0" * 64, "targets": "1" * 64},
    outputs={"targets": "targets", "checked": "checked_cache"},
)
