"""Fits an LDA teacher to pairs: a head per cluster of questions. No held-out row is looked at.

A job calls ``prepare``, then ``routing_scores`` (mode ``answers``) or ``map_scores`` per strength
(mode ``maps``), ``choose``, and ``assemble``. All are functions of their arguments alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from core.distill.choosing import STRENGTHS, Score, choose
from core.distill.clustering import Report, centroids, unheard
from core.distill.lda import unit
from core.distill.retrieval import Index
from core.distill.routing import EqualRows
from core.distill.splits import split_again, training_rows
from core.errors import SpecInvalid
from core.specs.clusterings import Clustering
from core.specs.fitting import Split
from core.tensors.formats import Pairs
from core.tensors.lda import LDA, Mode
from core.tensors.shards import Array

TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Tried where none is given, in units of a cosine."""
FOLDS = 5
"""Parts of the training questions that are hidden in turn to choose a temperature by."""
HIDDEN_SHARE, MOST_HIDDEN = 0.2, 2000
"""Of the training questions, hidden to choose the maps' strength and temperature by."""
BLOCK_ENTRIES = 4 * 2**20
"""Numbers of a block in memory at a time, while settings are scored."""


@dataclass(frozen=True)
class Prepared:
    """What is known before any head is fitted."""

    queries: Array
    """[n, d] float32, the training rows."""
    targets: Array
    """[n, d] float32."""
    cluster_of: Array
    """[n] int64 in [0, N), each head at least once."""
    cluster_ids: list[str]
    """[N]: the groups' labels where clusters are groups, else numbers."""
    mode: Mode
    train_rows: Array
    """[n] int64, rows of the pairs."""
    held_out_rows: Array
    """[h] int64."""
    facts: dict[str, Any]
    """For the manifest: how it was prepared."""

    @property
    def heads(self) -> int:
        """Return N."""
        return len(self.cluster_ids)


def prepare(
    pairs: Pairs,
    clustering: Clustering,
    *,
    mode: Mode = "answers",
    seed: int,
    test_fraction: float,
    split: Split = "query",
    report: Report = unheard,
) -> Prepared:
    """Split the pairs and cluster the training targets (``training_rows``): a head per cluster.

    Raises:
        SpecInvalid: split ``cluster`` with mode ``answers``: a held-out question's answer would
            be none of the heads', so nothing could be right.
        DataInvalid: the pairs have no groups and are to be clustered by them, or are too few.
    """
    if split == "cluster" and mode == "answers":
        raise SpecInvalid(
            "split 'cluster' holds out whole answers, and a model of mode 'answers' can give none "
            "it was not fitted on; allowed: split 'query', or mode 'maps'",
            pointer="/split",
        )
    rows = training_rows(
        pairs, clustering, seed=seed, test_fraction=test_fraction, split=split, report=report
    )
    return Prepared(
        queries=rows.queries,
        targets=rows.targets,
        cluster_of=rows.cluster_of,
        cluster_ids=_ids(rows.cluster_of, rows.groups if clustering.method == "groups" else None),
        mode=mode,
        train_rows=rows.train_rows,
        held_out_rows=rows.held_out_rows,
        facts={
            "clustering": clustering.model_dump(),
            "seed": seed,
            "split": split,
            "test_fraction": test_fraction,
        },
    )


def _ids(cluster_of: Array, groups: Sequence[str] | None) -> list[str]:
    """Name the heads: by the label most of their rows have, which no two share, or by number."""
    heads = range(int(cluster_of.max()) + 1)
    if groups is None:
        return [str(number) for number in heads]
    labels: list[Counter[str]] = [Counter() for _ in heads]
    for number, label in zip(cluster_of.tolist(), groups, strict=True):
        labels[number][label] += 1
    return [found.most_common(1)[0][0] for found in labels]


def routing_scores(
    prepared: Prepared, temperatures: Sequence[float], *, seed: int, report: Report = unheard
) -> list[Score]:
    """Judge temperatures by how well hidden questions find their own head.

    The training questions are hidden a fifth at a time, equal ones together, and the heads made of
    the rest. ``log_score`` is the mean log weight of the right head in nats, a proper score:
    a temperature that is right too timidly or wrong too boldly loses. ``hit1`` is how often the
    right head weighs most; ``cosine`` is of the blended answer to the right target. A question
    alone in its cluster cannot be judged.

    Raises:
        SpecInvalid: no cluster has two different questions, so none can be judged.
    """
    count = 0
    sums = np.zeros((len(temperatures), 3))
    for cosines, own, answers, targets in _hidden(prepared, seed, report):
        count += len(own)
        hits = (cosines.argmax(dim=1) == own).sum().item()
        for number, temperature in enumerate(temperatures):
            report()
            logs = (cosines.double() / temperature).log_softmax(dim=1)  # [B, N] in nats
            blended = logs.exp().float() @ answers
            near = functional.cosine_similarity(blended, targets, dim=1)
            right = logs.gather(1, own[:, None]).sum().item()
            sums[number] += right, hits, near.double().sum().item()
    if not count:
        raise SpecInvalid(
            "temperature: no cluster of the training rows has two different questions, so none can "
            "be hidden to choose it by; give one, for example 0.05",
            pointer="/temperature",
        )
    return [
        Score(0.0, temperature, *(float(value) for value in found / count))
        for temperature, found in zip(temperatures, sums, strict=True)
    ]


def _hidden(
    prepared: Prepared, seed: int, report: Report
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield blocks of hidden questions that can be judged.

    Cosines to the heads of the rest [B, N] float32 (-inf: nothing is left of a head), right heads
    [B], answers of the heads [N, d], right targets [B, d].
    """
    _, which = np.unique(EqualRows.among(prepared.queries).first, return_inverse=True)
    order = np.random.default_rng(seed + 1).permutation(int(which.max()) + 1)
    fold_of = order[which] % FOLDS
    units = unit(torch.from_numpy(prepared.queries).double()).float().numpy()
    rows = max(1, BLOCK_ENTRIES // prepared.heads)
    for fold in range(FOLDS):
        report()
        seen = fold_of != fold
        left = np.bincount(prepared.cluster_of[seen], minlength=prepared.heads) > 0
        hidden = np.flatnonzero(~seen & left[prepared.cluster_of])
        if not len(hidden):
            continue
        means = centroids(units[seen], prepared.cluster_of[seen], prepared.heads)
        heads = unit(torch.from_numpy(means).double()).float()
        answers = centroids(prepared.targets[seen], prepared.cluster_of[seen], prepared.heads)
        for block in np.split(hidden, range(rows, len(hidden), rows)):
            cosines = torch.from_numpy(units[block]) @ heads.T
            cosines[:, ~torch.from_numpy(left)] = -torch.inf
            own = torch.from_numpy(prepared.cluster_of[block])
            right = torch.from_numpy(prepared.targets[block])
            yield cosines, own, torch.from_numpy(answers), right


def map_scores(
    prepared: Prepared,
    strength: float,
    temperatures: Sequence[float],
    *,
    seed: int,
    report: Report = unheard,
) -> list[Score]:
    """Fit maps on most training rows; judge their blends on the hidden ones, per temperature.

    The hidden questions are searched among all training targets, as ``fitting.score`` does.

    Raises:
        DataInvalid: an answer has no direction, or all questions are equal.
    """
    seen, hidden = _inner(prepared, seed)
    queries, targets = prepared.queries[seen], prepared.targets[seen]
    left, cluster_of = np.unique(prepared.cluster_of[seen], return_inverse=True)
    maps = fit_maps(queries, targets, cluster_of, strength=strength, report=report)
    heads = unit(torch.from_numpy(_centroids(queries, cluster_of, len(left))).double()).float()
    answers: list[list[Tensor]] = [[] for _ in temperatures]
    rows = max(1, BLOCK_ENTRIES // (maps.shape[0] * maps.shape[2]))
    for block in torch.from_numpy(prepared.queries[hidden]).split(rows):
        report()
        mapped = block @ maps  # [N, B, m]
        cosines = unit(block) @ heads.T
        for number, temperature in enumerate(temperatures):
            weights = (cosines / temperature).softmax(dim=1)
            answers[number].append(torch.einsum("bn,nbm->bm", weights, mapped))
    index = Index(prepared.targets)
    scores = []
    for temperature, blocks in zip(temperatures, answers, strict=True):
        report()
        found = torch.cat(blocks).numpy()
        hits = index.ranks(found, hidden) < 1
        told = index.log_score(found, hidden), float(hits.mean()), index.cosine(found, hidden)
        scores.append(Score(strength, temperature, *told))
    return scores


def _inner(prepared: Prepared, seed: int) -> tuple[Array, Array]:
    """Hide a share of the training rows, split as the whole was."""
    fraction = min(HIDDEN_SHARE, MOST_HIDDEN / len(prepared.queries))
    return split_again(
        prepared.queries,
        prepared.cluster_of,
        split=prepared.facts["split"],
        seed=seed + 1,
        test_fraction=fraction,
    )


def _centroids(queries: Array, cluster_of: Array, heads: int) -> Array:
    """Average the directions of each head's questions: [N, d] float32."""
    units = unit(torch.from_numpy(queries).double()).float().numpy()
    return centroids(units, cluster_of, heads)


def fit_maps(
    queries: Array,
    targets: Array,
    cluster_of: Array,
    *,
    strength: float,
    report: Report = unheard,
) -> Tensor:
    """Fit a linear map per head by ridge regression to the one global map, uncentred.

    W_c minimises |X_c W - Y_c|^2 + strength s |W - G|^2, s the mean squared length of a question:
    the strength counts pairs. G is fitted to all pairs, as strongly to the identity: so where a
    head's questions say nothing it maps as G does, and without end the strength changes nothing.
    Which strength is right differs much (WordNet pairs 30 to 100, 240 questions and answers 1),
    and squared errors choose too little: they forgive a shrunken answer, a search does not.

    Args:
        queries: [n, d] floating.
        targets: [n, d].
        cluster_of: [n] int64 in [0, N), each head at least once.
        strength: > 0.
        report: called per head.

    Returns:
        [N, d, d] float32, computed in float64.
    """
    x, y = torch.from_numpy(queries).double(), torch.from_numpy(targets).double()
    size = x.square().sum(dim=1).mean()
    anchor = torch.eye(x.shape[1], dtype=x.dtype)
    anchor = anchor + _ridge(x, y - x, strength * size)
    heads = int(cluster_of.max()) + 1
    maps = torch.empty(heads, *anchor.shape)
    for number in range(heads):
        report()
        rows = torch.from_numpy(np.flatnonzero(cluster_of == number))
        own = x[rows]
        maps[number] = anchor + _ridge(own, y[rows] - own @ anchor, strength * size)
    return maps


def _ridge(x: Tensor, residual: Tensor, penalty: Tensor) -> Tensor:
    """Return (X^T X + p I)^-1 X^T R, through the smaller of the two Gram matrices: [d, m]."""
    n, d = x.shape
    gram = x @ x.T if n < d else x.T @ x
    gram.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(gram)
    if n < d:
        return x.T @ torch.cholesky_solve(residual, factor)
    return torch.cholesky_solve(x.T @ residual, factor)


def assemble(
    prepared: Prepared,
    *,
    temperature: float,
    strength: float | None = None,
    scores: Sequence[Score] = (),
    report: Report = unheard,
) -> LDA:
    """Make the heads of all training rows.

    A centroid is the mean of the directions of the head's questions, an answer vector the mean of
    their targets; maps are ``fit_maps``'.

    Args:
        prepared: from ``prepare``.
        temperature: of the softmax.
        strength: of the maps; None in mode ``answers``.
        scores: what the two were chosen by, kept in the manifest.
        report: called every few seconds.
    """
    maps = answers = None
    if strength is not None:
        maps = fit_maps(
            prepared.queries,
            prepared.targets,
            prepared.cluster_of,
            strength=strength,
            report=report,
        ).numpy()
    else:
        answers = centroids(prepared.targets, prepared.cluster_of, prepared.heads)
    return LDA(
        centroids=_centroids(prepared.queries, prepared.cluster_of, prepared.heads),
        answers=answers,
        maps=maps,
        queries=prepared.queries,
        targets=prepared.targets,
        cluster_of=prepared.cluster_of,
        cluster_ids=prepared.cluster_ids,
        train_rows=prepared.train_rows,
        held_out_rows=prepared.held_out_rows,
        manifest={
            **prepared.facts,
            "temperature": temperature,
            "scores": [vars(found) for found in scores],
            **({} if strength is None else {"strength": strength}),
        },
    )


def fit(
    pairs: Pairs,
    clustering: Clustering,
    *,
    mode: Mode = "answers",
    seed: int,
    test_fraction: float = 0.2,
    split: Split = "query",
    temperature: float | None = None,
    strength: float | None = None,
) -> LDA:
    """Do every step at once: what a job spreads over chunks.

    Temperature and strength (mode ``maps`` alone) are chosen where they are None.
    """
    prepared = prepare(
        pairs, clustering, mode=mode, seed=seed, test_fraction=test_fraction, split=split
    )
    tried = TEMPERATURES if temperature is None else (temperature,)
    scores: list[Score] = []
    if mode == "maps":
        strengths = STRENGTHS if strength is None else (strength,)
        if len(tried) * len(strengths) > 1:
            for value in strengths:
                scores += map_scores(prepared, value, tried, seed=seed)
        best = choose(scores) if scores else None
        strength = strengths[0] if best is None else best.strength
    else:
        scores = routing_scores(prepared, tried, seed=seed) if temperature is None else []
        best = choose(scores) if scores else None
    return assemble(
        prepared,
        temperature=tried[0] if best is None else best.temperature,
        strength=strength,
        scores=scores,
    )
