"""Fits a federated model: one anchored rotation per cluster of training pairs.

A job calls ``prepare`` once, ``score`` per strength, ``choose``, ``fit_clusters`` per block of
clusters and ``assemble``. All are functions of their arguments alone. Nothing here looks at a
held-out row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from core.distill.choosing import STRENGTHS, TEMPERATURES, Score, choose
from core.distill.clustering import Report, centroids, unheard
from core.distill.retrieval import Index
from core.distill.routing import nearest
from core.distill.splits import split_again, training_rows
from core.distill.teachers._federated import TOP_K
from core.errors import DataInvalid, SpecInvalid
from core.rotations.action import exp_action
from core.rotations.logarithm import rotation_log
from core.rotations.mixture import Mixture
from core.rotations.procrustes import centred_procrustes, procrustes_from_moment
from core.specs.clusterings import Clustering
from core.specs.fitting import Split
from core.tensors.formats import Federated, Pairs
from core.tensors.shards import Array

Anchor = Literal["global", "identity", "none"]

GLOBAL_STRENGTH = 1.0
"""Pairs by which the one global rotation is anchored to the identity."""


@dataclass(frozen=True)
class Prepared:
    """What is known before any cluster is fitted."""

    queries: Array
    """[n, d] float32, the training rows."""
    targets: Array
    """[n, d] float32."""
    cluster_of: Array
    """[n] int64 in [0, clusters)."""
    clusters: int
    anchor: Array
    """[d, d] float64: the global rotation, or the identity."""
    anchored: bool
    """False where clusters are fitted alone (anchor ``none``)."""
    legacy: bool
    train_rows: Array
    """[n] int64, rows of the pairs."""
    held_out_rows: Array
    """[h] int64."""
    facts: dict[str, Any]
    """For the manifest: how it was prepared."""


def prepare(  # noqa: PLR0913 - what a job says, by keyword
    pairs: Pairs,
    clustering: Clustering,
    *,
    seed: int,
    test_fraction: float,
    split: Split = "query",
    anchor: Anchor = "global",
    top_k: int = TOP_K,
    compat: Literal["legacy"] | None = None,
    report: Report = unheard,
) -> Prepared:
    """Split, cluster the training targets (``training_rows``), and fit the one global rotation.

    ``compat="legacy"`` is document 000: clusters are fitted alone, on centred pairs. It is worse
    than not rotating at all, because a rotation is then arbitrary on every direction that the few
    pairs of a cluster do not span.
    """
    if compat == "legacy":
        anchor = "none"
    rows = training_rows(
        pairs, clustering, seed=seed, test_fraction=test_fraction, split=split, report=report
    )
    facts = {
        "anchor": anchor,
        "clustering": clustering.model_dump(),
        "compat": compat,
        "seed": seed,
        "split": split,
        "test_fraction": test_fraction,
        "top_k": top_k,
    }
    return Prepared(
        queries=rows.queries,
        targets=rows.targets,
        cluster_of=rows.cluster_of,
        clusters=int(rows.cluster_of.max()) + 1,
        anchor=_anchor(rows.queries, rows.targets, anchor),
        anchored=anchor != "none",
        legacy=compat == "legacy",
        train_rows=rows.train_rows,
        held_out_rows=rows.held_out_rows,
        facts=facts,
    )


def inner(prepared: Prepared, *, seed: int, fraction: float = 0.2) -> tuple[Prepared, Array]:
    """Hide a share of the training rows, to choose strength and temperature by.

    Split as the whole was: by query, or whole clusters, which then have no row left to route to.

    Returns:
        The rest prepared as before (same clusters, the anchor fitted again), and the rows hidden.
    """
    seen, hidden = split_again(
        prepared.queries,
        prepared.cluster_of,
        split=prepared.facts["split"],
        seed=seed + 1,
        test_fraction=fraction,
    )
    queries, targets = prepared.queries[seen], prepared.targets[seen]
    rest = Prepared(
        queries=queries,
        targets=targets,
        cluster_of=prepared.cluster_of[seen],
        clusters=prepared.clusters,
        anchor=_anchor(queries, targets, prepared.facts["anchor"]),
        anchored=prepared.anchored,
        legacy=prepared.legacy,
        train_rows=prepared.train_rows[seen],
        held_out_rows=prepared.train_rows[hidden],
        facts=prepared.facts,
    )
    return rest, hidden


def strengths(prepared: Prepared, given: float | None) -> tuple[float, ...]:
    """Return the strengths to score.

    Raises:
        SpecInvalid: a strength is given and there is no anchor to be near to.
    """
    if not prepared.anchored:
        if given is not None:
            raise SpecInvalid(
                f"strength {given} needs an anchor; allowed: null with anchor 'none', "
                "or anchor 'global' or 'identity'",
                pointer="/strength",
            )
        return (0.0,)
    return STRENGTHS if given is None else (given,)


def temperatures(prepared: Prepared, given: float | None) -> tuple[float, ...]:
    """Return the routing temperatures to score."""
    if given is not None:
        return (given,)
    scale = float(np.square(prepared.queries.astype(np.float64)).sum(axis=1).mean())
    return tuple(temperature * scale for temperature in TEMPERATURES)


def score(
    prepared: Prepared,
    strength: float,
    tried_temperatures: Sequence[float],
    *,
    seed: int,
    report: Report = unheard,
) -> list[Score]:
    """Fit on most training rows; judge the blended teacher on the hidden ones, per temperature.

    The hidden queries are searched among all training targets.

    Raises:
        DataInvalid: an answer is no finite vector, so nothing can be said about it.
    """
    rest, hidden = inner(prepared, seed=seed)
    logarithms = []
    for number in range(rest.clusters):
        report()
        logarithms.append(_bivector(rest, number, strength))
    bivectors = torch.stack(logarithms)
    queries = torch.from_numpy(prepared.queries[hidden])
    turned = queries @ torch.from_numpy(rest.anchor).float()
    keys = torch.from_numpy(rest.queries)
    rows, similarity = nearest(queries, keys, top_k=prepared.facts["top_k"])
    neighbours = torch.from_numpy(rest.cluster_of)[rows]
    norms = torch.linalg.matrix_norm(bivectors.double(), ord="fro") * 2**-0.5
    index = Index(prepared.targets)
    scores = []
    for temperature in tried_temperatures:
        report()
        weights = (similarity / temperature).softmax(dim=1)
        mixture = Mixture.from_topk(neighbours, weights, rest.clusters)
        answers = exp_action(turned, bivectors, mixture, tolerance=1e-5, norms=norms).numpy()
        if not (np.isfinite(answers).all() and answers.any(axis=1).all()):
            raise DataInvalid(
                f"pairs: with strength {strength:g} and temperature {temperature:g} a query's "
                "answer is zero, NaN or infinite in float32; scale the embeddings"
            )
        scores.append(
            Score(
                strength=strength,
                temperature=temperature,
                log_score=index.log_score(answers, hidden),
                hit1=float((index.ranks(answers, hidden) < 1).mean()),
                cosine=index.cosine(answers, hidden),
            )
        )
    return scores


def fit_clusters(
    prepared: Prepared, start: int, stop: int, *, strength: float, report: Report = unheard
) -> Array:
    """Fit the rotations of clusters start..stop-1: [stop - start, d, d] float32, det +1."""
    fitted = []
    for number in range(start, stop):
        report()
        fitted.append(_rotation(prepared, number, strength))
    rotations: Array = torch.stack(fitted).float().numpy()
    return rotations


def assemble(
    prepared: Prepared,
    rotations: Array,
    *,
    strength: float,
    temperature: float,
    scores: Sequence[Score] = (),
) -> Federated:
    """Put the fitted blocks ([C, d, d] in all) together with what routes to them."""
    manifest = {
        **prepared.facts,
        "strength": strength,
        "temperature": temperature,
        "scores": [vars(found) for found in scores],
    }
    return Federated(
        rotations=rotations,
        scales=np.ones(prepared.clusters, dtype=np.float32),
        anchor=prepared.anchor.astype(np.float32),
        centroids=centroids(prepared.queries, prepared.cluster_of, prepared.clusters),
        queries=prepared.queries,
        targets=prepared.targets,
        cluster_of=prepared.cluster_of,
        train_rows=prepared.train_rows,
        held_out_rows=prepared.held_out_rows,
        manifest=manifest,
    )


def fit(  # noqa: PLR0913 - what a job's spec holds, by keyword
    pairs: Pairs,
    clustering: Clustering,
    *,
    seed: int,
    test_fraction: float = 0.2,
    split: Split = "query",
    anchor: Anchor = "global",
    strength: float | None = None,
    temperature: float | None = None,
    top_k: int = TOP_K,
    compat: Literal["legacy"] | None = None,
) -> Federated:
    """Do every step at once: what a job spreads over chunks."""
    prepared = prepare(
        pairs,
        clustering,
        seed=seed,
        test_fraction=test_fraction,
        split=split,
        anchor=anchor,
        top_k=top_k,
        compat=compat,
    )
    tried = temperatures(prepared, temperature)
    scores = [
        found
        for value in strengths(prepared, strength)
        for found in score(prepared, value, tried, seed=seed)
    ]
    best = choose(scores)
    rotations = fit_clusters(prepared, 0, prepared.clusters, strength=best.strength)
    return assemble(
        prepared,
        rotations,
        strength=best.strength,
        temperature=best.temperature,
        scores=scores,
    )


def global_rotation(queries: Array, targets: Array) -> Array:
    """Fit one rotation to all pairs, anchored to the identity: [d, d] float64."""
    moment = _moment(queries, targets)
    moment += GLOBAL_STRENGTH * torch.eye(len(moment), dtype=moment.dtype)
    rotation: Array = procrustes_from_moment(moment).numpy()
    return rotation


def _anchor(queries: Array, targets: Array, anchor: Anchor) -> Array:
    if anchor == "global":
        return global_rotation(queries, targets)
    return np.eye(queries.shape[1])


def _moment(queries: Array, targets: Array) -> Tensor:
    """X^T Y in float64, over the mean |x| |y|: n pairs weigh n whatever their length."""
    x, y = torch.from_numpy(queries).double(), torch.from_numpy(targets).double()
    return x.T @ y / _pair_size(x, y)


def _pair_size(x: Tensor, y: Tensor) -> Tensor:
    size: Tensor = (x.norm(dim=1) * y.norm(dim=1)).mean()
    return size.clamp(min=torch.finfo(x.dtype).tiny)


def _rotation(prepared: Prepared, number: int, strength: float) -> Tensor:
    """W_c: [d, d] float64."""
    rows = np.flatnonzero(prepared.cluster_of == number)
    if prepared.legacy:
        queries, targets = prepared.queries[rows], prepared.targets[rows]
        return centred_procrustes(torch.from_numpy(queries), torch.from_numpy(targets))
    anchor = torch.from_numpy(prepared.anchor)
    basis, inside = _relative(prepared, rows, strength)
    if basis is None:
        return anchor @ inside
    eye = torch.eye(len(inside), dtype=inside.dtype)
    return anchor + (anchor @ basis) @ ((inside - eye) @ basis.T)


def _bivector(prepared: Prepared, number: int, strength: float) -> Tensor:
    """log(G^T W_c): [d, d] float32, computed inside the subspace where it is not zero."""
    rows = np.flatnonzero(prepared.cluster_of == number)
    if prepared.legacy:
        return rotation_log(_rotation(prepared, number, strength)[None]).bivectors[0].float()
    basis, inside = _relative(prepared, rows, strength)
    logarithm = rotation_log(inside[None]).bivectors[0]
    if basis is None:
        return logarithm.float()
    full = basis @ logarithm @ basis.T
    return (0.5 * (full - full.T)).float()


def _relative(prepared: Prepared, rows: Array, strength: float) -> tuple[Tensor | None, Tensor]:
    """Fit R_c = G^T W_c, the rotation nearest to (X G)^T Y + strength I.

    Outside the span of a cluster's own few pairs that matrix is strength times the identity, so
    the fit is done inside: R_c = I + B (P - I) B^T, exactly.

    Returns:
        B [d, r] with orthonormal columns and P [r, r]; or None and R_c itself.
    """
    anchor = torch.from_numpy(prepared.anchor)
    x = torch.from_numpy(prepared.queries[rows]).double() @ anchor
    y = torch.from_numpy(prepared.targets[rows]).double()
    d = x.shape[1]
    if not len(rows):
        return None, torch.eye(d, dtype=x.dtype)
    x = x / _pair_size(x, y)
    if strength > 0 and 2 * len(rows) < d:
        basis = torch.linalg.qr(torch.cat([x, y]).T).Q  # [d, 2 rows]
        moment = (x @ basis).T @ (y @ basis)
        moment.diagonal().add_(strength)
        # A mirror image is mended along the least singular direction; outside all are strength.
        least = torch.linalg.svdvals(moment)[-1]
        if least <= strength or torch.linalg.slogdet(moment).sign > 0:
            return basis, procrustes_from_moment(moment)
    moment = x.T @ y
    moment.diagonal().add_(strength)
    return None, procrustes_from_moment(moment)
