from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.linalg import expm
from torch import Tensor

from core.distill.clustering import centroids
from core.distill.routing import EqualRows
from core.distill.teachers._base import Bivectors, Teacher, TeacherModel, teachers
from core.distill.teachers._federated import fingerprint
from core.distill.teachers._keys import target_key
from core.distill.teachers._logs import bivector_block, bivector_key
from core.distill.teachers.rotational import RotationalTeacher
from core.errors import DataInvalid
from core.rotations.action import spectral_norms
from core.specs.teachers import Rotational
from core.tensors.formats import Federated
from tests.core.distill._make import (
    DIM,
    OF_ROTATIONS,
    make_any_teacher,
    make_model,
    make_teacher,
    rotation,
    some_queries,
)

SUBSPACE = {"orthogonal"}
"""Teachers that cannot turn outside the planes they were given."""

every_teacher = pytest.mark.parametrize(
    "plugin", [teachers()[name] for name in OF_ROTATIONS], ids=OF_ROTATIONS
)


def build(plugin: Teacher, model: Federated | None = None) -> TeacherModel:
    return make_any_teacher(plugin.spec.model_fields["name"].default, model)


def answerable(teacher: TeacherModel) -> Tensor:
    """Queries the teacher answers: new ones of length 3, or stored ones."""
    return 3 * some_queries() if teacher.answers_new else torch.from_numpy(make_model().queries)


def teacher_fingerprint(model: Federated, spec: Rotational) -> str:
    return fingerprint(RotationalTeacher, model, spec)


@every_teacher
def test_a_teacher_keeps_lengths_and_says_the_same_twice(plugin: Teacher) -> None:
    teacher = build(plugin)
    queries = answerable(teacher)

    answers = teacher.targets(queries)

    torch.testing.assert_close(answers.norm(dim=1), queries.norm(dim=1), rtol=1e-5, atol=0)
    assert torch.equal(answers, teacher.targets(queries))
    said = teacher.answers(queries)
    assert torch.equal(answers, said.vectors)
    assert said.mixture is not None
    assert torch.equal(said.mixture.dense(), teacher.mixture(queries).dense())
    assert teacher.fingerprint() == build(plugin).fingerprint()


@every_teacher
def test_weights_are_convex(plugin: Teacher) -> None:
    weights = build(plugin).mixture(some_queries()).dense()
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("jax_there")
def test_no_two_teachers_have_the_same_name_in_the_cache() -> None:
    prints = [build(plugin).fingerprint() for plugin in teachers().values()]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("name", sorted(set(OF_ROTATIONS) - SUBSPACE))
def test_a_rotation_of_the_queries_is_all_that_a_teacher_adds(name: str) -> None:
    """Row convention: y = q @ W. One W for all clusters: who turns the other way is found out."""
    plugin, model = teachers()[name], make_model()
    turn = rotation(np.random.default_rng(3), 0.2).astype(np.float32)
    same = replace(
        model,
        rotations=np.stack([turn] * len(model.rotations)),
        anchor=np.eye(DIM, dtype=np.float32),
        targets=model.queries @ turn,
    )
    teacher = build(plugin, same)
    queries = answerable(teacher)
    wanted = queries @ torch.from_numpy(turn)
    torch.testing.assert_close(teacher.targets(queries), wanted, rtol=0, atol=1e-5)


@every_teacher
def test_a_training_query_can_be_left_out_of_its_own_answer(plugin: Teacher) -> None:
    teacher, model = build(plugin), make_model()
    own = torch.arange(len(model.queries))
    names = ("queries", "targets", "cluster_of", "train_rows")
    without = replace(model, **{name: getattr(model, name)[1:] for name in names})
    means = centroids(without.queries, without.cluster_of, len(model.rotations))
    without = replace(without, centroids=means)

    said = teacher.answers(model.queries, exclude_rows=own)

    other = build(plugin, without)
    assert said.mixture is not None
    weights = said.mixture.dense()
    alone = other.mixture(model.queries[:1]).dense()
    torch.testing.assert_close(weights[:1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(weights, teacher.mixture(model.queries).dense(), atol=1e-2)
    if teacher.answers_new and plugin.spec.model_fields["name"].default not in SUBSPACE:
        wanted = other.targets(model.queries[:1])[0]  # planes weigh clusters by their queries
        torch.testing.assert_close(said.vectors[0], wanted, rtol=0, atol=1e-5)


@every_teacher
def test_duplicates_of_a_training_query_are_left_out_with_it(plugin: Teacher) -> None:
    model = make_model()
    names = ("queries", "targets", "cluster_of", "train_rows")
    twice = replace(model, **{name: np.concatenate([getattr(model, name)] * 2) for name in names})
    teacher = build(plugin, twice)
    once, rows = model.queries[:5], np.arange(5)

    assert np.array_equal(teacher.own_rows(once), rows)
    assert teacher.own_rows(-once).tolist() == [-1] * 5
    for exclude in (rows, rows + len(model.queries)):
        weights = teacher.mixture(once, exclude_rows=torch.from_numpy(exclude)).dense()
        alone = build(plugin).mixture(once, exclude_rows=torch.from_numpy(rows)).dense()
        assert ((weights > 0) <= (alone > 0)).all()
        assert torch.equal(
            teacher.targets(once, exclude_rows=torch.from_numpy(exclude)),
            teacher.targets(once, exclude_rows=torch.from_numpy(rows)),
        )


@every_teacher
def test_the_model_is_hashed_once(plugin: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = build(plugin)
    first = teacher.fingerprint(), teacher.own_rows(make_model().queries).tolist()
    monkeypatch.setattr("hashlib.sha256", None)
    monkeypatch.setattr(EqualRows, "among", None)
    assert (teacher.fingerprint(), teacher.own_rows(make_model().queries).tolist()) == first


@every_teacher
def test_a_query_not_seen_yet_gets_finite_answers(plugin: Teacher) -> None:
    teacher = build(plugin)
    if teacher.answers_new:
        assert teacher.targets(some_queries().numpy()).isfinite().all()
        return
    with pytest.raises(DataInvalid, match="row 0 is not stored"):
        teacher.targets(some_queries())


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
        if int((weight > 0).sum()) == 1:  # then W itself, which float32 made not quite orthogonal
            wanted = query.numpy() @ teacher.model.rotations[int(weight.argmax())]
        assert np.abs(answer.numpy() - wanted).max() < 1e-11


@pytest.mark.parametrize("compat", [None, "legacy"])
def test_float32_answers_are_as_near_as_the_tolerance(compat: str | None) -> None:
    queries = some_queries(500)
    spec = Rotational.model_validate({"compat": compat, "dtype": "float64", "tolerance": 1e-12})
    teacher = make_teacher(compat)
    mixture = teacher.mixture(queries)
    exact = RotationalTeacher(make_model(), spec).blend(
        queries, replace(mixture, weights=mixture.weights.double())
    )
    error = (teacher.blend(queries, mixture).double() - exact).norm(dim=1)
    assert error.max() <= teacher.spec.tolerance


def test_a_tolerance_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"tolerance 1e-07 with dtype 'float32'; allowed"):
        Rotational(tolerance=1e-7)
    assert Rotational(tolerance=1e-7, dtype="float64").tolerance == 1e-7


def test_top_k_is_the_models_own_unless_told() -> None:
    model = make_model()
    own = replace(model, manifest={**model.manifest, "top_k": 3})
    imported = replace(model, manifest={"temperature": 0.1})

    assert RotationalTeacher(own, Rotational()).top_k == 3
    assert RotationalTeacher(own, Rotational(top_k=7)).top_k == 7
    assert RotationalTeacher(imported, Rotational()).top_k == 10
    resolved = [teacher_fingerprint(own, Rotational(top_k=k)) for k in (None, 3, 7)]
    assert resolved[0] == resolved[1] != resolved[2]
    with pytest.raises(DataInvalid, match="top_k: 'all' in the manifest"):
        RotationalTeacher(replace(model, manifest={**own.manifest, "top_k": "all"}), Rotational())


def test_legacy_blends_the_whole_logarithm_and_says_nearly_the_same() -> None:
    legacy, ours = make_teacher("legacy"), make_teacher()
    assert torch.equal(legacy.anchor, torch.eye(DIM))
    near = torch.linalg.matrix_norm(ours.bivectors, ord=2)
    far = torch.linalg.matrix_norm(legacy.bivectors, ord=2)
    assert (near < far).all()
    cosines = torch.cosine_similarity(legacy.targets(some_queries()), ours.targets(some_queries()))
    assert cosines.min() > 0.99


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("compat", [None, "legacy"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_query_with_one_cluster_is_exactly_its_matrix(
    compat: str | None, dtype: str, top_k: int
) -> None:
    scales = np.array([0.5, 1.0, 2.0, 3.0], dtype=np.float32)
    model = replace(make_model(), scales=scales)
    teacher = RotationalTeacher(
        model, Rotational.model_validate({"compat": compat, "dtype": dtype, "top_k": top_k})
    )
    queries = some_queries(20).to(getattr(torch, dtype))
    weights = teacher.mixture(queries).dense()
    single = (weights > 0).sum(1) == 1

    answers = teacher.targets(queries)

    assert single.any()
    for row in single.nonzero().flatten().tolist():
        c = int(weights[row].argmax())
        rotated = queries[row : row + 1] @ torch.from_numpy(model.rotations[c]).to(queries)
        torch.testing.assert_close(
            answers[row] / float(scales[c]), rotated[0], rtol=0, atol=torch.finfo(queries.dtype).eps
        )


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
    values, norms = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("values", "norms")
    )
    given = RotationalTeacher(model, spec, "cpu", Bivectors(values, norms))
    assert torch.equal(given.bivectors, make_teacher().bivectors)
    assert torch.equal(given.targets(some_queries()), make_teacher().targets(some_queries()))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norms_come_with_the_bivectors_and_bound_them_closely(dtype: str) -> None:
    block = bivector_block(make_model(), Rotational.model_validate({"dtype": dtype}), 0, 4)
    exact = spectral_norms(block.values)
    assert (block.norms >= exact * (1 - 2e-9)).all()
    assert (block.norms <= exact * (1 + 2e-6)).all()


@pytest.mark.parametrize(
    ("given", "message"), [((3, 4), r"bivectors: shape \[3, 12, 12\]"), ((4, 3), "norms of biv")]
)
def test_bivectors_of_another_model_are_refused(given: tuple[int, int], message: str) -> None:
    bivectors = Bivectors(torch.zeros(given[0], DIM, DIM), torch.zeros(given[1]))
    with pytest.raises(DataInvalid, match=message):
        RotationalTeacher(make_model(), Rotational(), "cpu", bivectors)


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
    cpu, first = {"device": "cpu"}, prints[0]
    targets = [
        target_key(first, queries, **cpu),
        target_key(prints[1], queries, **cpu),
        target_key(first, queries[:3], **cpu),
        target_key(first, queries.astype(np.float64), **cpu),
        target_key(first, queries, rows, **cpu),
        target_key(first, queries, rows[::-1], **cpu),
        target_key(first, queries, rows, device="cuda:0"),
    ]
    assert targets[-1] == target_key(first, queries, rows, device="cuda:1")
    assert len(set(targets)) == len(targets)
    assert all(len(key) == 64 for key in [*bivectors, *prints, *targets])
