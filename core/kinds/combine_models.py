"""Put several federated models side by side, every cluster kept: what ``multi_source`` asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.errors import SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Metric, Produced, Stage
from core.kinds._files import float_bytes
from core.specs.base import JobSpec, Reads, Reference


class Spec(JobSpec):
    """Which models."""

    kind: Literal["combine_models"] = "combine_models"
    models: tuple[Annotated[Reference, Reads("federated_model")], ...] = Field(
        min_length=2, max_length=64, description="All of one width; their order counts."
    )

    @model_validator(mode="after")
    def _each_once(self) -> Spec:
        if len(set(self.models)) < len(self.models):
            raise ValueError("models: the same one twice; name each once")
        return self


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """One chunk that holds all models and the result."""
    first = inputs["models.0"].meta["dim"]
    needed = 0
    for index in range(len(spec.models)):
        meta = inputs[f"models.{index}"].meta
        if meta["dim"] != first:
            raise SpecInvalid(
                f"models: the first has {first} dimensions, number {index + 1} has {meta['dim']}",
                pointer=f"/models/{index}",
            )
        clusters, dim, rows = meta["clusters"], meta["dim"], meta["rows"]
        needed += 2 * (float_bytes(clusters, dim, dim) + 2 * float_bytes(rows, dim))
    return [Stage("combine", 1, memory_bytes=needed)]


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Load, join, save."""
    from core.distill.combining import combine
    from core.tensors.formats import load_federated, save_federated

    models = {}
    for index in range(len(spec.models)):
        chunk.progress(index, len(spec.models) + 1)
        sha256 = chunk.input(f"models.{index}").sha256
        models[sha256] = load_federated(chunk.fetch(sha256))
    if len(models) < len(spec.models):
        raise SpecInvalid("models: two of them have the same content; name each once")
    model = combine(models)
    path = chunk.workdir / "model.safetensors"
    save_federated(path, model)
    made = Produced(path, "federated_model", path.name, meta=model.meta())
    clusters = Metric("clusters", 0, float(len(model.rotations)))
    return ChunkResult(outputs={"model": made}, metrics=[clusters])


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Put several federated models side by side, every cluster kept.",
    example={"kind": "combine_models", "models": ["0" * 64, "1" * 64]},
    outputs={"model": "federated_model"},
)
