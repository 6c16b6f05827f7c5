"""Compute a teacher's targets once, in blocks that any later job finds under their content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from core.errors import SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Stage
from core.kinds._files import blocks, write_json
from core.kinds._teacher import (
    CLUSTERS_PER_BLOCK,
    ROWS_PER_BLOCK,
    bivector_block,
    load_teacher,
    target_block,
)
from core.specs.base import JobSpec, Reads, Reference
from core.specs.teachers import Rotational, Teacher

if TYPE_CHECKING:
    from core.tensors.shards import Array


class Spec(JobSpec):
    """Which teacher answers which queries."""

    kind: Literal["cache_targets"] = "cache_targets"
    model: Annotated[Reference, Reads("federated_model")] = Field(description="The teacher's.")
    pairs: Annotated[Reference, Reads("pairs")] | None = Field(
        None, description="Whose queries are answered; null: the model's own training queries."
    )
    teacher: Teacher = Rotational()
    rows_per_chunk: int = Field(
        ROWS_PER_BLOCK, ge=16, le=1_000_000, description="Queries per target block."
    )


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Logarithms fanned over clusters, targets fanned over queries, then the list of blocks."""
    model = inputs["model"].meta
    asked = inputs["pairs"].meta if "pairs" in inputs else model
    if asked["dim"] != model["dim"]:
        raise SpecInvalid(
            f"pairs have {asked['dim']} dimensions, the model {model['dim']}", pointer="/pairs"
        )
    return [
        Stage("bivectors", len(blocks(model["clusters"], CLUSTERS_PER_BLOCK))),
        Stage("targets", len(blocks(asked["rows"], spec.rows_per_chunk))),
        Stage("list", 1),
    ]


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    steps = {"bivectors": _bivectors, "targets": _targets, "list": _list}
    return steps[chunk.stage](spec, chunk)


def _bivectors(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.tensors.formats import load_federated

    model = load_federated(chunk.fetch(chunk.input("model").sha256))
    start, stop = blocks(len(model.rotations), CLUSTERS_PER_BLOCK)[chunk.index]
    chunk.progress(0, 1)
    return ChunkResult(
        checkpoints={"bivectors": bivector_block(chunk, model, spec.teacher, start, stop)}
    )


def _targets(spec: Spec, chunk: Chunk) -> ChunkResult:
    teacher = load_teacher(chunk, chunk.input("model").sha256, spec.teacher)
    queries = _queries(spec, chunk, teacher.model.queries)
    start, stop = blocks(len(queries), spec.rows_per_chunk)[chunk.index]
    made, speed = target_block(chunk, teacher, queries[start:stop])
    return ChunkResult(checkpoints={"targets": made}, metrics=speed)


def _queries(spec: Spec, chunk: Chunk, own: Array) -> Array:
    from core.tensors.formats import load_pairs

    if spec.pairs is None:
        return own
    return load_pairs(chunk.fetch(chunk.input("pairs").sha256)).queries.astype("float32")


def _list(spec: Spec, chunk: Chunk) -> ChunkResult:
    import hashlib

    listed: list[dict[str, Any]] = []
    for made in chunk.outputs("targets"):
        file = made["targets"]
        with file.path.open("rb") as data:
            sha256 = hashlib.file_digest(data, "sha256").hexdigest()
        listed.append({"sha256": sha256, "rows": file.meta["rows"]})
    model = chunk.input("model")
    facts = {
        "rows": sum(block["rows"] for block in listed),
        "dim": model.meta["dim"],
        "model": model.sha256,
        "pairs": spec.pairs and chunk.input("pairs").sha256,
        "teacher": spec.teacher.model_dump(mode="json"),
    }
    whole = {"format": "targets", "version": 1, **facts, "blocks": listed}
    path = chunk.workdir / "targets.json"
    return ChunkResult(outputs={"targets": write_json(path, whole, format_name="targets", **facts)})


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Compute a teacher's targets once and share them.",
    example={"kind": "cache_targets", "model": "0" * 64},
    outputs={"targets": "targets"},
)
