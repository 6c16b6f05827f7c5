from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.errors import SpecInvalid
from core.transport.cka import cka
from core.transport.layer_maps import explicit, proportional, without_states

DEPTHS = st.integers(1, 90)


@given(DEPTHS, DEPTHS)
def test_depths_rise_from_the_first_layer_to_the_last(student: int, teacher: int) -> None:
    found = proportional(student, teacher)

    assert len(found) == student
    assert found[-1] == teacher - 1
    assert student == 1 or found[0] == 0
    assert list(found) == sorted(found)
    if student > 1:
        for layer, other in enumerate(found):
            assert abs(other - layer * (teacher - 1) / (student - 1)) <= 0.5


@given(DEPTHS)
def test_equal_depths_give_the_identity(layers: int) -> None:
    assert proportional(layers, layers) == tuple(range(layers))


def test_layers_of_qwen() -> None:
    found = proportional(36, 64)

    assert found[:5] == (0, 2, 4, 5, 7)
    assert found[17:19] == (31, 32)
    assert found[-2:] == (61, 63)
    assert len(set(found)) == 36


def test_what_is_asked_for() -> None:
    assert without_states("proportional", 3, 5) == (0, 2, 4)
    assert without_states((0, 0, 4), 3, 5) == (0, 0, 4)
    assert without_states("cka", 3, 5) is None


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ((0, 1), "2 entries for 3 layers"),
        ((0, 1, 5), "entry 2 is 5; allowed: 0 to 4"),
        ((0, -1, 2), "entry 1 is -1"),
        ((0, 2, 1), "entry 2 is 1 behind 2"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(told: tuple[int, ...], why: str) -> None:
    with pytest.raises(SpecInvalid, match=why) as caught:
        explicit(told, 3, 5)
    assert caught.value.pointer == "/capture/layer_map"


def states(layers: int, width: int, *, rows: int = 40, seed: int = 0) -> dict[int, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randn(rows, width, generator=random, dtype=torch.float64)
        for layer in range(layers)
    }


def rotation(width: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64)).Q


def test_cka_is_that_of_the_features() -> None:
    student, teacher = states(3, 6), states(4, 9, seed=1)

    matrix, _ = cka(student, teacher)

    for layer, other in itertools.product(range(3), range(4)):
        x, y = student[layer] - student[layer].mean(0), teacher[other] - teacher[other].mean(0)
        wanted = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
        torch.testing.assert_close(matrix[layer, other], wanted, rtol=1e-12, atol=0)


def test_cka_sees_no_rotation_scale_or_shift() -> None:
    student = states(3, 6)
    turned = {
        layer: 3.0 * (of @ rotation(6, layer)) + torch.ones(6, dtype=torch.float64)
        for layer, of in student.items()
    }

    matrix, found = cka(student, turned)

    torch.testing.assert_close(matrix.diagonal(), torch.ones(3, dtype=torch.float64))
    assert found == (0, 1, 2)


def test_planted_layers_are_found() -> None:
    teacher = states(7, 12)
    planted = (1, 1, 4, 6)
    student = {
        layer: (teacher[of] @ rotation(12, layer)).float() for layer, of in enumerate(planted)
    }

    assert cka(student, teacher)[1] == planted


def test_layers_of_no_direction_have_no_similarity() -> None:
    still = {0: torch.full((40, 6), 0.1), 1: states(1, 6)[0]}

    matrix, found = cka(still, states(2, 6))

    assert matrix[0].tolist() == [0.0, 0.0]
    assert matrix[1, 0] == pytest.approx(1.0)
    assert found == (0, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 999))
def test_map_is_the_best_of_all(layers: int, others: int, seed: int) -> None:
    matrix, found = cka(states(layers, 3, rows=5, seed=seed), states(others, 4, rows=5, seed=~seed))

    paths = itertools.combinations_with_replacement(range(others), layers)
    best = max(sum(float(matrix[row, of]) for row, of in enumerate(path)) for path in paths)
    assert list(found) == sorted(found)
    assert sum(float(matrix[row, of]) for row, of in enumerate(found)) == pytest.approx(best)


def test_of_equal_maps_the_shallower_is_taken() -> None:
    same = states(1, 6)[0]

    assert cka(dict.fromkeys(range(2), same), dict.fromkeys(range(3), same))[1] == (0, 0)
