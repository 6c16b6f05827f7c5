from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from core.distill.teachers._base import BlendingTeacher, Teacher, teachers
from core.distill.teachers.rotational import (
    RotationalTeacher,
    bivector_block,
    bivector_key,
    target_key,
    teacher_fingerprint,
)
from core.errors import DataInvalid
from core.specs.teachers import Rotational
from tests.core.distill._make import DIM, make_model, make_teacher, some_queries

every_teacher = pytest.mark.parametrize("plugin", teachers().values(), ids=teachers().keys())


def build(plugin: Teacher) -> BlendingTeacher:
    return plugin.build(make_model(), plugin.spec(), "cpu", None)


@every_teacher
def test_a_teacher_keeps_lengths_and_says_the_same_twice(plugin: Teacher) -> None:
    teacher, queries = build(plugin), 3 * some_queries()

    answers = teacher.targets(queries)

    torch.testing.assert_close(answers.norm(dim=1), queries.norm(dim=1), rtol=1e-5, atol=0)
    assert torch.equal(answers, teacher.targets(queries))
    assert torch.equal(answers, teacher.blend(queries, teacher.mixture(queries)))
    assert teacher.fingerprint() == build(plugin).fingerprint()


@every_teacher
def test_a_training_query_can_be_left_out_of_its_own_answer(plugin: Teacher) -> None:
    teacher, model = build(plugin), make_model()
    own = torch.arange(len(model.queries))
    without = replace(
        model,
        **{
            name: getattr(model, name)[1:]
            for name in ("queries", "targets", "cluster_of", "train_rows")
        },
    )

    answers = teacher.targets(model.queries, exclude_rows=own)

    other = plugin.build(without, plugin.spec(), "cpu", None)
    torch.testing.assert_close(answers[0], other.targets(model.queries[:1])[0], rtol=0, atol=1e-5)
    assert not torch.allclose(answers, teacher.targets(model.queries), atol=1e-2)


@every_teacher
def test_a_query_not_seen_yet_gets_finite_answers(plugin: Teacher) -> None:
    assert build(plugin).targets(some_queries().numpy()).isfinite().all()


@pytest.mark.parametrize("compat", [None, "legacy"])
def test_answers_are_the_exponential_of_the_blended_logarithms(compat: str | None) -> None:
    spec = Rotational.model_validate({"compat": compat, "dtype": "float64", "tolerance": 1e-12})
    teacher = RotationalTeacher(make_model(), spec)
    queries = some_queries(8).double()
    weights = teacher.mixture(queries).dense()

    answers = teacher.targets(queries)

    for query, weight, answer in zip(queries, weights, answers, strict=True):
        blend = torch.einsum("c,cij->ij", weight, teacher.bivectors).numpy()
        wanted = query.numpy() @ teacher.anchor.numpy() @ expm(blend)
        assert np.abs(answer.numpy() - wanted).max() < 1e-11


def test_float32_answers_are_as_near_as_the_tolerance() -> None:
    exact = RotationalTeacher(
        make_model(), Rotational(dtype="float64", tolerance=1e-12), "cpu"
    ).targets(some_queries())
    error = (make_teacher().targets(some_queries()).double() - exact).norm(dim=1)
    assert error.max() < 3e-6


def test_legacy_blends_the_whole_logarithm_and_says_nearly_the_same() -> None:
    legacy, ours = make_teacher("legacy"), make_teacher()
    assert torch.equal(legacy.anchor, torch.eye(DIM))
    near = torch.linalg.matrix_norm(ours.bivectors, ord=2)
    far = torch.linalg.matrix_norm(legacy.bivectors, ord=2)
    assert (near < far).all()
    cosines = torch.cosine_similarity(legacy.targets(some_queries()), ours.targets(some_queries()))
    assert cosines.min() > 0.99


def test_a_weight_of_one_gives_that_clusters_rotation() -> None:
    model = make_model()
    teacher = RotationalTeacher(model, Rotational(top_k=1))
    queries = some_queries(20)
    clusters = teacher.mixture(queries).dense().argmax(1)

    answers = teacher.targets(queries)

    wanted = torch.einsum("qi,qij->qj", queries, torch.from_numpy(model.rotations)[clusters])
    torch.testing.assert_close(answers, wanted, rtol=0, atol=3e-6)


def test_scales_blend_geometrically() -> None:
    scales = np.array([0.5, 1.0, 2.0, 3.0], dtype=np.float32)
    model = replace(make_model(), scales=scales)
    teacher, queries = RotationalTeacher(model, Rotational()), some_queries()
    wanted = (teacher.mixture(queries).dense() @ torch.from_numpy(np.log(scales))).exp()

    lengths = teacher.targets(queries).norm(dim=1)

    torch.testing.assert_close(lengths, wanted, rtol=1e-5, atol=0)


def test_blocks_of_bivectors_are_the_whole() -> None:
    model, spec = make_model(), Rotational()
    parts = [bivector_block(model, spec, start, start + 2) for start in (0, 2)]
    given = RotationalTeacher(model, spec, "cpu", torch.cat(parts))
    assert torch.equal(given.bivectors, make_teacher().bivectors)
    assert torch.equal(given.bivectors_block(1, 3), make_teacher().bivectors_block(1, 3))
    assert torch.equal(given.targets(some_queries()), make_teacher().targets(some_queries()))


def test_bivectors_of_another_model_are_refused() -> None:
    with pytest.raises(DataInvalid, match=r"bivectors: shape \[3, 12, 12\]"):
        RotationalTeacher(make_model(), Rotational(), "cpu", torch.zeros(3, DIM, DIM))


def test_keys_tell_apart_whatever_changes_the_bytes() -> None:
    model, spec = make_model(), Rotational()
    turned = replace(model, rotations=model.rotations[::-1].copy())
    bivectors = [
        bivector_key(model, spec, 0, 2),
        bivector_key(model, spec, 0, 3),
        bivector_key(model, Rotational(dtype="float64"), 0, 2),
        bivector_key(model, Rotational(compat="legacy"), 0, 2),
        bivector_key(turned, spec, 0, 2),
    ]
    assert len(set(bivectors)) == len(bivectors)
    assert bivectors[0] == bivector_key(model, Rotational(top_k=3, temperature=9), 0, 2)
    changed: list[dict[str, object]] = [
        {},
        {"top_k": 3},
        {"temperature": 0.2},
        {"dtype": "float64"},
        {"tolerance": 1e-3},
        {"compat": "legacy"},
    ]
    prints = [teacher_fingerprint(model, Rotational.model_validate(c)) for c in changed]
    prints.append(teacher_fingerprint(replace(model, queries=model.queries[::-1]), spec))
    assert len(set(prints)) == len(prints)
    queries, rows = some_queries(4).numpy(), np.arange(4)
    targets = [
        target_key(prints[0], queries),
        target_key(prints[1], queries),
        target_key(prints[0], queries[:3]),
        target_key(prints[0], queries.astype(np.float64)),
        target_key(prints[0], queries, rows),
        target_key(prints[0], queries, rows[::-1]),
    ]
    assert len(set(targets)) == len(targets)
    assert all(len(key) == 64 for key in [*bivectors, *prints, *targets])
