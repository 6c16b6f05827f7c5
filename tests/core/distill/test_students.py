from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from core.distill.batches import left_out_answers
from core.distill.students._base import build_student, restore_student, students
from core.distill.students._strang import strang_product
from core.distill.students.rotor_product import RotorProductStudent, orthonormal
from core.distill.teachers.rotational import RotationalTeacher
from core.errors import DataInvalid, SpecInvalid
from core.rotations.planes import rotate_in_planes
from core.specs.codebooks import PrincipalPlanes
from core.specs.students import ROUTER_HIDDEN, RotorProduct
from core.specs.teachers import Rotational
from tests.core.distill._make import (
    CLUSTERS,
    DIM,
    OF_LENGTHS,
    SMALL_STUDENTS,
    make_data,
    make_student,
    make_teacher,
    make_training,
    shown,
    some_queries,
)

PCA = PrincipalPlanes(n_components=4)
every_student = pytest.mark.parametrize("name", students())
every_rotation = pytest.mark.parametrize("name", OF_LENGTHS)


@every_rotation
def test_a_student_keeps_lengths(name: str) -> None:
    queries = some_queries() * torch.linspace(0.1, 10, 50)[:, None]
    lengths = make_student(name)(queries).norm(dim=1)
    torch.testing.assert_close(lengths, queries.norm(dim=1), rtol=1e-6, atol=0)


@every_student
def test_an_empty_batch_is_an_empty_answer(name: str) -> None:
    routed = "router" in SMALL_STUDENTS[name].model_dump()
    for router in ("exact", "projected", "learnt") if routed else (None,):
        student = make_student(name, **({"router": router} if router else {}))
        assert student(torch.zeros(0, DIM)).shape == (0, student.output_dim())
        with torch.no_grad():
            assert student(torch.zeros(0, DIM)).shape == (0, student.output_dim())


@pytest.mark.parametrize("router", ["learnt", "exact"])
def test_the_bare_product_keeps_lengths_to_rounding(router: str) -> None:
    student = make_student("rotor_product", router=router)
    assert isinstance(student, RotorProductStudent)
    bare, lengths = student.product(some_queries()), some_queries().norm(dim=1)
    torch.testing.assert_close(bare.norm(dim=1), lengths, rtol=2e-6, atol=0)
    with torch.no_grad():
        student.bases.mul_(1.01)  # no rotation any more: the final scaling would hide it
    assert (student.product(some_queries()).norm(dim=1) / lengths - 1).abs().max() > 1e-4


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_learnt_router_does_not_see_the_unit_of_the_data(scale: float) -> None:
    model, queries = make_teacher().model, some_queries()
    scaled = replace(
        model,
        queries=model.queries * np.float32(scale),
        centroids=model.centroids * np.float32(scale),
        manifest={**model.manifest, "temperature": model.manifest["temperature"] * scale**2},
    )
    teacher = RotationalTeacher(scaled, Rotational())
    spec = RotorProduct(planes=3, router_hidden=16)
    one, other = build_student(spec, make_teacher(), 0), build_student(spec, teacher, 0)
    for student in (one, other):
        with torch.no_grad():
            for number, value in enumerate(student.get_submodule("router").parameters()):
                noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
                value.add_(noise, alpha=0.5)
    torch.testing.assert_close(other(queries * scale) / scale, one(queries), rtol=0, atol=1e-5)


def test_the_exact_router_has_no_width_and_a_stored_spec_comes_back() -> None:
    with pytest.raises(ValidationError, match="router_hidden 64 is the learnt router's"):
        RotorProduct(router="exact", router_hidden=64)
    for spec in (RotorProduct(router="exact"), RotorProduct(), RotorProduct(router_hidden=64)):
        assert RotorProduct.model_validate(spec.model_dump(mode="json")) == spec
    built = make_student("rotor_product", router_hidden=None)
    assert built.get_parameter("router.up.weight").shape == (ROUTER_HIDDEN, DIM)


@every_student
def test_config_and_state_are_enough_to_come_back(name: str) -> None:
    student = make_student(name)
    again = restore_student(student.config, student.state_dict())
    assert torch.equal(again(some_queries()), student.eval()(some_queries()))


@every_rotation
@pytest.mark.parametrize("length", [1e-15, 1e-9, 1e9, 1e15])
def test_a_query_of_any_stored_length_keeps_it(name: str, length: float) -> None:
    queries = some_queries(6) * length
    found = make_student(name)(queries)
    lengths = [
        np.linalg.norm(rows.detach().numpy().astype(float), axis=1) for rows in (found, queries)
    ]
    np.testing.assert_allclose(lengths[0], lengths[1], rtol=1e-6)


@every_student
def test_a_large_batch_is_its_parts(name: str) -> None:
    student, queries = make_student(name).eval(), some_queries(10_000)
    with torch.no_grad():
        parts = [student(part) for part in queries.split(1000)]
        whole = student(queries)
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(students().keys() - {"hierarchical_router"}))
def test_the_seed_decides_every_random_start(name: str) -> None:
    state = make_student(name, seed=5).state_dict()
    same = make_student(name, seed=5).state_dict()
    other = make_student(name, seed=6).state_dict()
    assert all(torch.equal(state[key], same[key]) for key in state)
    assert any(not torch.equal(state[key], other[key]) for key in state)


@every_student
def test_building_leaves_the_global_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    make_student(name)
    assert torch.equal(before, torch.get_rng_state())


@every_student
def test_a_batch_is_its_rows(name: str) -> None:
    student, queries = make_student(name).eval(), some_queries(6)
    single = torch.cat([student(query[None]) for query in queries])
    torch.testing.assert_close(student(queries), single, rtol=0, atol=1e-6)


@every_student
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    student, generator = make_student(name), torch.Generator().manual_seed(0)
    with torch.no_grad():  # a zero start would hide what lies before it
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    weights = torch.full((50, CLUSTERS), 1 / CLUSTERS)
    routed = student.routed(shown(some_queries(), weights))
    total = routed.vectors[:, 0].sum()
    if routed.decoded is not None:
        total = total + routed.decoded.sum()
    total.backward()
    for key, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in students()),
        ("canonical", {"codebook": PCA, "n_components": None}),
        ("canonical", {"compat": "legacy"}),
    ],
)
def test_what_is_trained_is_what_is_used(name: str, changes: dict[str, object]) -> None:
    """The rows that a batch brings along start where ``forward`` starts by itself."""
    student, data = make_student(name, **changes).eval(), make_data(make_training(), name)
    rows = data.validation
    if "compat" in changes:
        torch.nn.init.constant_(student.get_parameter("scale"), 2.0)
    torch.testing.assert_close(
        left_out_answers(student, data, rows),
        student(data.real.queries[rows]).detach(),
        rtol=0,
        atol=1e-6,
    )


def test_an_unknown_or_broken_student_is_refused() -> None:
    student = make_student("canonical")
    with pytest.raises(DataInvalid, match="'sphinx'; allowed: canonical"):
        restore_student({"name": "sphinx"}, {})
    with pytest.raises(DataInvalid, match="does not fit its config"):
        restore_student(student.config, {})
    for name in students():
        with pytest.raises(DataInvalid, match="config"):
            restore_student({"name": name}, {})


def test_canonical_refuses_more_planes_than_there_are_and_odd_heads() -> None:
    with pytest.raises(SpecInvalid, match="n_components 7; width 12 has 6 planes"):
        make_student("canonical", n_components=7)
    with pytest.raises(SpecInvalid, match="heads 5 does not divide"):
        make_student("canonical", heads=5)


def test_canonical_stays_near_the_identity_whatever_it_learns() -> None:
    student = make_student("canonical", n_components=6, layers=1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(100)
    cosines = torch.cosine_similarity(student(some_queries()), some_queries())
    assert cosines.min() >= torch.tensor(1.0).cos() - 1e-6


def test_untrained_with_exact_router_and_all_planes_is_the_teacher_to_the_splitting() -> None:
    student = make_student("rotor_product", router="exact", planes=None)
    wanted = make_teacher().targets(some_queries())
    cosines = torch.cosine_similarity(student(some_queries()).double(), wanted.double())
    assert cosines.min() > 0.9995


def test_fewer_planes_lose_the_smallest_angles_first() -> None:
    wanted = make_teacher().targets(some_queries()).double()
    cosines = [
        torch.cosine_similarity(
            make_student("rotor_product", router="exact", planes=planes)(some_queries()).double(),
            wanted,
        ).mean()
        for planes in (1, 3, 6)
    ]
    assert cosines[0] < cosines[1] < cosines[2]


def factors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, dtype=dtype, generator=generator)
    weights = torch.rand(5, 3, dtype=dtype, generator=generator)
    bases = torch.linalg.qr(torch.randn(3, 8, 4, dtype=dtype, generator=generator)).Q
    angles = torch.rand(3, 2, dtype=dtype, generator=generator)
    return x, weights, bases, angles


def test_the_product_is_plane_rotations_forth_and_back() -> None:
    x, weights, bases, angles = factors()
    wanted = x
    for c in (0, 1, 2, 2, 1, 0):
        paired = bases[c][:, [0, 2, 1, 3]]  # rotate_in_planes wants a plane's columns together
        wanted = rotate_in_planes(wanted, paired, weights[:, c, None] * angles[c] / 2)

    with torch.no_grad():
        plain = strang_product(x, weights, bases, angles)

    torch.testing.assert_close(plain, wanted)
    torch.testing.assert_close(strang_product(x, weights, bases, angles), wanted)


def test_skipping_zero_weights_changes_nothing() -> None:
    x, weights, bases, angles = factors()
    weights = weights * torch.eye(3, dtype=weights.dtype)[[0, 1, 2, 0, 0]]

    with torch.no_grad():
        sparse = strang_product(x, weights, bases, angles)

    torch.testing.assert_close(sparse, strang_product(x, weights, bases, angles))


def test_the_gradient_by_hand_is_the_gradient() -> None:
    inputs = [tensor.requires_grad_() for tensor in factors()]
    assert torch.autograd.gradcheck(strang_product, inputs)


def test_retraction_keeps_orthonormal_planes_and_mends_others() -> None:
    bases = factors()[2]
    moved = bases + 0.01 * torch.randn(bases.shape, dtype=bases.dtype)
    q, r = torch.linalg.qr(moved)
    torch.testing.assert_close(
        orthonormal(moved), q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    )
    torch.testing.assert_close(orthonormal(bases), bases)


def test_frozen_planes_are_not_trained() -> None:
    student = make_student("rotor_product", train_planes=False)
    assert isinstance(student, RotorProductStudent)
    names = {name for name, value in student.named_parameters() if value.requires_grad}
    assert names == {f"router.{name}" for name, _ in student.router.named_parameters()}
    assert len(names) == 5
    assert student.gentle() == []
    assert student.bases.shape == (CLUSTERS, DIM, 6)
