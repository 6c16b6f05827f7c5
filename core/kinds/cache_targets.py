"""Compute a teacher's targets once, in blocks that any later job finds under their content.

Memory does not grow with the number of queries: a chunk reads and writes its own block alone. Above
the teacher (model and bivectors; of ``paired`` all its pairs) it stays below 1.5 GiB: four blocks
of BLOCK_ENTRIES and what the teacher says of itself. Measured, peak RSS, 256 dimensions, float32:
0.19 GiB for 100,000 queries, 0.22 GiB for 1,000,000 (20,000 of them equal to 20,000 equal training
queries).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from core.errors import SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Stage
from core.kinds._files import (
    BLOCK_ENTRIES,
    blocks,
    float_bytes,
    query_rows,
    vector_blocks,
    write_targets,
)
from core.kinds._teacher import (
    CLUSTERS_PER_BLOCK,
    ROWS_PER_BLOCK,
    bivector_block,
    load_teacher,
    stored_bytes,
    target_block,
    teacher_bytes,
    told_or_default,
)
from core.specs.base import JobSpec, Reads, Reference
from core.specs.sizes import Sizes
from core.specs.teachers import Teacher, Weighing

if TYPE_CHECKING:
    from core.tensors.shards import Array


class Spec(JobSpec):
    """Which teacher answers which queries."""

    kind: Literal["cache_targets"] = "cache_targets"
    model: Annotated[Reference, Reads("federated_model", "lda_model", "embeddings")] = Field(
        description="The teacher's."
    )
    pairs: Annotated[Reference, Reads("pairs")] | None = Field(
        None, description="Whose queries are answered; null: the model's own training queries."
    )
    teacher: Teacher | None = Field(
        None,
        description="null: 'rotational'; over an lda_model 'lda', over embeddings 'checkpoint'.",
    )
    rows_per_chunk: int = Field(
        ROWS_PER_BLOCK,
        ge=16,
        le=1_000_000,
        description="Queries per target block; fewer where it would pass 16 Mi numbers.",
    )


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Logarithms fanned over clusters, targets fanned over queries, then the list of blocks."""
    model = inputs["model"].meta
    asked = inputs["pairs"].meta if "pairs" in inputs else model
    if asked["dim"] != model["dim"]:
        raise SpecInvalid(
            f"pairs have {asked['dim']} dimensions, the model {model['dim']}", pointer="/pairs"
        )
    told = told_or_default(spec.teacher, inputs["model"])
    if told.reads == "embeddings" and "pairs" in inputs:
        raise SpecInvalid(
            "pairs: teacher 'checkpoint' answers its own stored inputs alone; leave it null",
            pointer="/pairs",
        )
    teacher = teacher_bytes(model)
    teacher += stored_bytes(told, asked if "pairs" in inputs else None)
    logs = len(blocks(model["clusters"], CLUSTERS_PER_BLOCK)) if told.needs_logs else 0
    wide = max(asked["dim"], Sizes.of(model).width)
    block = float_bytes(min(BLOCK_ENTRIES, asked["rows"] * wide))
    return [
        Stage("bivectors", logs, memory_bytes=teacher),
        Stage("targets", len(_blocks(spec, asked)), memory_bytes=teacher + 4 * block),
        Stage("list", 1),
    ]


def _teacher(spec: Spec, chunk: Chunk) -> Teacher:
    return told_or_default(spec.teacher, chunk.input("model"))


def _blocks(spec: Spec, asked: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Cut the queries, known by their ``rows`` and ``dim``, into target blocks."""
    return vector_blocks(asked["rows"], spec.rows_per_chunk, dim=asked["dim"])


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    steps = {"bivectors": _bivectors, "targets": _targets, "list": _list}
    return steps[chunk.stage](spec, chunk)


def _bivectors(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.tensors.formats import load_federated

    model = load_federated(chunk.fetch(chunk.input("model").sha256))
    start, stop = blocks(len(model.rotations), CLUSTERS_PER_BLOCK)[chunk.index]
    told = _teacher(spec, chunk)
    assert isinstance(told, Weighing), "no other teacher has a chunk here"
    chunk.progress(0, 1)
    return ChunkResult(checkpoints={"bivectors": bivector_block(chunk, model, told, start, stop)})


def _targets(spec: Spec, chunk: Chunk) -> ChunkResult:
    pairs = None if spec.pairs is None else chunk.input("pairs").sha256
    teacher = load_teacher(chunk, chunk.input("model").sha256, _teacher(spec, chunk), pairs=pairs)
    asked = chunk.input("model" if spec.pairs is None else "pairs").meta
    start, stop = _blocks(spec, asked)[chunk.index]
    queries = _queries(spec, chunk, teacher.queries, start, stop)
    made, speed = target_block(chunk, teacher, queries)
    return ChunkResult(checkpoints={"targets": made}, metrics=speed)


def _queries(spec: Spec, chunk: Chunk, own: Array, start: int, stop: int) -> Array:
    """Return the queries of one block; of a file of pairs these rows alone are read."""
    if spec.pairs is None:
        return own[start:stop]
    return query_rows(chunk, chunk.input("pairs").sha256, start, stop)


def _list(spec: Spec, chunk: Chunk) -> ChunkResult:
    made = write_targets(
        chunk,
        chunk.outputs("targets"),
        teacher=_teacher(spec, chunk).model_dump(mode="json"),
        pairs=spec.pairs and chunk.input("pairs").sha256,
    )
    return ChunkResult(outputs={"targets": made})


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Compute a teacher's targets once and share them.",
    example={"kind": "cache_targets", "model": "0" * 64},
    outputs={"targets": "targets"},
)
