from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import DataInvalid
from core.specs.transport import Refine, Rotate
from core.transport.polar import deviation
from core.transport.refine import ASKED_NONE, OPTIMUM, refine
from core.transport.rotate import cross_moment, solve
from core.transport.rotation_files import check_rotation
from core.transport.rotations import Rotation
from tests.core.transport.moments_of import moments_of, orthogonal, rows

F64 = torch.float64


def _square(full: torch.Tensor) -> Rotation:
    """All of a square rotation as its own core."""
    d = len(full)
    eye = torch.eye(d, dtype=F64)
    return Rotation("global", ("final",), eye, full, eye, full, torch.ones(d, dtype=F64))


def _solved(d_s: int, d_t: int, **options: object) -> tuple[Rotation, torch.Tensor]:
    common = rows(120, max(d_s, d_t), seed=1)
    x, y = common[:, :d_s], (common @ orthogonal(max(d_s, d_t), seed=2))[:, :d_t]
    y = y + rows(120, d_t, seed=9)
    moments = {"final": moments_of(x, y)}
    found, _ = solve(moments, Rotate.model_validate({"pca": "each", **options}), "final")
    assert isinstance(found, Rotation)
    return found, cross_moment(moments, centre=False)


@pytest.mark.parametrize(("d_s", "d_t"), [(6, 6), (5, 8), (8, 5)])
@pytest.mark.parametrize("det", ["any", "positive"])
def test_an_optimum_is_left_alone_and_says_so(d_s: int, d_t: int, det: str) -> None:
    # Joint: else the wider side's principal directions are a cut of its stream.
    found, C = _solved(d_s, d_t, pca="joint")

    same, told = refine(found, C, Refine(), det="any" if det == "any" else "positive")

    assert same is found
    assert told["skipped"] == OPTIMUM
    assert (told["reflections"], told["predicted"], told["measured"]) == (0, 0, 0)


def test_the_sign_that_det_positive_cost_cannot_be_had_back_in_pairs() -> None:
    x = rows(60, 4, seed=3)
    Q = orthogonal(4, seed=4)
    Q = Q * torch.tensor([-torch.linalg.det(Q).sign(), 1, 1, 1])
    moments = {"final": moments_of(x, x @ Q)}
    found, _ = solve(moments, Rotate(det="positive"), "final")
    assert isinstance(found, Rotation)
    C = cross_moment(moments, centre=False)

    same, told = refine(found, C, Refine(), det="positive")
    free, gained = refine(found, C, Refine(), det="any")

    assert same is found
    assert "in pairs" in told["skipped"]
    assert gained["reflections"] == 1
    torch.testing.assert_close(free.full, Q, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 7), st.integers(0, 2), st.integers(0, 1000))
def test_planted_negative_eigenvalues_are_turned_round(d: int, planted: int, seed: int) -> None:
    V, R = orthogonal(d, seed=seed), orthogonal(d, seed=seed + 1)
    values = torch.linspace(3, 1, d, dtype=F64)
    values[:planted] *= -1
    C = R @ (V * values) @ V.mT

    found, told = refine(_square(R), C, Refine(), det="any")

    assert told["reflections"] == planted
    assert told["eigenvalues"] == pytest.approx(sorted(values[:planted].tolist()))
    assert told["predicted"] == pytest.approx(-2 * float(values[:planted].sum()), abs=1e-9)
    assert told["measured"] == pytest.approx(told["predicted"], abs=1e-9)
    reached = float((found.full * C).sum())
    assert reached == pytest.approx(float(torch.linalg.svdvals(C).sum()))


def test_no_more_than_was_asked_for() -> None:
    R = orthogonal(5, seed=1)
    C = R @ torch.diag(torch.tensor([-4.0, -3, -2, 1, 1], dtype=F64))

    one, told = refine(_square(R), C, Refine(reflections=1), det="any")
    none, idle = refine(_square(R), C, Refine(reflections=0), det="any")
    _, two = refine(_square(R), C, Refine(), det="any")

    assert (told["reflections"], two["reflections"]) == (1, 2)
    assert (told["predicted"], two["predicted"]) == (pytest.approx(8), pytest.approx(14))
    assert torch.linalg.det(one.full) * torch.linalg.det(R) < 0
    assert idle["skipped"] == ASKED_NONE
    assert torch.equal(none.full, R)


def test_a_pair_keeps_the_determinant_and_may_lose_a_little_with_its_second() -> None:
    R = orthogonal(4, seed=1)
    C = R @ torch.diag(torch.tensor([-4.0, 0.5, 1, 2], dtype=F64))

    found, told = refine(_square(R), C, Refine(), det="positive")
    _, single = refine(_square(R), C, Refine(reflections=1), det="positive")

    assert told["reflections"] == 2
    assert told["measured"] == pytest.approx(2 * (4 - 0.5))
    assert torch.linalg.det(found.full) * torch.linalg.det(R) > 0
    assert "only one was allowed" in single["skipped"]


@pytest.mark.parametrize(("d_s", "d_t", "k"), [(6, 6, 2), (5, 8, 2), (8, 5, 2), (5, 8, 5)])
def test_what_a_cut_of_the_rank_left_is_gained_and_the_parts_still_fit(
    d_s: int, d_t: int, k: int
) -> None:
    found, C = _solved(d_s, d_t, k=k)

    better, told = refine(found, C, Refine(), det="any")

    assert told["reflections"] > 0
    assert told["measured"] > 0
    assert told["measured"] == pytest.approx(told["predicted"])
    check_rotation(better)
    assert deviation(better.student_basis.mT @ better.student_basis) < 1e-12
    assert deviation(better.teacher_basis.mT @ better.teacher_basis) < 1e-12
    within = better.student_basis.mT @ C[:, :d_t] @ better.teacher_basis
    torch.testing.assert_close(better.singular_values, torch.linalg.svdvals(within))


def test_a_tied_rotation_is_brought_nearer_to_one_of_its_sites() -> None:
    x = rows(80, 5, seed=1)
    one = moments_of(x, x @ orthogonal(5, seed=2))
    other = moments_of(x, x @ orthogonal(5, seed=3))
    tied, _ = solve({"mlp.0": one, "mlp.1": other}, Rotate(), "global")
    assert isinstance(tied, Rotation)
    C = cross_moment({"mlp.0": one}, centre=False)

    better, told = refine(tied, C, Refine(), det="any")

    assert told["reflections"] > 0
    assert float((better.full * C).sum()) > float((tied.full * C).sum())


def test_a_moment_of_other_widths_is_refused() -> None:
    found, C = _solved(5, 8)

    with pytest.raises(DataInvalid, match=r"needed finite numbers of shape \[5, 8\]"):
        refine(found, C[:, :7], Refine(), det="any")
    with pytest.raises(DataInvalid, match="needed finite numbers"):
        refine(found, C * float("nan"), Refine(), det="any")
