from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from core.distill import fitting
from core.errors import DataInvalid, SpecInvalid
from core.rotations.procrustes import procrustes
from core.specs.clusterings import KMeans
from core.tensors.formats import Pairs, check_federated
from tests.core.distill._make import DIM, make_model, make_pairs

CLUSTERING = KMeans(max_clusters=4)


def prepared(**changes: Any) -> fitting.Prepared:
    values: dict[str, Any] = {"seed": 0, "test_fraction": 0.2, **changes}
    return fitting.prepare(make_pairs(), CLUSTERING, **values)


def test_equal_queries_stay_on_one_side() -> None:
    queries = np.random.default_rng(0).normal(size=(40, 3))[np.arange(100) % 40]

    train, held_out = fitting.split_rows(queries, seed=1, test_fraction=0.25)

    assert sorted([*train, *held_out]) == list(range(100))
    seen = {row.tobytes() for row in queries[train]}
    assert not any(row.tobytes() in seen for row in queries[held_out])
    assert len({row.tobytes() for row in queries[held_out]}) == 10


def test_one_distinct_query_cannot_be_split() -> None:
    with pytest.raises(DataInvalid, match="all rows are equal"):
        fitting.split_rows(np.ones((5, 3)), seed=0, test_fraction=0.2)
    with pytest.raises(SpecInvalid, match=r"test_fraction 1\.0"):
        fitting.split_rows(np.eye(3), seed=0, test_fraction=1.0)


def test_blocks_of_clusters_are_the_whole() -> None:
    found = prepared()
    parts = [
        fitting.fit_clusters(found, start, start + 1, strength=3.0)
        for start in range(found.clusters)
    ]
    assert np.array_equal(
        np.concatenate(parts), fitting.fit_clusters(found, 0, found.clusters, strength=3.0)
    )


def test_the_subspace_fit_is_the_full_procrustes() -> None:
    wide = Pairs(
        ids=list("abcdef"),
        queries=np.random.default_rng(0).normal(size=(6, 40)),
        targets=np.random.default_rng(1).normal(size=(6, 40)),
    )
    found = fitting.prepare(
        wide, KMeans(max_clusters=1, min_cluster_size=1), seed=0, test_fraction=0.1
    )
    x, y = torch.from_numpy(found.queries).double(), torch.from_numpy(found.targets).double()
    anchor = torch.from_numpy(found.anchor)
    size = (x.norm(dim=1) * y.norm(dim=1)).mean()

    fitted = fitting.fit_clusters(found, 0, 1, strength=0.5)[0]

    wanted = procrustes(x / size, y, anchor=anchor, strength=0.5)
    assert np.abs(fitted - wanted.numpy()).max() < 1e-6


def test_the_largest_strength_is_the_global_rotation() -> None:
    found = prepared()
    fitted = fitting.fit_clusters(found, 0, found.clusters, strength=fitting.STRENGTHS[-1])
    assert np.abs(fitted - found.anchor).max() < 1e-4


def test_a_fitted_model_is_valid_and_beats_the_global_rotation_on_its_own_hidden_rows() -> None:
    model = fitting.fit(make_pairs(), CLUSTERING, seed=0)

    check_federated(model)
    scores = [fitting.Score(**score) for score in model.manifest["scores"]]
    assert len(scores) == len(fitting.STRENGTHS) * len(fitting.TEMPERATURES)
    best = fitting.choose(scores)
    assert (best.strength, best.temperature) == (
        model.manifest["strength"],
        model.manifest["temperature"],
    )
    assert best.strength < fitting.STRENGTHS[-1]
    assert best.log_score > max(s.log_score for s in scores if s.strength == fitting.STRENGTHS[-1])


def test_fitting_twice_gives_the_same_bytes() -> None:
    again = fitting.fit(make_pairs(), CLUSTERING, seed=0, strength=3.0, temperature=0.1)
    assert again.rotations.tobytes() == make_model().rotations.tobytes()
    assert again.manifest == make_model().manifest


def test_nothing_held_out_is_looked_at() -> None:
    found = prepared()
    pairs = make_pairs()
    changed = pairs.targets.copy()
    changed[found.held_out_rows] = changed[found.held_out_rows][::-1]
    other = Pairs(pairs.ids, pairs.queries, changed, pairs.groups)

    again = fitting.prepare(other, CLUSTERING, seed=0, test_fraction=0.2)

    assert np.array_equal(found.anchor, again.anchor)
    assert np.array_equal(found.cluster_of, again.cluster_of)


def test_without_an_anchor_there_is_no_strength() -> None:
    alone = prepared(anchor="none")
    assert fitting.strengths(alone, None) == (0.0,)
    with pytest.raises(SpecInvalid, match="needs an anchor"):
        fitting.strengths(alone, 2.0)


@pytest.mark.parametrize("anchor", ["global", "identity", "none"])
def test_every_anchor_gives_rotations(anchor: Any) -> None:
    model = fitting.fit(make_pairs(), CLUSTERING, seed=0, anchor=anchor, temperature=0.1)
    check_federated(model)
    assert (np.linalg.slogdet(model.rotations.astype(np.float64)).sign > 0).all()
    if anchor != "global":
        assert np.array_equal(model.anchor, np.eye(DIM))


def test_legacy_centres_and_fits_alone() -> None:
    found = prepared(compat="legacy")
    rows = found.cluster_of == 1
    x, y = (side[rows].astype(np.float64) for side in (found.queries, found.targets))
    u, _, vt = np.linalg.svd((x - x.mean(0)).T @ (y - y.mean(0)))
    wanted = u @ vt
    wanted[:, -1] *= np.sign(np.linalg.det(wanted))

    fitted = fitting.fit_clusters(found, 1, 2, strength=0.0)[0]

    assert np.abs(fitted - wanted).max() < 1e-6


def test_a_cluster_without_rows_takes_the_anchor() -> None:
    found = prepared()
    emptied = fitting.Prepared(**{**vars(found), "cluster_of": np.zeros_like(found.cluster_of)})
    fitted = fitting.fit_clusters(emptied, 1, 2, strength=1.0)[0]
    assert np.abs(fitted - found.anchor).max() < 1e-6
