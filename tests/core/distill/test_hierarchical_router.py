"""H^L slots of L levels of H keys: the teacher itself at the start, and few of them looked at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.distill.lda_fitting import fit
from core.distill.students._base import build_student, sizes_of
from core.distill.students._slots import digits, place
from core.distill.students.hierarchical_router import HierarchicalRouterStudent
from core.distill.teachers.lda import LdaTeacher
from core.errors import SpecInvalid
from core.specs.clusterings import KMeans
from core.specs.plain_students import HierarchicalRouter
from core.specs.sizes import Sizes
from core.specs.teachers import Lda
from core.tensors.lda import LDA
from tests.core.distill._make import CLUSTERS, DIM, make_lda, make_pairs, some_queries


def teacher_of(model: LDA | None = None) -> LdaTeacher:
    return LdaTeacher(model or make_lda(), Lda(temperature=0.05))


def router(teacher: LdaTeacher, **told: object) -> HierarchicalRouterStudent:
    student = build_student(HierarchicalRouter.model_validate(told), teacher, 0)
    assert isinstance(student, HierarchicalRouterStudent)
    return student


@pytest.mark.parametrize(
    "told",
    [{}, {"heads": 2, "levels": 2}, {"heads": 3, "levels": 3}, {"heads": 4, "levels": 1}],
)
def test_untrained_it_is_the_teacher(told: dict[str, object]) -> None:
    teacher = teacher_of()
    found = router(teacher, **told)(5 * some_queries())
    torch.testing.assert_close(found, teacher.targets(some_queries()), rtol=0, atol=1e-5)


def test_untrained_it_is_a_teacher_of_maps_too() -> None:
    model = fit(make_pairs(), KMeans(max_clusters=4), mode="maps", seed=0, temperature=0.1)
    teacher = LdaTeacher(model, Lda())
    queries = 3 * some_queries()
    found = router(teacher)(queries)
    torch.testing.assert_close(found, teacher.targets(queries), rtol=0, atol=1e-5)


def test_its_weights_by_head_are_the_teachers() -> None:
    teacher, student = teacher_of(), router(teacher_of(), heads=3, levels=2)
    weights = student.weights(some_queries())
    assert weights.shape == (50, 9)
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    by_head = torch.zeros(50, CLUSTERS).index_add(1, student.head_of, weights)
    wanted = teacher.mixture(some_queries()).dense()
    torch.testing.assert_close(by_head, wanted, rtol=0, atol=1e-6)
    assert student.head_of.bincount(minlength=CLUSTERS).min() >= 1


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 40), heads=st.integers(2, 5), levels=st.integers(1, 3), seed=st.integers(0)
)
def test_slots_hold_every_head_and_keys_and_corrections_add_up_to_it(
    count: int, heads: int, levels: int, seed: int
) -> None:
    count = min(count, heads**levels)
    points = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 6)))
    slots = place(points, heads=heads, levels=levels)
    assert set(slots.head_of.tolist()) == set(range(count))
    at = digits(heads, levels)
    assert len(set(map(tuple, at.tolist()))) == heads**levels
    keys = sum(slots.keys[level][at[:, level]] for level in range(levels))
    torch.testing.assert_close(keys + slots.own, points[slots.head_of])


def wide_lda(heads: int = 64, dim: int = 24) -> LDA:
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(heads, dim)).astype(np.float32)
    answers = rng.normal(size=(heads, dim)).astype(np.float32)
    return replace(
        make_lda(),
        centroids=centroids,
        answers=answers,
        queries=centroids,
        targets=answers,
        cluster_of=np.arange(heads),
        cluster_ids=[str(head) for head in range(heads)],
        train_rows=np.arange(heads),
        held_out_rows=np.zeros(0, np.int64),
    )


def test_few_candidates_are_nearly_all_and_all_of_them_are_the_teacher() -> None:
    teacher = teacher_of(wide_lda())
    queries = torch.from_numpy(teacher.queries) + 0.05
    wanted = teacher.targets(queries)
    whole = router(teacher, heads=8, levels=2, candidates=64)
    assert whole.candidates is None  # as many as there are
    cosines = []
    for count in (1, 4, 16, 48):
        few = router(teacher, heads=8, levels=2, candidates=count)
        assert int((few.weights(queries) > 0).sum(1).max()) <= count
        cosines.append(torch.cosine_similarity(few(queries), wanted).mean().item())
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.99


def test_the_rank_of_the_corrections_decides_how_near_it_starts() -> None:
    teacher = teacher_of(wide_lda())
    queries = torch.from_numpy(teacher.queries)
    wanted = teacher.targets(queries)
    off = [
        (router(teacher, heads=8, levels=2, own_rank=rank)(queries) - wanted).abs().max().item()
        for rank in (0, 4, 12, None)
    ]
    assert off == sorted(off, reverse=True)
    assert off[-1] < 1e-5 < off[0]


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"heads": 2, "levels": 1}, "2 slots; the model has 4 heads, allowed: 4 to 65536"),
        ({"heads": 4096, "levels": 16}, "allowed: 4 to 65536 slots"),
    ],
)
def test_slots_that_do_not_hold_the_heads_are_refused(told: dict[str, int], match: str) -> None:
    with pytest.raises(SpecInvalid, match=match) as caught:
        HierarchicalRouter.model_validate(told).check_sizes(sizes_of(teacher_of()))
    assert caught.value.pointer == "/student/heads"


@pytest.mark.parametrize(
    ("told", "heads", "levels"),
    [({}, 4, 3), ({"heads": 2}, 2, 6), ({"levels": 2}, 8, 2), ({"heads": 64}, 64, 1)],
)
def test_what_is_left_open_covers_the_heads(told: dict[str, int], heads: int, levels: int) -> None:
    built = HierarchicalRouter.model_validate(told).as_built(Sizes(DIM, DIM, 100, 64))
    assert (built.heads, built.levels) == (heads, levels)
