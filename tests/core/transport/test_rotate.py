from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import DataInvalid, SpecInvalid
from core.specs.transport import Rotate
from core.transport.moments import Moments
from core.transport.polar import deviation
from core.transport.rotate import cross_moment, solve
from core.transport.rotations import Rotation, Unwhitened
from tests.core.transport.moments_of import moments_of, orthogonal, rows

F64 = torch.float64
WIDTHS = [(6, 6), (5, 8), (8, 5)]


def _rotation(x: torch.Tensor, y: torch.Tensor, **options: Any) -> Rotation:
    found, _ = solve({"final": moments_of(x, y)}, Rotate(**options), "final")
    assert isinstance(found, Rotation)
    return found


def _pair(d_s: int, d_t: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that share a common part, with noise on both sides."""
    common = rows(200, max(d_s, d_t), seed=seed)
    noise = torch.randn(200, d_s + d_t, generator=torch.Generator().manual_seed(seed), dtype=F64)
    turned = common @ orthogonal(max(d_s, d_t), seed=seed + 7)
    return common[:, :d_s] + 0.3 * noise[:, :d_s], turned[:, :d_t] + 0.3 * noise[:, d_s:]


def _padded(y: torch.Tensor, d_r: int) -> torch.Tensor:
    return torch.nn.functional.pad(y, (0, d_r - y.shape[1]))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(0, 10_000), st.sampled_from(["each", "joint"]))
def test_a_turn_of_all_rows_is_recovered(d: int, seed: int, pca: str) -> None:
    x = rows(60, d, seed=seed)
    Q = orthogonal(d, seed=seed + 5)

    found = _rotation(x, x @ Q, pca=pca)

    torch.testing.assert_close(found.full, Q, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.lifted, Q, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10_000))
def test_an_embedding_into_a_wider_stream_is_recovered(d_s: int, more: int, seed: int) -> None:
    x = rows(60, d_s, seed=seed)
    J = orthogonal(d_s + more, seed=seed + 5)[:d_s]

    torch.testing.assert_close(_rotation(x, x @ J).full, J, rtol=0, atol=1e-10)


def test_a_wider_student_puts_what_the_teacher_lacks_into_the_padding() -> None:
    y = rows(80, 3, seed=1)
    embed = orthogonal(7, seed=2)[:3]

    found = _rotation(y @ embed, y)

    assert found.full.shape == (7, 7)
    mapped = (y @ embed) @ found.full
    torch.testing.assert_close(mapped, _padded(y, 7), rtol=0, atol=1e-10)


@pytest.mark.parametrize("pca", ["each", "joint"])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("d_s", "d_t"), WIDTHS)
def test_the_lift_is_a_partial_isometry_and_its_completion_orthogonal(
    d_s: int, d_t: int, k: int, pca: str
) -> None:
    found = _rotation(*_pair(d_s, d_t), k=k, pca=pca)

    R, P_s, P_t = found.lifted, found.student_basis, found.teacher_basis
    torch.testing.assert_close(R @ R.mT, P_s @ P_s.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(R.mT @ R, P_t @ P_t.mT, rtol=0, atol=1e-12)
    d_r = max(d_s, d_t)
    assert found.full.shape == (d_s, d_r)
    assert deviation(found.full @ found.full.mT) < 1e-12
    torch.testing.assert_close(P_s @ P_s.mT @ found.full, _padded(R, d_r), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("d_s", "d_t"), WIDTHS)
def test_core_and_values_are_those_of_a_brute_force_reference(d_s: int, d_t: int) -> None:
    x, y = _pair(d_s, d_t)

    found = _rotation(x, y, k=3, pca="each")

    _, _, V_x = torch.linalg.svd(x)
    _, _, V_y = torch.linalg.svd(y)
    M = V_x[:3] @ x.mT @ y @ V_y[:3].mT
    U, S, Vh = torch.linalg.svd(M)
    torch.testing.assert_close(found.singular_values, S)
    torch.testing.assert_close(found.lifted, V_x[:3].mT @ U @ Vh @ V_y[:3], rtol=0, atol=1e-10)


def test_no_orthogonal_map_comes_nearer_than_the_whole_rank() -> None:
    x, y = _pair(6, 6)
    found = _rotation(x, y).full

    best = float((x @ found - y).norm())
    for seed in range(20):
        near = found @ torch.linalg.matrix_exp(0.1 * _skew(6, seed))
        assert float((x @ near - y).norm()) >= best


def _skew(d: int, seed: int) -> torch.Tensor:
    noise = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return noise - noise.mT


@pytest.mark.parametrize("k", [None, 2])
def test_positive_determinant_flips_where_it_costs_least(k: int | None) -> None:
    x = rows(60, 4, seed=3)
    Q = orthogonal(4, seed=4)
    Q = Q * torch.tensor([-torch.linalg.det(Q).sign(), 1, 1, 1])  # a reflection

    free, free_told = solve({"final": moments_of(x, x @ Q)}, Rotate(k=k), "final")
    kept, told = solve({"final": moments_of(x, x @ Q)}, Rotate(k=k, det="positive"), "final")

    assert isinstance(free, Rotation)
    assert isinstance(kept, Rotation)
    assert (free_told["det"], free_told["flipped"]) == (-1.0, "none")
    assert (told["det"], told["flipped"]) == (1.0, "core" if k is None else "rest")
    C = cross_moment({"final": moments_of(x, x @ Q)}, centre=False)
    lost = float(((free.full - kept.full) * C).sum())
    assert lost == pytest.approx(2 * float(torch.linalg.svdvals(C)[-1]), rel=1e-6)


def test_a_rectangular_map_has_no_determinant() -> None:
    _, told = solve({"final": moments_of(*_pair(5, 8))}, Rotate(det="positive"), "final")

    assert told["det"] is None
    assert told["flipped"] == "none"


def test_shrink_and_k_say_how_many_dimensions_are_shared() -> None:
    pair = _pair(8, 5)

    assert _rotation(*pair).core.shape == (5, 5)
    assert _rotation(*pair, shrink=0.8).core.shape == (4, 4)
    assert _rotation(*pair, shrink=0.05).core.shape == (1, 1)
    assert _rotation(*pair, k=2).core.shape == (2, 2)


def test_k_above_the_smaller_width_is_refused_by_name() -> None:
    with pytest.raises(SpecInvalid, match="k is 6; allowed 1 to 5") as caught:
        _rotation(*_pair(8, 5), k=6)
    assert caught.value.pointer == "/rotate/k"


def test_k_by_held_out_rows_is_the_best_of_those_tried() -> None:
    """Sixteen rows of ten channels, of which two are shared: the rest is fitted noise."""
    shared = torch.eye(2, 10, dtype=F64)
    common = rows(400, 2, seed=0) * 4
    x = common @ shared + rows(400, 10, seed=1, falling=False)
    y = common @ shared + rows(400, 10, seed=2, falling=False)
    few, many = moments_of(x[:16], y[:16]), moments_of(x[16:], y[16:])

    found, told = solve({"final": few}, Rotate(k="held_out"), "final", held_out={"final": many})

    assert [each["k"] for each in told["tried"]] == [2, 4, 6, 8, 10]
    best = max(told["tried"], key=lambda each: each["held_out_cosine"])
    assert found.core.shape[0] == best["k"] < 10
    assert told["sites"]["final"]["held_out_after"] == pytest.approx(best["held_out_cosine"])


def test_where_every_k_gives_the_same_map_the_fewest_dimensions_are_taken() -> None:
    x, y = _pair(20, 20)
    few, many = moments_of(x[:100], y[:100]), moments_of(x[100:], y[100:])

    _, told = solve({"final": few}, Rotate(k="held_out"), "final", held_out={"final": many})

    scores = [each["held_out_cosine"] for each in told["tried"]]
    assert max(scores) - min(scores) < 1e-12
    assert told["k"] == told["tried"][0]["k"] == 4


def test_k_by_held_out_rows_needs_them() -> None:
    with pytest.raises(SpecInvalid, match="texts to hold out"):
        _rotation(*_pair(5, 5), k="held_out")


def test_centring_takes_out_each_sites_own_means() -> None:
    x, Q = rows(60, 5, seed=1), orthogonal(5, seed=2)
    sites = {
        "attention.0": moments_of(x + 3, x @ Q - 5),
        "mlp.0": moments_of(x - 2, x @ Q + 1),
    }

    found, _ = solve(sites, Rotate(centre=True, tie="layer"), "layer.0")
    crooked, _ = solve(sites, Rotate(tie="layer"), "layer.0")

    assert isinstance(found, Rotation)
    assert isinstance(crooked, Rotation)
    torch.testing.assert_close(found.full, Q, rtol=0, atol=1e-9)
    assert float((crooked.full - Q).abs().max()) > 0.1


def test_sites_of_a_group_count_as_one_set_of_rows() -> None:
    x, y = _pair(6, 6)
    apart = {"a": moments_of(x[:70], y[:70]), "b": moments_of(x[70:], y[70:])}

    found, told = solve(apart, Rotate(), "global")

    assert isinstance(found, Rotation)
    torch.testing.assert_close(found.full, _rotation(x, y).full, rtol=0, atol=1e-10)
    assert found.sites == ("a", "b")
    assert set(told["sites"]) == {"a", "b"}


def test_cosines_are_those_of_the_rows() -> None:
    x, y = _pair(5, 8)

    found, told = solve({"final": moments_of(x, y)}, Rotate(k=3), "final")

    assert isinstance(found, Rotation)
    shown = told["sites"]["final"]
    flat = torch.nn.functional.cosine_similarity
    mapped = x @ found.full
    assert shown["after"] == pytest.approx(float(flat(mapped.flatten(), y.flatten(), dim=0)))
    before = _padded(x, 8)
    assert shown["before"] == pytest.approx(float(flat(before.flatten(), y.flatten(), dim=0)))
    mine, theirs = x @ found.student_basis @ found.core, y @ found.teacher_basis
    assert shown["shared"] == pytest.approx(float(flat(mine.flatten(), theirs.flatten(), dim=0)))
    assert shown["n"] == 200.0
    energy = float((x @ found.student_basis).square().sum() / x.square().sum())
    assert told["student_energy"] == pytest.approx(energy)


def test_diagnostics_tell_the_errors_of_orthogonality() -> None:
    _, square = solve({"final": moments_of(*_pair(6, 6))}, Rotate(k=3), "final")
    _, wide = solve({"final": moments_of(*_pair(5, 8))}, Rotate(), "final")

    assert set(square["errors"]) == {"core", "bases", "lift", "rows", "columns"}
    assert set(wide["errors"]) == {"core", "bases", "lift", "rows"}
    assert max(*square["errors"].values(), *wide["errors"].values()) < 1e-12


def test_directions_below_the_ridge_are_counted() -> None:
    x = rows(100, 6, seed=1) @ torch.diag(torch.tensor([1, 1, 1, 1, 1e-4, 1e-4], dtype=F64))

    _, told = solve({"final": moments_of(x, x)}, Rotate(ridge=1e-3), "final")
    _, free = solve({"final": moments_of(x, x)}, Rotate(ridge=0), "final")

    assert (told["student_below_ridge"], told["teacher_below_ridge"]) == (2, 2)
    assert (free["student_below_ridge"], free["teacher_below_ridge"]) == (0, 0)


def test_unseen_directions_stay_unturned() -> None:
    x = torch.zeros(30, 5, dtype=F64)
    x[:, :2] = rows(30, 2, seed=1)

    found = _rotation(x, x)

    torch.testing.assert_close(found.full, torch.eye(5, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("d_s", "d_t"), WIDTHS)
def test_z_scores_give_an_affine_map_that_is_no_rotation(d_s: int, d_t: int) -> None:
    x, y = _pair(d_s, d_t)
    x = x * torch.linspace(0.2, 4, d_s, dtype=F64) + 2

    found, told = solve({"final": moments_of(x, y)}, Rotate(whiten=True, ridge=0), "final")

    assert isinstance(found, Unwhitened)
    assert not hasattr(found, "full")
    assert (told["orthogonal"], told["det"]) == (False, None)
    assert told["errors"]["rows"] > 0.1
    z_x = (x - x.mean(0)) / x.std(0, correction=0)
    z_y = (y - y.mean(0)) / y.std(0, correction=0)
    inner = _rotation(z_x, z_y).lifted
    expected = (z_x @ inner) * y.std(0, correction=0) + y.mean(0)
    torch.testing.assert_close(x @ found.matrix + found.offset, expected, rtol=0, atol=1e-8)
    flat = torch.nn.functional.cosine_similarity(expected.flatten(), y.flatten(), dim=0)
    assert told["sites"]["final"]["after"] == pytest.approx(float(flat))


def test_the_ridge_bounds_the_z_scores_of_a_channel_that_never_changes() -> None:
    x, y = _pair(4, 4)
    x[:, 1] = 3.0

    for ridge in (0.0, 1e-3):
        found, _ = solve({"final": moments_of(x, y)}, Rotate(whiten=True, ridge=ridge), "final")
        assert isinstance(found, Unwhitened)
        assert bool(found.matrix.isfinite().all())
        assert float(found.student_scale.min()) > 0


def test_whitened_k_can_be_chosen_by_held_out_rows() -> None:
    x, y = _pair(6, 6)

    found, told = solve(
        {"final": moments_of(x[:100], y[:100])},
        Rotate(whiten=True, k="held_out", det="positive"),
        "final",
        held_out={"final": moments_of(x[100:], y[100:])},
    )

    assert found.core.shape[0] in {each["k"] for each in told["tried"]}
    assert told["flipped"] == "none"


@pytest.mark.parametrize("options", [{}, {"k": 3}, {"pca": "joint"}, {"whiten": True}])
def test_equal_moments_give_equal_bytes(options: dict[str, Any]) -> None:
    moments = {"final": moments_of(*_pair(5, 8))}

    one, told = solve(moments, Rotate(**options), "final")
    other, again = solve(moments, Rotate(**options), "final")

    assert told == again
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, vars(other)[name])


def test_progress_is_told_and_may_stop_the_solve() -> None:
    seen: list[tuple[float, float]] = []
    solve(
        {"final": moments_of(*_pair(5, 5))},
        Rotate(),
        "final",
        report=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def _broken() -> list[tuple[dict[str, Moments], str]]:
    good = moments_of(*_pair(5, 5))
    zero = moments_of(torch.zeros(4, 5), torch.ones(4, 5))
    return [
        ({}, "at least one site"),
        ({"a": replace(good, xy=good.xy[:4])}, "do not fit"),
        ({"a": replace(good, xx=good.xx * float("nan"))}, "not finite"),
        ({"a": replace(good, n=good.n * 0)}, "no row counts"),
        ({"a": zero}, "student's rows are all zero"),
        ({"a": good, "b": moments_of(*_pair(5, 6))}, "cannot share"),
    ]


@pytest.mark.parametrize(("moments", "said"), _broken())
def test_broken_moments_are_refused(moments: dict[str, Moments], said: str) -> None:
    with pytest.raises(DataInvalid, match=said):
        solve(moments, Rotate(), "global")


def test_rows_that_are_all_alike_cannot_be_centred() -> None:
    x, _ = _pair(5, 5)
    moments = {"a": moments_of(x, torch.full((200, 5), 1 / 3, dtype=F64))}

    with pytest.raises(DataInvalid, match="teacher's rows"):
        solve(moments, Rotate(centre=True), "global")


def test_held_out_moments_of_other_widths_are_refused() -> None:
    with pytest.raises(DataInvalid, match="held-out moments"):
        solve(
            {"a": moments_of(*_pair(5, 5))},
            Rotate(),
            "global",
            held_out={"a": moments_of(*_pair(5, 6))},
        )
