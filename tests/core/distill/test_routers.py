from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from core.distill.students._base import build_student
from core.distill.students._routers import ProjectedRouter, restore_router
from core.distill.teachers.rotational import RotationalTeacher
from core.errors import SpecInvalid
from core.specs.students import ROUTER_RANK, NlerpGeodesic, RotorProduct
from core.specs.teachers import Rotational
from tests.core.distill._make import (
    DIM,
    doubled,
    make_model,
    make_student,
    make_teacher,
    shown,
    some_queries,
)

NONE = torch.empty(0)
"""The teacher's weights, which a projected router does not read."""


def exact_weights(queries: torch.Tensor) -> torch.Tensor:
    dense: torch.Tensor = make_teacher().mixture(queries).dense()
    return dense


def test_a_projected_router_of_full_rank_is_exact() -> None:
    router = ProjectedRouter.of(make_teacher(), rank=DIM)
    found = router.log_weights(some_queries()).exp()
    torch.testing.assert_close(found, exact_weights(some_queries()), rtol=0, atol=1e-5)


def test_more_rank_routes_nearer_to_the_teacher() -> None:
    wanted = exact_weights(some_queries())
    apart = [
        float(
            (ProjectedRouter.of(make_teacher(), rank=rank).log_weights(some_queries()).exp())
            .sub(wanted)
            .abs()
            .sum()
        )
        for rank in (2, 6, 11)
    ]
    assert apart[0] > apart[1] > apart[2] > 0


def test_the_projection_keeps_what_an_svd_of_the_keys_keeps() -> None:
    router = ProjectedRouter.of(make_teacher(), rank=5)
    keys = torch.from_numpy(make_model().queries).double()
    kept = torch.linalg.svdvals(keys)[:5].square().sum()
    assert float(router.keys.double().square().sum()) == pytest.approx(float(kept), rel=1e-5)
    eye = router.projection.T @ router.projection
    torch.testing.assert_close(eye, torch.eye(5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("twice", [False, True])
def test_in_training_a_query_does_not_find_itself_nor_its_duplicates(*, twice: bool) -> None:
    model = doubled(make_model()) if twice else make_model()
    teacher = RotationalTeacher(model, Rotational())
    router = ProjectedRouter.of(teacher, rank=DIM)
    queries = torch.from_numpy(model.queries)
    own = torch.from_numpy(teacher.own_rows(model.queries))

    weights, taught = router.training_weights(shown(queries, NONE, own[:, None]))

    wanted = teacher.mixture(queries, exclude_rows=own).dense()
    torch.testing.assert_close(weights, wanted, rtol=0, atol=1e-5)
    assert taught is None
    assert (weights - router.log_weights(queries).exp()).abs().max() > 0.01


@pytest.mark.parametrize("twice", [False, True])
def test_a_made_query_finds_neither_of_its_parents(*, twice: bool) -> None:
    model = doubled(make_model()) if twice else make_model()
    teacher = RotationalTeacher(model, Rotational())
    router = ProjectedRouter.of(teacher, rank=DIM)
    queries = torch.from_numpy(model.queries[:9] + model.queries[1:10])
    parents = torch.stack([torch.arange(9), torch.arange(1, 10)], dim=1)

    weights, _ = router.training_weights(shown(queries, NONE, parents))

    wanted = teacher.mixture(queries, exclude_rows=parents).dense()
    torch.testing.assert_close(weights, wanted, rtol=0, atol=1e-5)
    free, _ = router.training_weights(shown(queries, NONE, torch.full_like(parents, -1)))
    torch.testing.assert_close(free, router.log_weights(queries).exp(), rtol=0, atol=1e-6)
    assert (weights - free).abs().max() > 0.01


@pytest.mark.parametrize("times", [9, 25])
def test_however_often_a_query_stands_there_it_does_not_find_itself(times: int) -> None:
    few = make_model()
    model = replace(
        few,
        queries=np.tile(few.queries, (times, 1)),
        targets=np.tile(few.targets, (times, 1)),
        cluster_of=np.tile(few.cluster_of, times),
    )
    teacher = RotationalTeacher(model, Rotational())
    router = ProjectedRouter.of(teacher, rank=DIM)
    queries, own = torch.from_numpy(few.queries), torch.arange(len(few.queries))

    weights, _ = router.training_weights(shown(queries, NONE, own[:, None]))

    wanted = teacher.mixture(queries, exclude_rows=own).dense()
    torch.testing.assert_close(weights, wanted, rtol=0, atol=1e-5)
    again = restore_router(router.config)
    again.load_state_dict(router.state_dict())
    assert torch.equal(again.training_weights(shown(queries, NONE, own[:, None]))[0], weights)


def test_each_router_has_its_own_option_and_a_stored_spec_comes_back() -> None:
    with pytest.raises(ValidationError, match="router_rank 8 is the projected router's"):
        RotorProduct(router="learnt", router_rank=8)
    with pytest.raises(ValidationError, match="router_hidden 8 is the learnt router's"):
        NlerpGeodesic(router="projected", router_hidden=8)
    for spec in (NlerpGeodesic(), NlerpGeodesic(router_rank=8), NlerpGeodesic(router="exact")):
        assert NlerpGeodesic.model_validate(spec.model_dump(mode="json")) == spec
    built = build_student(NlerpGeodesic(planes=2), make_teacher(), 0)
    assert built.get_buffer("router.projection").shape == (DIM, min(DIM, ROUTER_RANK))


def test_every_blending_student_takes_every_router() -> None:
    for name in ("nlerp_geodesic", "rotor_product", "shared_subspace"):
        for router in ("exact", "projected", "learnt"):
            student = make_student(name, router=router)
            assert student.config["router"]["kind"] == router
            lengths = student(some_queries()).norm(dim=1)
            torch.testing.assert_close(lengths, some_queries().norm(dim=1), rtol=1e-6, atol=0)


def test_an_unknown_router_is_refused() -> None:
    with pytest.raises(SpecInvalid, match="'oracle'; allowed: exact, projected, learnt"):
        restore_router({"kind": "oracle"})


def test_a_training_query_does_not_find_itself_whatever_training_narrows_to() -> None:
    router = ProjectedRouter.of(make_teacher(), rank=DIM)
    queries = torch.from_numpy(make_model().queries)
    own = torch.arange(len(queries))[:, None]
    wanted, _ = router.training_weights(shown(queries, NONE, own))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrowed, _ = router.training_weights(shown(queries, NONE, own))

    torch.testing.assert_close(narrowed, wanted, rtol=0, atol=1e-6)
    assert (wanted - router.log_weights(queries).exp()).abs().max() > 0.05
