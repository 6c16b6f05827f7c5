"""Fit an LDA teacher to pairs: cluster them, choose a temperature, one head per cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from core.kinds._base import Chunk, ChunkResult, Input, Kind, Metric, Produced, Stage
from core.kinds._files import float_bytes, read_json, write_json
from core.specs.clusterings import Clustering, Groups, KMeans, most_clusters
from core.specs.fitting import FittingSpec

if TYPE_CHECKING:
    from core.distill.choosing import Score
    from core.distill.lda_fitting import Prepared

STRENGTHS_TRIED = 6
SCRATCH_BYTES = 2**28
"""What scoring holds beside pairs and heads: some blocks of 16 MiB, and those of a search."""


class Spec(FittingSpec):
    """Which pairs, how to cluster them, and what a head answers with."""

    kind: Literal["fit_lda"] = "fit_lda"
    clustering: Clustering | None = Field(
        None,
        description="Each cluster becomes a head; null: groups where the pairs have them, else "
        "kmeans.",
    )
    mode: Literal["answers", "maps"] = Field(
        "answers",
        description="What heads hold: an answer vector each, or a linear map of the question each, "
        "which alone can be judged on a split by cluster.",
    )
    temperature: float | None = Field(
        None,
        ge=1e-6,
        le=100,
        description="Of the softmax over the heads, in units of a cosine; null: chosen on training "
        "rows hidden in turn, by the log weight of the right head (mode 'maps': of the right "
        "target).",
    )
    strength: float | None = Field(
        None,
        ge=1e-3,
        le=1e9,
        description="Of the global map that a head's map stays near, and of the identity that the "
        "global map does, in pairs; mode 'maps' alone; null: chosen like the temperature.",
    )

    @model_validator(mode="after")
    def _mode_can_do_it(self) -> Spec:
        if self.mode == "answers" and self.strength is not None:
            raise ValueError("strength is of maps: leave it null with mode 'answers'")
        if self.mode == "answers" and self.split == "cluster":
            raise ValueError(
                "split 'cluster' holds out whole answers, and a model of mode 'answers' can give "
                "none it was not fitted on; allowed: split 'query', or mode 'maps'"
            )
        return self

    def scored(self) -> int:
        """How many chunks compare settings; none where nothing is left to choose."""
        if self.mode == "answers":
            return 0 if self.temperature is not None else 1
        if self.strength is not None:
            return 0 if self.temperature is not None else 1
        return STRENGTHS_TRIED


def _clustering(spec: Spec, pairs: Mapping[str, Any]) -> Groups | Clustering:
    """Return the clustering in force for pairs of this meta."""
    if spec.clustering is not None:
        return spec.clustering
    return Groups() if pairs["groups"] else KMeans()


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Prepare, compare settings, fit all heads."""
    meta = inputs["pairs"].meta
    rows, dim = meta["rows"], meta["dim"]
    heads = most_clusters(_clustering(spec, meta), meta)
    # Queries and targets, their copies in float64, and every head twice; a map's solve beside.
    needed = 6 * float_bytes(rows, dim) + 2 * float_bytes(heads, dim) + SCRATCH_BYTES
    if spec.mode == "maps":
        needed += 2 * float_bytes(heads, dim, dim) + 8 * float_bytes(dim, dim)
    return [
        Stage("prepare", 1, memory_bytes=needed),
        Stage("score", spec.scored(), memory_bytes=needed),
        Stage("fit", 1, memory_bytes=needed),
    ]


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    steps = {"prepare": _prepare, "score": _score, "fit": _fit}
    return steps[chunk.stage](spec, chunk)


def _prepare(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.distill import lda_fitting
    from core.tensors import shards
    from core.tensors.formats import load_pairs

    given = chunk.input("pairs")
    prepared = lda_fitting.prepare(
        load_pairs(chunk.fetch(given.sha256)),
        _clustering(spec, given.meta),
        mode=spec.mode,
        seed=spec.seed,
        test_fraction=spec.test_fraction,
        split=spec.split,
        report=lambda: chunk.progress(0, 1),
    )
    path = chunk.workdir / "prepared.safetensors"
    tensors = {
        "cluster_of": prepared.cluster_of,
        "train_rows": prepared.train_rows,
        "held_out_rows": prepared.held_out_rows,
    }
    facts = {**prepared.facts, "pairs": given.sha256}
    shards.save(path, tensors, {"cluster_ids": prepared.cluster_ids, "facts": facts})
    heads = Metric("heads", 0, float(prepared.heads))
    made = Produced(path, "prepared", path.name)
    return ChunkResult(checkpoints={"prepared": made}, metrics=[heads])


def _load(spec: Spec, chunk: Chunk) -> Prepared:
    from core.distill.lda_fitting import Prepared
    from core.tensors import shards
    from core.tensors.formats import load_pairs

    pairs = load_pairs(chunk.fetch(chunk.input("pairs").sha256))
    tensors, manifest = shards.load(chunk.outputs("prepare")[0]["prepared"].path)
    rows = tensors["train_rows"]
    return Prepared(
        queries=pairs.queries[rows].astype("float32"),
        targets=pairs.targets[rows].astype("float32"),
        cluster_of=tensors["cluster_of"],
        cluster_ids=manifest["cluster_ids"],
        mode=spec.mode,
        train_rows=rows,
        held_out_rows=tensors["held_out_rows"],
        facts=manifest["facts"],
    )


def _score(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.distill import lda_fitting
    from core.distill.choosing import STRENGTHS, choose

    prepared = _load(spec, chunk)
    tried = lda_fitting.TEMPERATURES if spec.temperature is None else (spec.temperature,)

    def report() -> None:
        chunk.progress(0, 1)

    if spec.mode == "answers":
        scores = lda_fitting.routing_scores(prepared, tried, seed=spec.seed, report=report)
    else:
        strength = STRENGTHS[chunk.index] if spec.strength is None else spec.strength
        scores = lda_fitting.map_scores(prepared, strength, tried, seed=spec.seed, report=report)
    found = [vars(score) for score in scores]
    file = write_json(chunk.workdir / "scores.json", found, format_name="scores")
    best = choose(scores)
    curve = [
        Metric("score/hit1", chunk.index, best.hit1),
        Metric("score/log_score", chunk.index, best.log_score),
    ]
    return ChunkResult(checkpoints={"scores": file}, metrics=curve)


def _choice(spec: Spec, chunk: Chunk) -> tuple[float, float | None, list[Score]]:
    """Return the temperature and strength in force, and the scores they were chosen by."""
    from core.distill.choosing import Score, choose

    scores = [
        Score(**found)
        for made in chunk.outputs("score")
        for found in read_json(made["scores"].path)
    ]
    if not scores:
        assert spec.temperature is not None
        return spec.temperature, spec.strength, []
    best = choose(scores)
    return best.temperature, best.strength if spec.mode == "maps" else None, scores


def _fit(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.distill import lda_fitting
    from core.tensors.lda import save_lda

    prepared = _load(spec, chunk)
    temperature, strength, scores = _choice(spec, chunk)
    model = lda_fitting.assemble(
        prepared,
        temperature=temperature,
        strength=strength,
        scores=scores,
        report=lambda: chunk.progress(0, 1),
    )
    path = chunk.workdir / "model.safetensors"
    save_lda(path, model)
    made = Produced(path, "lda_model", path.name, meta=model.meta())
    chosen = [Metric("temperature", 0, temperature)]
    if strength is not None:
        chosen.append(Metric("strength", 0, strength))
    return ChunkResult(outputs={"model": made}, metrics=chosen)


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Fit an LDA teacher: one head per cluster of questions and their answers.",
    example={"kind": "fit_lda", "pairs": "0" * 64, "clustering": {"method": "groups"}},
    outputs={"model": "lda_model"},
)
