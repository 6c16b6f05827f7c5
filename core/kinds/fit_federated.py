"""Fit a federated model to pairs: cluster them, then one anchored rotation per cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from core.kinds._base import Chunk, ChunkResult, Input, Kind, Metric, Produced, Stage
from core.kinds._files import blocks, float_bytes, read_json, write_json
from core.specs.clusterings import Clustering, KMeans, most_clusters
from core.specs.fitting import FittingSpec

if TYPE_CHECKING:
    from core.distill.fitting import Prepared

STRENGTHS_TRIED = 6
CLUSTERS_PER_CHUNK = 16


class Spec(FittingSpec):
    """Which pairs, how to cluster them, and what the rotations are anchored to."""

    kind: Literal["fit_federated"] = "fit_federated"
    clustering: Clustering = KMeans()
    anchor: Literal["global", "identity", "none"] = Field(
        "global", description="What a cluster's rotation stays near where its pairs say nothing."
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="Of the anchor, in pairs that agree with it; null: chosen on rows held out "
        "inside the training rows.",
    )
    temperature: float | None = Field(
        None, gt=0, le=100, description="Of the routing softmax; null: chosen like the strength."
    )
    top_k: int = Field(
        10,
        ge=1,
        le=1024,
        description="Neighbours a query routes through while choosing, kept in the model: a "
        "teacher that is told no top_k takes the same.",
    )
    compat: Literal["legacy"] | None = Field(
        None,
        description="'legacy' fits as document 000: centred, with no anchor whatever 'anchor' "
        "says; 'identity' is refused beside it.",
    )

    @model_validator(mode="after")
    def _anchor_has_strength(self) -> Spec:
        alone = self.anchor == "none" or self.compat == "legacy"
        if alone and self.strength is not None:
            raise ValueError("strength needs an anchor: leave it null with anchor 'none' or compat")
        if self.compat == "legacy" and self.anchor == "identity":
            raise ValueError("compat 'legacy' has no anchor: leave anchor out, or say 'none'")
        return self

    def scored(self) -> int:
        """How many strengths are compared; none where nothing is left to choose."""
        alone = self.anchor == "none" or self.compat == "legacy"
        if alone or self.strength is not None:
            return 0 if self.temperature is not None else 1
        return STRENGTHS_TRIED


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Prepare, compare anchor strengths, fit blocks of clusters, put together."""
    meta = inputs["pairs"].meta
    most = most_clusters(spec.clustering, meta)
    rows, dim = meta["rows"], meta["dim"]
    # Queries and targets, their turned copies, and every cluster's rotation.
    needed = 4 * float_bytes(rows, dim) + 2 * float_bytes(most, dim, dim)
    return [
        Stage("prepare", 1, memory_bytes=needed),
        Stage("score", spec.scored(), memory_bytes=needed),
        Stage("fit", len(blocks(most, CLUSTERS_PER_CHUNK)), memory_bytes=needed),
        Stage("assemble", 1, memory_bytes=needed),
    ]


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    steps = {"prepare": _prepare, "score": _score, "fit": _fit, "assemble": _assemble}
    return steps[chunk.stage](spec, chunk)


def _prepare(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.distill import fitting
    from core.tensors import shards
    from core.tensors.formats import load_pairs

    pairs = load_pairs(chunk.fetch(chunk.input("pairs").sha256))
    prepared = fitting.prepare(
        pairs,
        spec.clustering,
        seed=spec.seed,
        test_fraction=spec.test_fraction,
        split=spec.split,
        anchor=spec.anchor,
        top_k=spec.top_k,
        compat=spec.compat,
        report=lambda: chunk.progress(0, 1),
    )
    path = chunk.workdir / "prepared.safetensors"
    tensors = {
        "cluster_of": prepared.cluster_of,
        "anchor": prepared.anchor,
        "train_rows": prepared.train_rows,
        "held_out_rows": prepared.held_out_rows,
    }
    known = {**prepared.facts, "pairs": chunk.input("pairs").sha256}
    facts = {"anchored": prepared.anchored, "legacy": prepared.legacy, "facts": known}
    shards.save(path, tensors, {"clusters": prepared.clusters, **facts})
    made = Produced(path, "prepared", path.name)
    clusters = Metric("clusters", 0, float(prepared.clusters))
    return ChunkResult(checkpoints={"prepared": made}, metrics=[clusters])


def _load(chunk: Chunk) -> Prepared:
    from core.distill.fitting import Prepared
    from core.tensors import shards
    from core.tensors.formats import load_pairs

    pairs = load_pairs(chunk.fetch(chunk.input("pairs").sha256))
    tensors, manifest = shards.load(chunk.outputs("prepare")[0]["prepared"].path)
    rows = tensors["train_rows"]
    return Prepared(
        queries=pairs.queries[rows].astype("float32"),
        targets=pairs.targets[rows].astype("float32"),
        cluster_of=tensors["cluster_of"],
        clusters=manifest["clusters"],
        anchor=tensors["anchor"],
        anchored=manifest["anchored"],
        legacy=manifest["legacy"],
        train_rows=rows,
        held_out_rows=tensors["held_out_rows"],
        facts=manifest["facts"],
    )


def _score(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.distill import choosing, fitting

    prepared = _load(chunk)
    strength = fitting.strengths(prepared, spec.strength)[chunk.index]
    tried = fitting.temperatures(prepared, spec.temperature)
    scores = fitting.score(
        prepared, strength, tried, seed=spec.seed, report=lambda: chunk.progress(0, 1)
    )
    found = [vars(score) for score in scores]
    file = write_json(chunk.workdir / "scores.json", found, format_name="scores")
    best = choosing.choose(scores)
    curve = [
        Metric("score/hit1", chunk.index, best.hit1),
        Metric("score/log_score", chunk.index, best.log_score),
    ]
    return ChunkResult(checkpoints={"scores": file}, metrics=curve)


def _choice(spec: Spec, chunk: Chunk, prepared: Prepared) -> tuple[float, float, list[Any]]:
    """Return the strength and temperature in force, and the scores they were chosen by."""
    from core.distill import choosing, fitting

    scores = [
        choosing.Score(**found)
        for made in chunk.outputs("score")
        for found in read_json(made["scores"].path)
    ]
    if scores:
        best = choosing.choose(scores)
        return best.strength, best.temperature, scores
    [strength] = fitting.strengths(prepared, spec.strength)
    [temperature] = fitting.temperatures(prepared, spec.temperature)
    return strength, temperature, []


def _fit(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.distill import fitting
    from core.tensors import shards

    prepared = _load(chunk)
    pieces = blocks(prepared.clusters, CLUSTERS_PER_CHUNK)
    if chunk.index >= len(pieces):
        # Fewer clusters were found than asked for: nothing is left for this chunk.
        return ChunkResult()
    strength, _, _ = _choice(spec, chunk, prepared)
    start, stop = pieces[chunk.index]
    rotations = fitting.fit_clusters(
        prepared, start, stop, strength=strength, report=lambda: chunk.progress(0, 1)
    )
    path = chunk.workdir / "rotations.safetensors"
    shards.save(path, {"rotations": rotations}, {"start": start, "stop": stop})
    return ChunkResult(checkpoints={"rotations": Produced(path, "rotations", path.name)})


def _assemble(spec: Spec, chunk: Chunk) -> ChunkResult:
    import numpy as np

    from core.distill import fitting
    from core.tensors import shards
    from core.tensors.formats import save_federated

    prepared = _load(chunk)
    strength, temperature, scores = _choice(spec, chunk, prepared)
    parts = [shards.load(made["rotations"].path)[0] for made in chunk.outputs("fit")]
    model = fitting.assemble(
        prepared,
        np.concatenate([part["rotations"] for part in parts]),
        strength=strength,
        temperature=temperature,
        scores=scores,
    )
    path = chunk.workdir / "model.safetensors"
    save_federated(path, model)
    made = Produced(path, "federated_model", path.name, meta=model.meta())
    chosen = [Metric("strength", 0, strength), Metric("temperature", 0, temperature)]
    return ChunkResult(outputs={"model": made}, metrics=chosen)


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Fit a federated model: one anchored rotation per cluster of pairs.",
    example={
        "kind": "fit_federated",
        "pairs": "0" * 64,
        "clustering": {"method": "kmeans", "max_clusters": 64},
    },
    outputs={"model": "federated_model"},
)
