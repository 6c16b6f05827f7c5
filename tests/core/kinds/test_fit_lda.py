"""fit_lda makes what the algorithm makes, and refuses what cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from core.distill import lda_fitting
from core.distill.choosing import STRENGTHS
from core.errors import SpecInvalid
from core.kinds import fit_lda
from core.kinds._base import Input
from core.specs.clusterings import Groups, KMeans
from core.tensors.lda import check_lda, load_lda
from tests.core.kinds.world import World, tiny_pairs
from tests.core.tensors._lda import same_arrays


def planned(meta: dict[str, Any] | None = None, **spec: Any) -> dict[str, int]:
    asked = fit_lda.Spec.model_validate({"pairs": "0" * 64, **spec})
    pairs = Input("0" * 64, "pairs", {"rows": 120, "dim": 16, "groups": 4, **(meta or {})})
    stages = fit_lda.stages(asked, {"pairs": pairs})
    assert all(stage.memory_bytes > 0 for stage in stages)
    return {stage.name: stage.chunks for stage in stages}


@pytest.mark.parametrize(
    ("spec", "scored"),
    [
        ({}, 1),
        ({"temperature": 0.03}, 0),
        ({"mode": "maps"}, len(STRENGTHS)),
        ({"mode": "maps", "temperature": 0.1}, len(STRENGTHS)),
        ({"mode": "maps", "strength": 3}, 1),
        ({"mode": "maps", "strength": 3, "temperature": 0.1}, 0),
    ],
)
def test_only_what_is_left_to_choose_is_scored(spec: dict[str, Any], scored: int) -> None:
    assert planned(**spec) == {"prepare": 1, "score": scored, "fit": 1}


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({"strength": 3}, "strength is of maps"),
        ({"split": "cluster"}, "allowed: split 'query', or mode 'maps'"),
        ({"temperature": 0}, "greater than or equal to 0.000001"),
        ({"mode": "maps", "strength": 0}, "greater than or equal to 0.001"),
        ({"mode": "sums"}, "'answers' or 'maps'"),
        ({"test_fraction": 0.95}, "less than 0.9"),
    ],
)
def test_what_cannot_be_is_refused_at_the_door(spec: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        fit_lda.Spec.model_validate({"pairs": "0" * 64, **spec})


def test_groups_are_taken_where_there_are_some_and_needed_where_asked_for() -> None:
    assert planned({"groups": 0}) == {"prepare": 1, "score": 1, "fit": 1}
    with pytest.raises(SpecInvalid, match="allowed for them: kmeans, mst") as caught:
        planned({"groups": 0}, clustering={"method": "groups"})
    assert caught.value.pointer == "/clustering/method"


@pytest.mark.parametrize(
    "spec",
    [
        {"mode": "answers"},
        {"mode": "answers", "temperature": 0.03, "seed": 3},
        {"mode": "maps", "split": "cluster", "test_fraction": 0.3},
        {"mode": "maps", "strength": 2.0, "temperature": 0.1},
    ],
)
def test_a_job_makes_what_the_algorithm_makes(other_world: World, spec: dict[str, Any]) -> None:
    pairs = tiny_pairs()
    reference = other_world.upload(pairs)
    job_id = other_world.submit(kind="fit_lda", pairs=reference, **spec)

    other_world.run()

    assert other_world.job(job_id).state == "succeeded", other_world.job(job_id).error
    model = load_lda(other_world.path(job_id, "model"))
    check_lda(model)
    expected = lda_fitting.fit(pairs, Groups(), **{"seed": 0, **spec})
    same_arrays(model, expected)
    assert model.manifest["pairs"] == reference
    for name, value in expected.manifest.items():
        assert model.manifest[name] == value
    assert sorted(model.cluster_ids) == sorted({"g0", "g1", "g2", "g3"} & set(model.cluster_ids))
    facts = other_world.status(job_id).artifacts
    assert set(facts) == {"model"}


def test_pairs_without_groups_are_clustered(other_world: World) -> None:
    pairs = other_world.upload(replace(tiny_pairs(), groups=None))
    job_id = other_world.submit(kind="fit_lda", pairs=pairs)

    other_world.run()

    model = load_lda(other_world.path(job_id, "model"))
    assert model.manifest["clustering"] == KMeans().model_dump()
    assert model.cluster_ids == [str(number) for number in range(len(model.centroids))]
    rows = np.sort(np.concatenate([model.train_rows, model.held_out_rows]))
    np.testing.assert_array_equal(rows, np.arange(120))


def test_nothing_to_choose_by_is_an_error_that_says_what_to_give(other_world: World) -> None:
    pairs = tiny_pairs(rows=8)
    alone = replace(pairs, groups=[str(row) for row in range(8)])
    job_id = other_world.submit(kind="fit_lda", pairs=other_world.upload(alone))

    other_world.run()

    job = other_world.job(job_id)
    assert job.state == "failed"
    assert "give one, for example 0.05" in str(job.error)
