"""Write bivectors and targets as document 000's .npz files, block by block.

Memory is a block's, whatever the number of queries; above the teacher, whose fingerprint goes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from core.errors import SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Produced, Stage
from core.kinds._files import blocks, query_rows, read_json
from core.kinds._teacher import (
    CLUSTERS_PER_BLOCK,
    ROWS_PER_BLOCK,
    bivector_block,
    stored_bytes,
    teacher_bytes,
    teacher_fingerprint,
)
from core.specs.base import JobSpec, Reads, Reference
from core.specs.teachers import OfRotations, Rotational, parse_teacher
from core.tensors import caches, shards

if TYPE_CHECKING:
    from core.tensors.shards import Array

BIVECTORS_NAME = "model.bivectors.npz"
TARGETS_NAME = "rotational_targets_cache.npz"


class Spec(JobSpec):
    """What to export: a model's bivectors, targets, or both."""

    kind: Literal["export_cache"] = "export_cache"
    model: Annotated[Reference, Reads("federated_model")] | None = Field(
        None, description="Whose bivectors are written."
    )
    targets: Annotated[Reference, Reads("targets")] | None = Field(
        None, description="Of cache_targets or import_cache."
    )
    teacher: OfRotations | None = Field(
        None,
        description="``dtype`` and ``compat`` of the bivectors; null: as the targets' teacher, or "
        "the defaults where there are none.",
    )

    @model_validator(mode="after")
    def _something_to_export(self) -> Self:
        if self.model is None and self.targets is None:
            raise ValueError("model, targets: nothing to export; give one of them, or both")
        if self.teacher is not None and self.model is None:
            raise ValueError("teacher: says how bivectors are made; without 'model' there are none")
        return self


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Logarithms fanned over clusters, from the cache where they are; then the files."""
    needed, count = 0, 0
    if "model" in inputs:
        model = inputs["model"]
        needed = teacher_bytes(model.meta)
        count = len(blocks(model.meta["clusters"], CLUSTERS_PER_BLOCK))
        if "targets" in inputs and inputs["targets"].meta["model"] != model.sha256:
            raise SpecInvalid(
                f"targets: made with model {inputs['targets'].meta['model'][:12]}…, not with "
                f"{model.sha256[:12]}…; export them one by one",
                pointer="/targets",
            )
    return [
        Stage("bivectors", count, memory_bytes=needed),
        Stage("export", 1, memory_bytes=max(needed, _fingerprint_bytes(inputs))),
    ]


def _fingerprint_bytes(inputs: Mapping[str, Input]) -> int:
    """Return what the teacher of targets takes, whose fingerprint goes in: model, stored pairs."""
    if "targets" not in inputs:
        return 0
    made = inputs["targets"].meta
    # Targets of before clusters were told plan none for the model's rotations.
    model = teacher_bytes({"clusters": 0, **made})
    pairs = None if made["pairs"] is None else made
    return model + stored_bytes(parse_teacher(made["teacher"]), pairs)


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    return {"bivectors": _bivectors, "export": _export}[chunk.stage](spec, chunk)


def _bivector_spec(spec: Spec, chunk: Chunk) -> OfRotations:
    """Return whose logarithms: the spec's, the targets' teacher's, else the default's."""
    if spec.teacher is None and spec.targets is not None:
        told: OfRotations = parse_teacher(chunk.input("targets").meta["teacher"])
        return told
    return spec.teacher or Rotational()


def _bivectors(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.tensors.formats import load_federated

    model = load_federated(chunk.fetch(chunk.input("model").sha256))
    start, stop = blocks(len(model.rotations), CLUSTERS_PER_BLOCK)[chunk.index]
    chunk.progress(0, 1)
    made = bivector_block(chunk, model, _bivector_spec(spec, chunk), start, stop)
    return ChunkResult(checkpoints={"bivectors": made})


def _export(spec: Spec, chunk: Chunk) -> ChunkResult:
    outputs = {}
    if spec.model is not None:
        outputs["bivectors_npz"] = _export_bivectors(spec, chunk)
    if spec.targets is not None:
        outputs["targets_npz"] = _export_targets(chunk)
    return ChunkResult(outputs=outputs)


def _export_bivectors(spec: Spec, chunk: Chunk) -> Produced:
    import numpy as np

    model, told = chunk.input("model"), _bivector_spec(spec, chunk)
    clusters, dim = model.meta["clusters"], model.meta["dim"]
    made = [outputs["bivectors"].path for outputs in chunk.outputs("bivectors")]

    def read() -> Iterator[Array]:
        for done, path in enumerate(made):
            chunk.progress(done, len(made))
            yield shards.load(path, only=["bivectors"])[0]["bivectors"]

    ids = shards.load_manifest(chunk.fetch(model.sha256)).get("cluster_ids")
    names = np.array(ids if ids is not None else [str(number) for number in range(clusters)])
    values = caches.streamed(told.dtype, (clusters, dim, dim), read())
    compat = "legacy" if told.whole_logs() else None
    claims = caches.Claims(settings={"dtype": told.dtype, "compat": compat})
    path = chunk.workdir / BIVECTORS_NAME
    with path.open("wb") as file:
        caches.write_npz(file, caches.BIVECTORS, values, {"cluster_ids": names}, claims)
    meta = caches.describe(caches.BIVECTORS, values.shape, values.dtype)
    return Produced(path, "bivectors_npz", path.name, meta=meta)


def _export_targets(chunk: Chunk) -> Produced:
    listed = read_json(chunk.fetch(chunk.input("targets").sha256))
    told = parse_teacher(listed["teacher"])
    fingerprint = teacher_fingerprint(chunk, listed["model"], told, pairs=listed["pairs"])
    claims = caches.Claims(fingerprint, listed["teacher"])
    made = listed["blocks"]

    def read() -> Iterator[Array]:
        for done, block in enumerate(made):
            chunk.progress(done, len(made))
            yield shards.load(chunk.fetch(block["sha256"]))[0]["targets"]

    dtype, _ = shards.describe(chunk.fetch(made[0]["sha256"]), "targets")
    values = shards.Stream(dtype, (listed["rows"], listed["dim"]), read())
    path = chunk.workdir / TARGETS_NAME
    with path.open("wb") as file:
        beside = {"query_digests": _digests(chunk, listed)}
        caches.write_npz(file, caches.TARGETS, values, beside, claims)
    meta = caches.describe(caches.TARGETS, values.shape, dtype)
    return Produced(path, "targets_npz", path.name, meta=meta)


def _digests(chunk: Chunk, listed: Mapping[str, Any]) -> Array:
    """Return [n, 16] uint8: which query each target answers."""
    import numpy as np

    asked = listed["pairs"] or listed["model"]
    found = []
    for start, stop in blocks(listed["rows"], ROWS_PER_BLOCK):
        chunk.progress(start, listed["rows"])
        found.append(caches.digest_rows(query_rows(chunk, asked, start, stop)))
    return np.concatenate(found)


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Write bivectors and targets as document 000's .npz files.",
    example={"kind": "export_cache", "model": "0" * 64, "targets": "1" * 64},
    outputs={"bivectors_npz": "bivectors_npz", "targets_npz": "targets_npz"},
)
