from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from core.distill import choosing, fitting
from core.distill.teachers.rotational import RotationalTeacher
from core.errors import DataInvalid, SpecInvalid
from core.kinds.fit_federated import Spec
from core.rotations.procrustes import procrustes
from core.specs.clusterings import KMeans
from core.specs.teachers import Rotational
from core.tensors.formats import Pairs, check_federated
from tests.core.distill._make import DIM, make_model, make_pairs

CLUSTERING = KMeans(max_clusters=4)


def prepared(**changes: Any) -> fitting.Prepared:
    values: dict[str, Any] = {"seed": 0, "test_fraction": 0.2, **changes}
    return fitting.prepare(make_pairs(), CLUSTERING, **values)


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
    fitted = fitting.fit_clusters(found, 0, found.clusters, strength=choosing.STRENGTHS[-1])
    assert np.abs(fitted - found.anchor).max() < 1e-4


def test_a_fitted_model_is_valid_and_beats_the_global_rotation_on_its_own_hidden_rows() -> None:
    model = fitting.fit(make_pairs(), CLUSTERING, seed=0)

    check_federated(model)
    scores = [choosing.Score(**score) for score in model.manifest["scores"]]
    assert len(scores) == len(choosing.STRENGTHS) * len(choosing.TEMPERATURES)
    best = choosing.choose(scores)
    assert (best.strength, best.temperature) == (
        model.manifest["strength"],
        model.manifest["temperature"],
    )
    assert best.strength < choosing.STRENGTHS[-1]
    assert best.log_score > max(s.log_score for s in scores if s.strength == choosing.STRENGTHS[-1])


def test_fitting_twice_gives_the_same_bytes() -> None:
    again = fitting.fit(make_pairs(), CLUSTERING, seed=0, strength=3.0, temperature=0.1)
    assert again.rotations.tobytes() == make_model().rotations.tobytes()
    assert again.manifest == make_model().manifest


def test_nothing_held_out_is_looked_at() -> None:
    found = prepared()
    pairs = make_pairs()
    held_out = found.held_out_rows
    targets, queries = pairs.targets.copy(), pairs.queries.copy()
    targets[held_out] = targets[held_out][::-1]
    # np.unique numbers queries in order: moving the last column alone keeps the split.
    queries[held_out, -1] += 0.3
    other = Pairs(pairs.ids, queries, targets, pairs.groups)

    again = fitting.fit(other, CLUSTERING, seed=0)

    assert np.array_equal(again.held_out_rows, held_out)
    whole = fitting.fit(pairs, CLUSTERING, seed=0)
    assert again.manifest == whole.manifest  # strength, temperature and every score
    assert len(whole.manifest["scores"]) > 1
    for name in ("rotations", "anchor", "centroids", "queries", "targets", "cluster_of"):
        assert np.array_equal(getattr(again, name), getattr(whole, name)), name


def test_scores_that_are_no_numbers_choose_nothing() -> None:
    good = choosing.Score(1.0, 0.1, -2.0, 0.5, 0.9)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(DataInvalid, match="log score of strength 3"):
            choosing.choose([good, replace(good, strength=3.0, log_score=bad)])


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_an_answer_without_direction_is_refused_before_it_is_scored(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(turned: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        answers = turned.clone()
        answers[1] = bad
        return answers

    monkeypatch.setattr(fitting, "exp_action", broken)
    with pytest.raises(DataInvalid, match="strength 3 and temperature"):
        fitting.score(prepared(), 3.0, (0.1,), seed=0)


def test_a_choice_at_the_end_of_what_was_tried_is_said() -> None:
    def said(strength: float, temperature: float) -> str:
        scores = [
            vars(choosing.Score(s, t, -1.0, 0.5, 0.9))
            for s in (1.0, 3.0, 1e6)
            for t in (0.1, 0.5, 2)
        ]
        chosen = {"scores": scores, "strength": strength, "temperature": temperature}
        return " ".join(choosing.edges(chosen))

    assert said(3.0, 0.5) == ""
    assert said(1e6, 0.5) == "", "the anchor itself: nothing is stronger"
    assert "strength chosen, 1, is the smallest of the 3" in said(1.0, 0.5)
    assert "temperature chosen, 2, is the largest of the 3" in said(3.0, 2.0)
    assert choosing.edges({"scores": [], "strength": 3.0, "temperature": 0.1}) == []
    assert choosing.edges({"temperature": 0.1}) == [], "an imported model tells nothing"


def test_legacy_has_no_anchor_to_name() -> None:
    told = {"pairs": "0" * 64, "compat": "legacy"}
    with pytest.raises(ValidationError, match="compat 'legacy' has no anchor"):
        Spec.model_validate({**told, "anchor": "identity"})
    for anchor in ({}, {"anchor": "none"}):
        spec = Spec.model_validate({**told, **anchor})
        assert Spec.model_validate(spec.model_dump(mode="json")) == spec


def test_as_many_strengths_are_planned_as_are_tried() -> None:
    spec = Spec.model_validate({"pairs": "0" * 64})
    assert spec.scored() == len(choosing.STRENGTHS)


def test_top_k_is_in_force_while_choosing_and_kept() -> None:
    narrow, wide = prepared(top_k=1), prepared()
    assert narrow.facts["top_k"] == 1
    scores = [fitting.score(found, 3.0, (0.5,), seed=0)[0] for found in (narrow, wide)]
    assert scores[0].log_score != scores[1].log_score
    model = fitting.fit(make_pairs(), CLUSTERING, seed=0, strength=3.0, temperature=0.5, top_k=1)
    assert model.manifest["top_k"] == 1
    check_federated(model)
    assert RotationalTeacher(model, Rotational()).top_k == 1
    assert RotationalTeacher(model, Rotational(top_k=3)).top_k == 3


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
