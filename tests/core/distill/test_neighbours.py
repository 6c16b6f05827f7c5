"""Who is near whom, against brute force: blocks, ties, the row itself, and what changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from core.distill.neighbours import (
    BLOCK_ENTRIES,
    NEAREST,
    nearest_rows,
    recall,
    recall_among,
)
from tests.core.distill._lda import drawn


def drawn_codes(rows: int, dim: int, *, seed: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).double()


def brute_force(points: Tensor, among: Tensor, count: int, own: Tensor | None) -> Tensor:
    """Every distance by itself, in float64, sorted."""
    apart = (points.double()[:, None] - among.double()[None]).square().sum(2)
    if own is not None:
        apart[torch.arange(len(points)), own] = torch.inf
    return apart.argsort(dim=1, stable=True)[:, :count]


@pytest.mark.parametrize("whose", ["others", "own"])
def test_the_nearest_are_those_of_brute_force_nearest_first(whose: str) -> None:
    among = drawn_codes(60, 4, seed=0)
    own = torch.tensor([59, 0, 7, 31]) if whose == "own" else None
    points = drawn_codes(4, 4, seed=1) if own is None else among[own]

    found = nearest_rows(points, among, count=12, own=own)

    assert torch.equal(found, brute_force(points, among, 12, own))


def test_blocks_do_not_show() -> None:
    """More distances than fit in one block, so that the second starts in the middle."""
    rows = 2200
    assert BLOCK_ENTRIES // rows < rows
    codes = drawn_codes(rows, 3, seed=2)
    searched = NearestNeighbors(n_neighbors=NEAREST + 1, algorithm="kd_tree").fit(codes.numpy())
    wanted = searched.kneighbors(codes.numpy(), return_distance=False)

    found = nearest_rows(codes, codes, count=NEAREST, own=torch.arange(rows))

    assert (wanted[:, 0] == np.arange(rows)).all(), "no two rows are equal"
    assert np.array_equal(found.numpy(), wanted[:, 1:])


def test_more_rows_than_a_block_holds_are_compared_one_point_at_a_time() -> None:
    among = torch.arange(BLOCK_ENTRIES + 3, dtype=torch.float64)[:, None] / 2**23
    points = among[[0, BLOCK_ENTRIES]]

    found = nearest_rows(points, among, count=2, own=None)

    assert found[:, 0].tolist() == [0, BLOCK_ENTRIES]


def test_a_row_is_found_where_it_is_not_said_to_be_its_own() -> None:
    codes = drawn_codes(20, 3, seed=3)
    assert nearest_rows(codes, codes, count=1, own=None)[:, 0].tolist() == list(range(20))
    own = torch.arange(20)
    assert not (nearest_rows(codes, codes, count=19, own=own) == own[:, None]).any()


def test_an_equal_row_is_a_neighbour_and_oneself_is_not() -> None:
    codes = torch.cat([drawn_codes(5, 2, seed=4)] * 2)
    found = nearest_rows(codes, codes, count=1, own=torch.arange(10))[:, 0]
    assert found.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_rows_far_from_the_origin_are_told_apart() -> None:
    """|p|^2 - 2 p q cancels; in float64 it still tells what float32 codes hold."""
    near = drawn_codes(40, 5, seed=5)
    far = (near + 1000).float().double()
    own = torch.arange(40)
    assert torch.equal(nearest_rows(far, far, count=10, own=own), brute_force(far, far, 10, own))


def test_recall_by_hand() -> None:
    """Of four rows on a line, by the teacher in another order."""
    codes = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    angles = torch.tensor([0.0, 0.1, 1.0, 0.25])
    teacher = torch.stack([angles.cos(), angles.sin()], dim=1)
    # Nearest by codes: 1, 0, 1, 2. By the teacher: 1, 0, 3, 1.
    assert recall(codes, teacher, count=1) == 2 / 4
    # Two nearest by codes: 12, 02, 10, 21. By the teacher: 13, 03, 31, 10.
    assert recall(codes, teacher, count=2) == (1 + 1 + 1 + 1) / 8
    assert recall(codes, teacher) == recall(codes, teacher, count=3) == 1


def test_recall_among_counts_the_asked_rows_alone() -> None:
    codes, teacher = drawn_codes(50, 3, seed=6), drawn(50, 8, seed=7)
    parts = [torch.arange(0, 20), torch.arange(20, 50)]
    shares = [recall_among(codes[own], codes, teacher[own], teacher, own) for own in parts]
    assert recall(codes, teacher) == pytest.approx((20 * shares[0] + 30 * shares[1]) / 50)


def test_few_rows_are_compared_among_as_many_as_there_are() -> None:
    assert recall(drawn_codes(1, 2, seed=8), drawn(1, 4, seed=9)) == 1
    for rows in (2, 5, NEAREST, NEAREST + 1):
        assert recall(drawn_codes(rows, 2, seed=8), drawn(rows, 4, seed=9)) == 1
    assert recall(drawn_codes(NEAREST + 3, 2, seed=8), drawn(NEAREST + 3, 4, seed=9)) < 1


def test_codes_that_say_nothing_are_as_good_as_chance() -> None:
    rows = 600
    found = recall(drawn_codes(rows, 4, seed=10), drawn(rows, 8, seed=11))
    assert found == pytest.approx(NEAREST / (rows - 1), abs=0.01)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 40), st.integers(1, 6), st.floats(0.01, 100.0))
def test_turning_scaling_and_moving_codes_changes_nothing(
    seed: int, rows: int, dim: int, scale: float
) -> None:
    codes, teacher = drawn_codes(rows, dim, seed=seed), drawn(rows, 7, seed=seed + 1)
    turn = torch.linalg.qr(drawn_codes(dim, dim, seed=seed + 2)).Q

    found = recall(codes, teacher)

    moved = scale * codes @ turn + drawn_codes(1, dim, seed=seed + 3)
    lengths = torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed)) + 0.5
    assert recall(moved, teacher) == found
    assert recall(codes, lengths * teacher) == found, "the teacher is compared by cosine"
    assert 0 <= found <= 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 40), st.integers(2, 8))
def test_the_teachers_own_directions_keep_everybody(seed: int, rows: int, dim: int) -> None:
    teacher = drawn(rows, dim, seed=seed)
    assert recall(teacher, 3 * teacher) == 1
    turned = teacher.double() @ torch.linalg.qr(drawn_codes(dim, dim, seed=seed + 1)).Q
    assert recall(turned, teacher) == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 30))
def test_the_order_of_rows_changes_nothing(seed: int, rows: int) -> None:
    codes, teacher = drawn_codes(rows, 3, seed=seed), drawn(rows, 6, seed=seed + 1)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert recall(codes[order], teacher[order]) == pytest.approx(recall(codes, teacher), abs=1e-12)
