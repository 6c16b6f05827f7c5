"""Make a teacher of stored embeddings: which rows are trained on, and which are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from core.errors import DataInvalid, SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Metric, Produced, Stage
from core.kinds._files import float_bytes
from core.specs.base import JobSpec, Reads, Reference
from core.specs.fitting import Split, TestFraction

if TYPE_CHECKING:
    from core.tensors.embeddings import Embeddings
    from core.tensors.shards import Array


class Spec(JobSpec):
    """Which rows, what a student is given of them, and how they are split."""

    kind: Literal["hold_out"] = "hold_out"
    pairs: Annotated[Reference, Reads("pairs")] | None = Field(
        None, description="Their targets become the embeddings, their ids the texts."
    )
    embeddings: Annotated[Reference, Reads("embeddings")] | None = Field(
        None, description="Stored embeddings; a split that they already have is replaced."
    )
    inputs: Literal["queries", "targets"] | None = Field(
        None,
        description="What a student is given of pairs: their queries (null: the same), or the "
        "targets themselves. Stored embeddings say it themselves: leave it null.",
    )
    test_fraction: TestFraction = Field(
        0.2, description="Of the different inputs, held out; by cluster about."
    )
    split: Split = Field(
        "query",
        description="What is held out together: single inputs, or whole groups of them. Equal "
        "inputs stay on one side.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Spec:
        if (self.pairs is None) == (self.embeddings is None):
            raise ValueError("needed pairs or embeddings, one of the two")
        if self.embeddings is not None and self.inputs is not None:
            raise ValueError(
                f"inputs '{self.inputs}' is a choice of pairs; stored embeddings have their own: "
                "leave it null"
            )
        return self


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """One chunk that holds all rows."""
    name, source = _source(inputs)
    meta = source.meta
    if spec.split == "cluster" and meta["groups"] < 2:
        raise SpecInvalid(
            f"split 'cluster' needs at least 2 groups, and these {name} have {meta['groups']}; "
            "allowed for them: query",
            pointer="/split",
        )
    rows = meta.get("all_rows", meta["rows"])
    if rows < 2:
        raise SpecInvalid(f"{name}: {rows} row; a split needs at least 2", pointer=f"/{name}")
    width = meta["dim"] + meta.get("target_dim", meta["dim"])
    return [Stage("split", 1, memory_bytes=3 * float_bytes(rows, width))]


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Load, split, save."""
    from dataclasses import replace

    from core.tensors.embeddings import save_embeddings

    found = _load(spec, chunk)
    chunk.progress(1, 3)
    train_rows, held_out_rows = _split(spec, found)
    chunk.progress(2, 3)
    facts = {"split": spec.split, "seed": spec.seed, "test_fraction": spec.test_fraction}
    made = replace(
        found,
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        manifest={**found.manifest, **facts},
    )
    path = chunk.workdir / "embeddings.safetensors"
    save_embeddings(path, made)
    chunk.progress(3, 3)
    counts = [
        Metric("train_rows", 0, float(len(train_rows))),
        Metric("held_out_rows", 0, float(len(held_out_rows))),
    ]
    model = Produced(path, "embeddings", path.name, meta=made.meta())
    return ChunkResult(outputs={"model": model}, metrics=counts)


def _source(inputs: Mapping[str, Input]) -> tuple[str, Input]:
    [(name, source)] = inputs.items()
    return name, source


def _load(spec: Spec, chunk: Chunk) -> Embeddings:
    """Return all rows with what they were made of."""
    from core.tensors.embeddings import load_embeddings, whole
    from core.tensors.formats import load_pairs

    if spec.pairs is None:
        sha256 = chunk.input("embeddings").sha256
        found = load_embeddings(chunk.fetch(sha256))
        return whole(
            found.embeddings,
            ids=found.ids,
            inputs=found.inputs,
            groups=found.groups,
            texts=found.texts,
            manifest={"stored": sha256, "given": "stored", "pairs": found.manifest.get("pairs")},
        )
    sha256, given = chunk.input("pairs").sha256, spec.inputs or "queries"
    pairs = load_pairs(chunk.fetch(sha256))
    return whole(
        pairs.targets,
        ids=pairs.ids,
        inputs=pairs.queries if given == "queries" else None,
        groups=pairs.groups,
        texts=pairs.ids,
        manifest={"pairs": sha256, "given": given},
    )


def _split(spec: Spec, found: Embeddings) -> tuple[Array, Array]:
    import numpy as np

    from core.distill.splits import split_clusters, split_rows

    chosen: dict[str, Any] = {"seed": spec.seed, "test_fraction": spec.test_fraction}
    try:
        if spec.split == "query":
            return split_rows(found.given, **chosen)
        _, group_of = np.unique(np.asarray(found.groups), return_inverse=True)
        return split_clusters(found.given, group_of.reshape(-1), **chosen)
    except DataInvalid as error:
        raise DataInvalid(
            f"inputs: too few different ones for a split by {spec.split}; needed 2, by cluster 2 "
            "groups that have one of their own"
        ) from error


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Make a teacher of stored embeddings: training rows and rows held out.",
    example={"kind": "hold_out", "pairs": "0" * 64, "test_fraction": 0.2},
    outputs={"model": "embeddings"},
)
