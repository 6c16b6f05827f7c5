from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import SpecInvalid
from core.specs.architectures import covering_architecture, optimal_architecture


@pytest.mark.parametrize(
    ("heads", "wanted"),
    [(18, (4, 2)), (64, (4, 3)), (100, (4, 3)), (16, (4, 2)), (256, (4, 4)), (1, (4, 1))],
)
def test_document_001s_examples(heads: int, wanted: tuple[int, int]) -> None:
    assert optimal_architecture(heads) == wanted


@given(st.integers(2, 40), st.integers(1, 60))
def test_an_exact_power_is_its_own_architecture(base: int, layers: int) -> None:
    assert optimal_architecture(base**layers, prefer_h=base) == (base, layers)


@given(st.integers(1, 10**30), st.integers(2, 1000))
def test_the_nearer_of_two_powers_wins(n: int, base: int) -> None:
    heads, layers = optimal_architecture(n, prefer_h=base)

    distances = {each: abs(Fraction(base) ** each - n) for each in range(1, 102)}
    nearest = min(distances.values())
    assert heads == base
    assert layers == min(each for each, gap in distances.items() if gap == nearest)


def test_halfway_takes_the_lower_power() -> None:
    assert [optimal_architecture(n)[1] for n in (9, 10, 11)] == [1, 1, 2]
    assert [optimal_architecture(n)[1] for n in (39, 40, 41)] == [2, 2, 3]


@pytest.mark.parametrize("wrong", [0, -3, 1.5, 4.0, "18", None, True])
def test_heads_must_be_a_positive_whole_number(wrong: Any) -> None:
    with pytest.raises(SpecInvalid, match="n_flat_heads") as caught:
        optimal_architecture(wrong)
    assert caught.value.pointer == "/n_flat_heads"
    with pytest.raises(SpecInvalid, match="n_flat_heads"):
        covering_architecture(wrong)


@pytest.mark.parametrize("wrong", [1, 0, -4, 2.5])
def test_a_preferred_head_count_below_two_never_grows(wrong: Any) -> None:
    with pytest.raises(SpecInvalid, match="prefer_h") as caught:
        optimal_architecture(18, prefer_h=wrong)
    assert caught.value.pointer == "/prefer_h"


def test_numpys_integers_are_integers() -> None:
    assert optimal_architecture(np.int64(18)) == (4, 2)  # type: ignore[arg-type]


@given(st.integers(1, 3000), st.one_of(st.none(), st.integers(2, 800)))
def test_covering_is_the_smallest_that_covers(n: int, dim: int | None) -> None:
    heads, layers = covering_architecture(n, dim=dim)

    allowed = [h for h in range(1, max(n, dim or 0) + 1) if dim is None or dim % h == 0]
    every = [(h * each, each) for h in allowed for each in range(1, 13) if h**each >= n]
    assert heads**layers >= n
    assert (heads * layers, layers) == min(every)


@pytest.mark.parametrize(
    ("n", "dim", "wanted"),
    [(1, None, (1, 1)), (16, None, (4, 2)), (18, 384, (3, 3)), (18, 7, (7, 2)), (1, 1, (1, 1))],
)
def test_covering_by_hand(n: int, dim: int | None, wanted: tuple[int, int]) -> None:
    assert covering_architecture(n, dim=dim) == wanted


def test_covering_takes_huge_numbers() -> None:
    heads, layers = covering_architecture(10**60)
    assert heads**layers >= 10**60 > (heads - 1) ** layers


@pytest.mark.parametrize("wrong", [0, -1, 2.0])
def test_covering_refuses_a_width_that_is_none(wrong: Any) -> None:
    with pytest.raises(SpecInvalid, match="dim") as caught:
        covering_architecture(18, dim=wrong)
    assert caught.value.pointer == "/dim"


def test_one_dimension_covers_one_head() -> None:
    with pytest.raises(SpecInvalid, match="dim 1 has one head"):
        covering_architecture(2, dim=1)
