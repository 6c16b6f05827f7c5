"""Stages ``permute``, ``rotate`` and ``bind``: from moments to orders and rotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.kinds._base import Chunk, ChunkResult, Metric, Produced
from core.kinds._files import write_json
from core.kinds._transport.capturing import PARTS, block_paths
from core.kinds._transport.given import Given
from core.kinds._transport.spec import Spec
from core.transport.memory import permuted_layers

if TYPE_CHECKING:
    from core.transport.moments import Moments
    from core.transport.permute import LayerSums
    from core.transport.rotations import RotationSet


def permute(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Match heads and neurons, layer by layer."""
    from core.transport import permutations
    from core.transport.permute import match_layer

    given = Given(spec, chunk)
    plan = given.plan
    paths = block_paths(given, *PARTS)
    layers = permuted_layers(plan.permute, plan.student.layers)
    found, reports = {}, []
    for done, layer in enumerate(layers):
        chunk.progress(done, len(layers))
        sums = _layer_sums(given, paths, layer)
        order, told = match_layer(layer, sums, student=plan.student, teacher=plan.teacher)
        found[layer] = order
        reports.append(told)
    made = write_json(
        chunk.workdir / "permutations.json",
        {**permutations.dump(found, plan.student, reports), "sources": given.sources},
        format_name="permutations",
        **given.sources,
    )
    return ChunkResult(outputs={"permutations": made}, metrics=_similarities(reports))


def _layer_sums(given: Given, paths: Sequence[Path], layer: int) -> LayerSums:
    """Add one layer's statistics, those that were kept and are asked for."""
    from core.transport import moment_files
    from core.transport.permute import LayerSums

    kept, asked = moment_files.load_manifest(paths[0]), given.plan.permute
    neurons = asked is not None and asked.neurons and layer in kept["neurons"]
    heads = asked is not None and asked.heads and layer in kept["heads"]
    return LayerSums(
        moment_files.sum_neurons(paths, layer) if neurons else None,
        moment_files.sum_heads(paths, layer) if heads else None,
    )


def _similarities(reports: Sequence[dict[str, Any]]) -> list[Metric]:
    return [
        Metric(f"{what}_{when}", told["layer"], told[what][when])
        for told in reports
        for what in ("neurons", "heads")
        for when in ("before", "after")
        if told[what].get(when) is not None
    ]


def rotate(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Solve for the one rotation of a group, and refine it where something is left."""
    from core.transport.rotation_files import save_rotations
    from core.transport.rotations import Rotation

    given = Given(spec, chunk)
    group, sites = list(given.plan.groups.items())[chunk.index]
    moments = _sum(given, sites, *PARTS)
    found, told = _solve(given, group, sites, moments)
    if isinstance(found, Rotation):
        found, told["refine"] = _refine(given, found, moments)
    means = {site: one.sum_y / one.n for site, one in moments.items()}
    path = chunk.workdir / "rotation.safetensors"
    whole = _set(given, {group: found}, {group: told}, means)
    save_rotations(path, whole)
    made = _produced(path, whole)
    cosines = [
        Metric(f"fit_cosine_{when}", place, told["sites"][site][when])
        for place, site in enumerate(sites)
        for when in ("before", "after")
    ]
    return ChunkResult(checkpoints={"rotation": made}, metrics=cosines)


def _sum(given: Given, sites: Sequence[str], *parts: str) -> dict[str, Moments]:
    from core.transport.moment_files import sum_site

    paths, found = block_paths(given, *parts), {}
    for done, site in enumerate(sites):
        given.chunk.progress(done, 2 * len(sites))
        found[site] = sum_site(paths, site)
    return found


def _solve(
    given: Given, group: str, sites: Sequence[str], moments: dict[str, Moments]
) -> tuple[Any, dict[str, Any]]:
    """Fit to all training texts; where k is to be chosen, a fifth of them chooses it first."""
    from core.transport.rotate import solve

    options = given.spec.rotate

    def report(done: float, total: float) -> None:
        given.chunk.progress(total + done, 2 * total)

    if options.k != "held_out":
        return solve(moments, options, group, report=report)
    trial = _sum(given, sites, PARTS[1])
    _, chosen = solve(_sum(given, sites, PARTS[0]), options, group, held_out=trial, report=report)
    fixed = options.model_copy(update={"k": chosen["k"]})
    found, told = solve(moments, fixed, group, report=report)
    return found, {**told, "tried": chosen["tried"]}


def _refine(given: Given, found: Any, moments: dict[str, Moments]) -> tuple[Any, dict[str, Any]]:
    from core.transport.refine import refine
    from core.transport.rotate import cross_moment

    options = given.spec.rotate
    cross = cross_moment(moments, centre=options.centre)
    return refine(found, cross, given.spec.refine, det=options.det)


def _set(given: Given, maps: Any, told: dict[str, Any], means: Any) -> RotationSet:
    from core.transport.rotations import RotationSet

    plan = given.plan
    return RotationSet(
        tie=given.spec.rotate.tie,
        stage_layers=given.spec.rotate.stage_layers,
        layers=plan.student.layers,
        student_width=plan.student.width,
        teacher_width=plan.teacher.width,
        maps=maps,
        sources={**given.sources, "fitted_on": given.fitted_on},
        diagnostics=told,
        means=means,
    )


def bind(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Put the rotations of all groups into one file."""
    from core.transport.rotation_files import load_rotations, save_rotations
    from core.transport.rotations import join

    parts = [load_rotations(one["rotation"].path) for one in chunk.outputs("rotate")]
    whole = join(parts)
    path = chunk.workdir / "rotations.safetensors"
    save_rotations(path, whole)
    return ChunkResult(outputs={"rotations": _produced(path, whole)})


def _produced(path: Path, whole: RotationSet) -> Produced:
    """Return the file with its facts: of one group alone it is the same as the whole."""
    meta = {
        **whole.sources,
        "tie": whole.tie,
        "stage_layers": whole.stage_layers,
        "groups": len(whole.maps),
        "orthogonal": all(one.orthogonal for one in whole.maps.values()),
    }
    return Produced(path, "rotations", path.name, meta=meta)
