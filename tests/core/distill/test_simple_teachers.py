"""What is special to the teachers beside rotational, each against a float64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.distill.clustering import centroids
from core.distill.combining import combine
from core.distill.teachers._base import Teacher, TeacherModel, teachers
from core.errors import DataInvalid
from core.tensors.formats import Federated, Pairs, check_federated
from core.tensors.shards import Array
from tests.core.distill._make import (
    DIM,
    make_any_teacher,
    make_model,
    make_teacher,
    rotation,
    some_queries,
)

SCALES = np.array([0.5, 1.0, 2.0, 3.0], dtype=np.float32)


def build(name: str, model: Federated | None = None, **told: Any) -> TeacherModel:
    plugin: Teacher = teachers()[name]
    return plugin.build(model or make_model(), plugin.spec.model_validate(told), "cpu", None)


def linear(teacher: TeacherModel, queries: Array, weights: Array) -> Array:
    """sum_c w_c s_c q W_c in float64, one query at a time."""
    maps = teacher.model.scales[:, None, None] * teacher.model.rotations.astype(np.float64)
    rows: Array = np.stack(
        [q @ np.tensordot(w, maps, 1) for q, w in zip(queries, weights, strict=True)]
    )
    return rows


def wide(tensor: Tensor) -> Array:
    array: Array = tensor.double().numpy()
    return array


@pytest.mark.parametrize("name", ["direct", "weighted_baseline"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_linear_blend_is_the_weighed_sum_of_the_clusters_answers(name: str, scaled: bool) -> None:  # noqa: FBT001
    model = replace(make_model(), scales=SCALES) if scaled else make_model()
    queries = some_queries()
    legacy, ours = (build(name, model, compat=compat) for compat in ("legacy", None))
    weights = wide(legacy.mixture(queries).dense())
    wanted = linear(legacy, wide(queries), weights)

    np.testing.assert_allclose(wide(legacy.targets(queries)), wanted, atol=2e-6)

    answers = wide(ours.targets(queries))
    units = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    length = np.exp(weights @ np.log(model.scales.astype(np.float64)))
    np.testing.assert_allclose(answers, units * length[:, None], atol=4e-6)
    if not scaled:  # rotations that disagree make the plain sum shorter
        assert (np.linalg.norm(wanted, axis=1) < 1 - 1e-4).any()


def test_direct_top1_is_the_map_of_the_heaviest_cluster() -> None:
    teacher, queries = build("direct", blend="top1"), some_queries()
    best = build("direct").mixture(queries).dense().argmax(dim=1).tolist()
    wanted = torch.stack(
        [
            query @ torch.from_numpy(make_model().rotations[c])
            for query, c in zip(queries, best, strict=True)
        ]
    )
    torch.testing.assert_close(teacher.targets(queries), wanted, rtol=0, atol=1e-6)
    assert set(teacher.mixture(queries).dense().unique().tolist()) == {0.0, 1.0}


def test_rotations_that_cancel_leave_zero_and_no_nan() -> None:
    model = make_model()
    back = np.diag([-1.0] * DIM).astype(np.float32)
    turns = np.stack([np.eye(DIM, dtype=np.float32), back] * 2)
    teacher = build(
        "weighted_baseline",
        replace(model, rotations=turns, centroids=np.ones_like(model.centroids)),
    )
    assert teacher.targets(some_queries()).abs().max() < 1e-6


def test_centroids_weigh_by_the_inner_product() -> None:
    queries = some_queries()
    teacher = build("weighted_baseline", temperature=0.3)
    logits = wide(queries) @ make_model().centroids.astype(np.float64).T / 0.3
    wanted = np.exp(logits - logits.max(axis=1, keepdims=True))
    wanted /= wanted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(wide(teacher.mixture(queries).dense()), wanted, atol=1e-6)


def test_an_excluded_query_leaves_its_centroid_with_all_its_duplicates() -> None:
    model = make_model()
    queries = model.queries.copy()
    twins = np.array([0, 5, int(np.flatnonzero(model.cluster_of != model.cluster_of[0])[0])])
    queries[twins] = queries[0]
    means = centroids(queries, model.cluster_of, len(model.rotations))
    teacher = build("weighted_baseline", replace(model, queries=queries, centroids=means))
    left = np.setdiff1d(np.arange(len(queries)), twins)
    without = centroids(queries[left], model.cluster_of[left], len(model.rotations))
    other = build("weighted_baseline", replace(model, queries=queries, centroids=without))

    weights = teacher.mixture(queries[:1], exclude_rows=torch.tensor([5])).dense()

    torch.testing.assert_close(weights, other.mixture(queries[:1]).dense(), rtol=0, atol=1e-6)
    same = teacher.mixture(queries[:1], exclude_rows=torch.tensor([[0, 5, -1]])).dense()
    torch.testing.assert_close(weights, same, rtol=0, atol=1e-7)


def test_a_stored_centroid_keeps_its_length_when_a_query_is_left_out() -> None:
    """An imported model may hold normalised centroids: leaving one out must not let it back in."""
    model = make_model()
    units = model.centroids / np.linalg.norm(model.centroids, axis=1, keepdims=True)
    teacher = build("weighted_baseline", replace(model, centroids=units))
    left = np.arange(1, len(model.queries))
    means = centroids(model.queries[left], model.cluster_of[left], len(model.rotations))
    whole = centroids(model.queries, model.cluster_of, len(model.rotations))
    honest = means / np.linalg.norm(whole, axis=1, keepdims=True)
    other = build("weighted_baseline", replace(model, centroids=honest))

    weights = teacher.mixture(model.queries[:1], exclude_rows=torch.tensor([0])).dense()

    torch.testing.assert_close(weights, other.mixture(model.queries[:1]).dense(), rtol=0, atol=1e-6)


def test_a_cluster_that_loses_all_its_rows_weighs_nothing() -> None:
    model = make_model()
    alone = np.where(np.arange(len(model.queries)) == 3, 0, 1 + model.cluster_of % 3)
    teacher = build("weighted_baseline", replace(model, cluster_of=alone))
    weights = teacher.mixture(model.queries[3:4], exclude_rows=torch.tensor([3])).dense()
    assert weights[0, 0] == 0
    alone = build("weighted_baseline", one_row(model))
    with pytest.raises(DataInvalid, match="excludes all 1 training queries"):
        alone.mixture(model.queries[:1], exclude_rows=torch.tensor([0]))


def one_row(model: Federated) -> Federated:
    """The model cut to its first training query and one cluster."""
    names = ("queries", "targets", "rotations", "scales", "centroids")
    cut = {name: getattr(model, name)[:1] for name in names}
    zero = np.zeros(1, np.int64)
    return replace(model, **cut, cluster_of=zero, train_rows=zero, held_out_rows=zero[:0])


def test_paired_answers_what_is_stored_and_the_mean_where_it_is_stored_twice() -> None:
    model = make_model()
    queries = model.queries.copy()
    queries[4] = queries[9]
    teacher = build("paired", replace(model, queries=queries))

    answers = wide(teacher.targets(queries[:10]))

    both = (model.targets[4].astype(np.float64) + model.targets[9]) / 2
    np.testing.assert_allclose(answers[4], both, atol=1e-7)
    np.testing.assert_allclose(answers[:4], model.targets[:4], atol=1e-7)
    with pytest.raises(DataInvalid, match=r"row 1 is not stored \(1 of 2 are not\)"):
        teacher.targets(np.stack([queries[0], -queries[0]]))


def test_paired_knows_other_pairs_when_told_and_is_another_teacher_then() -> None:
    fresh = some_queries(5).numpy()
    pairs = Pairs(ids=list("abcde"), queries=fresh, targets=fresh[::-1].copy())
    teacher = build("paired")

    knowing = teacher.knowing(pairs)

    np.testing.assert_allclose(wide(knowing.targets(fresh)), fresh[::-1], atol=1e-7)
    assert knowing.fingerprint() != teacher.fingerprint()
    assert torch.equal(knowing.targets(make_model().queries), teacher.targets(make_model().queries))
    narrow = Pairs(ids=["a"], queries=fresh[:1, :4], targets=fresh[:1, :4])
    with pytest.raises(DataInvalid, match="pairs have 4 dimensions, the model 12"):
        teacher.knowing(narrow)
    computing = make_teacher()
    assert computing.knowing(pairs) is computing


def two_sources() -> tuple[Federated, Federated, Federated]:
    """Two models of different clusters, rows, anchors and temperatures, and their combination."""
    first = make_model()
    turn = rotation(np.random.default_rng(5), 0.05)
    kept = np.flatnonzero(first.cluster_of < 2)[10:]
    second = replace(
        first,
        rotations=(first.rotations[:2] @ turn).astype(np.float32),
        scales=first.scales[:2],
        anchor=(first.anchor @ turn).astype(np.float32),
        centroids=first.centroids[:2],
        queries=first.queries[kept] + np.float32(0.01),
        targets=first.targets[kept],
        cluster_of=first.cluster_of[kept],
        train_rows=np.arange(len(kept)),
        held_out_rows=np.zeros(0, np.int64),
        manifest={"temperature": 0.3, "top_k": 4, "pairs": None},
    )
    both = combine({"a" * 64: first, "b" * 64: second})
    check_federated(both)
    return first, second, both


def test_one_source_is_the_rotational_teacher() -> None:
    queries = some_queries()
    torch.testing.assert_close(
        build("multi_source").targets(queries), make_teacher().targets(queries), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("weighing", ["similarity", "equal"])
@pytest.mark.parametrize("leave_out", [False, True])
def test_each_source_routes_inside_itself(weighing: str, leave_out: bool) -> None:  # noqa: FBT001
    first, second, both = two_sources()
    queries = torch.from_numpy(first.queries[20:40]) if leave_out else some_queries()
    own = torch.arange(20, 40) if leave_out else None
    parts = [build("rotational", first).mixture(queries, exclude_rows=own).dense(),
             build("rotational", second).mixture(queries).dense()]  # fmt: skip
    near = []
    for model, rows in ((first, own), (second, None)):
        scores = wide(queries) @ model.queries.astype(np.float64).T
        if rows is not None:
            scores[np.arange(20), rows] = -np.inf
        near.append(scores.max(axis=1))
    mean = (float(first.manifest["temperature"]) + 0.3) / 2
    sharp = np.exp((np.stack(near, 1) - np.max(near, axis=0)[:, None]) / mean)
    shares = (
        sharp / sharp.sum(1, keepdims=True)
        if weighing == "similarity"
        else np.full((len(queries), 2), 0.5)
    )
    wanted = np.concatenate([wide(p) * s[:, None] for p, s in zip(parts, shares.T, strict=True)], 1)

    teacher = build("multi_source", both, source_weights=weighing)
    found = teacher.mixture(queries, exclude_rows=own).dense()

    np.testing.assert_allclose(wide(found), wanted, atol=2e-6)
    torch.testing.assert_close(
        teacher.targets(queries).norm(dim=1), queries.norm(dim=1), rtol=1e-5, atol=0
    )


def test_a_query_that_a_source_holds_twice_is_left_out_of_every_source() -> None:
    first = make_model()
    both = combine({"a" * 64: first, "b" * 64: first})
    teacher = build("multi_source", both, top_k=1)
    found = teacher.mixture(first.queries[:5], exclude_rows=torch.arange(5)).dense()
    alone = build("rotational", first, top_k=1).mixture(
        first.queries[:5], exclude_rows=torch.arange(5)
    )
    halves = torch.cat([alone.dense(), alone.dense()], dim=1) / 2
    torch.testing.assert_close(found, halves, rtol=0, atol=1e-6)
    small = one_row(first)
    mixed = build("multi_source", combine({"a" * 64: small, "b" * 64: first}))
    weights = mixed.mixture(first.queries[:1], exclude_rows=torch.tensor([0])).dense()
    assert weights[0, 0] == 0, "a source that is wholly excluded weighs nothing"
    assert weights.isfinite().all()
    twice = build("multi_source", combine({"a" * 64: small, "b" * 64: small}))
    with pytest.raises(DataInvalid, match="excludes all 2 training queries"):
        twice.mixture(first.queries[:1], exclude_rows=torch.tensor([1]))


def test_combining_keeps_every_cluster_and_refuses_what_does_not_fit() -> None:
    first, second, both = two_sources()
    assert np.array_equal(both.rotations[: len(first.rotations)], first.rotations)
    assert np.array_equal(both.rotations[len(first.rotations) :], second.rotations)
    assert np.linalg.det(both.anchor.astype(np.float64)) == pytest.approx(1)
    far = [np.abs(both.anchor - model.anchor).max() for model in (first, second)]
    assert max(far) < np.abs(first.anchor - second.anchor).max()
    with pytest.raises(DataInvalid, match="is itself a combination"):
        combine({"a" * 64: both, "b" * 64: second})
    narrow = replace(second, rotations=second.rotations[:, :4, :4])
    with pytest.raises(DataInvalid, match="widths differ"):
        combine({"a" * 64: first, "b" * 64: narrow})
    wrong = replace(both, manifest={**both.manifest, "sources": both.manifest["sources"][:1]})
    with pytest.raises(DataInvalid, match="sources have 4 clusters in all; needed 6"):
        check_federated(wrong)
    sizes = len(second.queries), len(first.queries)
    sources = zip(both.manifest["sources"], sizes, strict=True)
    swapped = [{**source, "rows": rows} for source, rows in sources]
    wrong = replace(both, manifest={**both.manifest, "sources": swapped})
    with pytest.raises(DataInvalid, match="must belong to clusters 4 to 5 of their source"):
        check_federated(wrong)


def test_what_sources_are_called_does_not_name_their_answers() -> None:
    first, second, both = two_sources()
    renamed = combine({"c" * 64: first, "d" * 64: second})
    assert build("multi_source", renamed).fingerprint() == build("multi_source", both).fingerprint()
    warmer = replace(second, manifest={**second.manifest, "temperature": 0.4})
    other = combine({"a" * 64: first, "b" * 64: warmer})
    assert build("multi_source", other).fingerprint() != build("multi_source", both).fingerprint()


@pytest.mark.usefixtures("jax_there")
def test_every_teacher_answers_for_a_student_trained_on_it() -> None:
    """Answers and weights come together, leave one out, for every row a student trains on."""
    for name in teachers():
        teacher = make_any_teacher(name)
        own = torch.from_numpy(teacher.own_rows(teacher.queries))
        said = teacher.answers(teacher.queries, exclude_rows=own)
        assert said.vectors.shape == teacher.truths.shape
        assert (said.mixture is None) == (teacher.centroids is None)
        if said.mixture is not None:
            assert said.mixture.query_count == len(teacher.queries)
