"""Codebooks of planes: what is found, that the ways of finding agree, and rotations inside."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import expm
from torch import Tensor

from core.errors import DataInvalid, SpecInvalid
from core.rotations import codebook as made
from core.rotations.codebook import Codebook
from core.rotations.skew import from_planes
from core.specs.codebooks import CanonicalPlanes, CombinedPlanes, PrincipalPlanes
from core.tensors.codebooks import check_codebook
from tests.core.rotations import _make as make

SOLVERS = ("full", "randomized", "incremental")
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def shared_planes(width: int, clusters: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bivectors [C, d, d] float64 that all turn in the same planes, and their angles [C, m]."""
    generator = torch.Generator().manual_seed(seed)
    m = width // 2
    angles = torch.randn(clusters, m, generator=generator, dtype=torch.float64)
    angles = angles * 0.7 ** torch.arange(m).double()
    columns = make.basis(width)[:, : 2 * m]
    return torch.stack([from_planes(columns, row) for row in angles]), angles


def mixed(clusters: int, width: int, *, seed: int = 0) -> Tensor:
    """Bivectors [C, d, d] float64 of decaying size with no plane in common."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(clusters, width, width, generator=generator, dtype=torch.float64)
    values = values * 0.6 ** torch.arange(clusters).double()[:, None, None]
    return values - values.mT


def overlapping(count: int, width: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randn(count, width, 2, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(pairs).Q.mT.contiguous()


def projector(planes: np.ndarray) -> Tensor:  # type: ignore[type-arg]
    """Of each plane, whatever basis stands for it: [m, d, d]."""
    wide = torch.from_numpy(planes).double()
    return wide.mT @ wide


def book(planes: Tensor) -> Codebook:
    shares = np.zeros(len(planes), np.float32)
    return Codebook(planes.float().numpy(), shares, "pca")


def test_canonical_planes_are_the_axes_in_pairs() -> None:
    found = made.canonical(7, 3)

    check_codebook(found)
    np.testing.assert_array_equal(found.planes.reshape(6, 7), np.eye(7)[:6])
    assert found.disjoint
    assert not found.explained.any()


@every_solver
def test_planes_that_all_clusters_share_are_found_with_their_shares(solver: str) -> None:
    bivectors, angles = shared_planes(11, 8)
    weights = torch.arange(1, 9)

    found = made.pca(bivectors, 5, solver=solver, weights=weights)

    check_codebook(found)
    squares = weights.double() @ angles.square() / (weights.double() @ angles.square()).sum()
    wanted = squares.sort(descending=True)
    np.testing.assert_allclose(found.explained, wanted.values, atol=1e-6)
    columns = make.basis(11)[:, :10].T.reshape(5, 2, 11)[wanted.indices]
    torch.testing.assert_close(projector(found.planes), columns.mT @ columns, rtol=0, atol=2e-6)
    assert found.facts["together"] == pytest.approx(1)
    assert found.disjoint


@pytest.mark.parametrize("disjoint", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_solvers_agree(dtype: torch.dtype, *, disjoint: bool) -> None:
    bivectors = mixed(40, 10).to(dtype)
    reference = made.pca(mixed(40, 10), 4, solver="full", disjoint=disjoint)

    for solver in SOLVERS:
        found = made.pca(bivectors, 4, solver=solver, disjoint=disjoint)
        np.testing.assert_allclose(found.explained, reference.explained, atol=2e-5)
        apart = (projector(found.planes) - projector(reference.planes)).abs().max()
        assert apart < 2e-4


def test_components_are_those_of_the_whole_matrix() -> None:
    bivectors, weights = mixed(6, 7), torch.tensor([1.0, 2, 3, 1, 1, 5])
    shares = weights.double() / weights.sum()
    rows = bivectors.flatten(1)
    whole = torch.linalg.svd(shares.sqrt()[:, None] * rows, full_matrices=False)

    for solver in SOLVERS:
        found = made.principal_components(bivectors, shares, most=3, solver=solver)
        torch.testing.assert_close(found.variances, whole.S[:3].square())
        cosines = (found.values.flatten(1) * whole.Vh[:3]).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(3).double())
        torch.testing.assert_close(found.values, -found.values.mT)


def test_nothing_is_centred() -> None:
    bivectors = make.bivector(8, [1.0, 0.5]).expand(5, 8, 8)

    found = made.pca(bivectors, 2)

    np.testing.assert_allclose(found.explained, [0.8, 0.2], atol=1e-6)


def test_a_weight_of_zero_is_a_cluster_left_out() -> None:
    bivectors = mixed(5, 8)
    some = made.pca(bivectors, 3, weights=torch.tensor([0.0, 1, 1, 0, 1]))
    alone = made.pca(bivectors[[1, 2, 4]], 3)
    np.testing.assert_allclose(some.explained, alone.explained, atol=1e-6)


def test_blocks_are_read_as_the_whole() -> None:
    bivectors = mixed(30, 8)
    reads: list[int] = []

    def blocks() -> list[Tensor]:
        reads.append(1)
        return list(bivectors.split(7))

    found = made.pca(blocks, 3, solver="incremental")

    whole = made.pca(bivectors, 3)
    np.testing.assert_allclose(found.explained, whole.explained, atol=1e-5)
    assert len(reads) == 3


@every_solver
def test_the_same_seed_gives_the_same_bytes(solver: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, again = (made.pca(mixed(40, 10), 3, solver=solver, seed=4) for _ in range(2))
    assert one.planes.tobytes() == again.planes.tobytes()
    assert one.facts == again.facts
    assert torch.equal(before, torch.get_rng_state())


def test_explained_is_what_the_angles_carry() -> None:
    bivectors, weights = mixed(6, 9), torch.tensor([1.0, 2, 3, 1, 1, 5])
    shares = weights.double() / weights.sum()
    total = shares @ bivectors.square().sum((1, 2))
    for disjoint in (True, False):
        found = made.pca(bivectors, 4, weights=weights, disjoint=disjoint)
        angles = made.angles_of(bivectors, found)
        columns = made.bases_of(torch.from_numpy(found.planes).double())
        near = torch.stack([from_planes(columns, row) for row in angles])
        left = shares @ (bivectors - near).square().sum((1, 2))
        assert found.facts["together"] == pytest.approx(float(1 - left / total), abs=1e-5)
        if disjoint:
            assert found.explained.sum() == pytest.approx(found.facts["together"], abs=1e-5)
        assert (np.diff(found.explained) <= 0).all()


def test_overlapping_planes_explain_more_by_themselves() -> None:
    bivectors = mixed(6, 10)
    apart, over = (made.pca(bivectors, 4, disjoint=value) for value in (True, False))
    assert apart.disjoint
    assert not over.disjoint
    assert over.explained[1:].sum() > apart.explained[1:].sum()


def test_planes_turn_as_the_mean_cluster_does() -> None:
    bivectors, _ = shared_planes(8, 5)
    weights = torch.tensor([1.0, 2, 3, 4, 5])
    found = made.pca(bivectors, 4, weights=weights)
    assert (weights.double() @ made.angles_of(bivectors, found) >= 0).all()


def test_a_full_set_of_disjoint_planes_is_filled_up() -> None:
    flat = make.bivector(9, [1.0]).expand(3, 9, 9)

    found = made.pca(flat, 4)

    check_codebook(found)
    assert found.disjoint
    np.testing.assert_allclose(found.explained, [1, 0, 0, 0], atol=1e-6)


def test_what_cannot_be_found_is_refused() -> None:
    with pytest.raises(SpecInvalid, match="n_components 5; width 8 has 4 planes, allowed: 1 to 4"):
        made.pca(mixed(3, 8), 5)
    with pytest.raises(SpecInvalid, match="width 8 has 28 planes"):
        made.pca(mixed(3, 8), 29, disjoint=False)
    with pytest.raises(DataInvalid, match="the bivectors have 1 planes of any size"):
        made.pca(make.bivector(8, [1.0])[None], 2, disjoint=False)
    with pytest.raises(SpecInvalid, match="n_components 0; width 8"):
        made.canonical(8, 0)
    for solver in SOLVERS:
        with pytest.raises(DataInvalid, match="every bivector is zero"):
            made.pca(torch.zeros(3, 8, 8), 2, solver=solver)
    for bad in (torch.ones(2), torch.zeros(3), -torch.ones(3), torch.tensor([1, 1, math.nan])):
        with pytest.raises(DataInvalid, match="weights: shape"):
            made.pca(mixed(3, 8), 2, weights=bad)


def test_a_plane_two_codebooks_share_comes_first() -> None:
    axes = torch.eye(12).view(6, 2, 12)
    one = replace(book(axes[[0, 1]]), explained=np.array([0.5, 0.4], np.float32))
    other = replace(book(axes[[2, 1]]), explained=np.array([0.5, 0.4], np.float32))

    found = made.combine([one, other], 3)

    check_codebook(found)
    assert (found.method, found.disjoint) == ("combined", True)
    torch.testing.assert_close(projector(found.planes)[0], projector(axes[[1]].numpy())[0])
    np.testing.assert_allclose(found.explained, np.array([0.8, 0.5, 0.5]) / 1.8, atol=1e-6)
    only = made.combine([one, other], 2, weights=[0, 1])
    torch.testing.assert_close(projector(only.planes), projector(other.planes))


def test_planes_of_opposite_turn_are_one_plane() -> None:
    axes = torch.eye(8).view(4, 2, 8)
    one = replace(book(axes[[0]]), explained=np.ones(1, np.float32))
    back = replace(book(axes[[0]].flip(1)), explained=np.ones(1, np.float32))
    np.testing.assert_allclose(made.combine([one, back], 2).explained, [1, 0], atol=1e-6)


def test_codebooks_that_do_not_fit_are_refused() -> None:
    one = made.pca(mixed(3, 8), 2)
    for books, match in (
        ([], "widths none"),
        ([one, made.pca(mixed(3, 9), 2)], "widths 8, 9"),
        ([made.canonical(8, 2)], "none says of a plane"),
    ):
        with pytest.raises(DataInvalid, match=match):
            made.combine(books, 2)
    with pytest.raises(SpecInvalid, match="n_components 5"):
        made.combine([one], 5)
    with pytest.raises(DataInvalid, match="codebook: 8 dimensions, the bivectors 9"):
        made.angles_of(mixed(3, 9), one)


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        (CanonicalPlanes(n_components=3), "canonical"),
        (PrincipalPlanes(n_components=3), "pca"),
        (PrincipalPlanes(n_components=3, disjoint=False, solver="randomized"), "pca"),
        (CombinedPlanes(n_components=3, planes_per_cluster=2), "combined"),
    ],
)
def test_a_spec_says_what_is_built(
    spec: CanonicalPlanes | PrincipalPlanes | CombinedPlanes, method: str
) -> None:
    found = made.build(spec, mixed(5, 8), weights=torch.arange(1, 6), seed=2)
    check_codebook(found)
    assert (found.method, found.planes.shape) == (method, (3, 2, 8))
    if isinstance(spec, PrincipalPlanes):
        assert found.facts["solver"] == spec.solver
        assert found.disjoint is spec.disjoint


def test_combined_finds_what_clusters_that_agree_turn_in() -> None:
    bivectors, angles = shared_planes(8, 5)
    bivectors[2] = 0
    found = made.build(CombinedPlanes(n_components=4), bivectors)
    squares = angles[[0, 1, 3, 4]].square().sum(0)
    np.testing.assert_allclose(
        found.explained, (squares / squares.sum()).sort(descending=True).values, atol=1e-6
    )
    with pytest.raises(DataInvalid, match="every bivector is zero"):
        made.build(CombinedPlanes(n_components=4), torch.zeros(3, 8, 8))


def test_another_models_codebook_weighs_as_much_as_the_model() -> None:
    """However little of the model its clusters' own planes explain: both ways about the same."""
    one, other = mixed(3, 40, seed=1), mixed(3, 40, seed=2)
    spec = CombinedPlanes(n_components=8, planes_per_cluster=4)

    def joined(model: Tensor, beside: Tensor) -> Codebook:
        turning = model.square().sum((1, 2))
        own = made.clusters_own(model, spec.brought(len(model), 40))
        return made.combine_clusters(own, turning, spec, others=[made.build(spec, beside)])

    def explains(codebook: Codebook, model: Tensor) -> float:
        angles = made.angles_of(model, codebook)
        return float(2 * angles.square().sum() / model.square().sum())

    for codebook in (joined(one, other), joined(other, one)):
        of_one, of_other = explains(codebook, one), explains(codebook, other)
        assert 0.5 < of_one / of_other < 2


def test_many_clusters_bring_fewer_planes_each() -> None:
    spec = CombinedPlanes(planes_per_cluster=16)
    assert [spec.brought(clusters, 64) for clusters in (10, 256, 1000, 9000)] == [16, 16, 4, 1]
    assert spec.brought(10, 8) == 4


@make.quick
@given(st.integers(2, 11), st.floats(-6, 6), st.integers(0, 10))
def test_disjoint_rotations_are_the_exponential(width: int, size: float, seed: int) -> None:
    m = width // 2
    planes = make.basis(width, seed=seed)[:, : 2 * m].T.reshape(m, 2, width)
    generator = torch.Generator().manual_seed(seed)
    angles = size * torch.randn(3, m, generator=generator, dtype=torch.float64)
    queries = make.unit_queries(3, width)
    wanted = exponentials(queries, planes, angles)

    for turn in (made.rotate, made.rotate_in_order, made.rotate_by_blend):
        torch.testing.assert_close(turn(queries, planes, angles), wanted, rtol=0, atol=3e-7)
    exact = made.rotate(queries, planes, angles)
    torch.testing.assert_close(exact, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(exact.norm(dim=1), queries.norm(dim=1), rtol=0, atol=1e-14)


def exponentials(queries: Tensor, planes: Tensor, angles: Tensor) -> Tensor:
    columns = made.bases_of(planes)
    rows = [
        query @ torch.from_numpy(expm(from_planes(columns, row).numpy()))
        for query, row in zip(queries, angles, strict=True)
    ]
    return torch.stack(rows)


def test_overlapping_planes_blend_exactly_and_compose_in_order() -> None:
    planes, queries = overlapping(5, 8), make.unit_queries(4, 8)
    generator = torch.Generator().manual_seed(3)
    angles = torch.randn(4, 5, generator=generator, dtype=torch.float64)

    blended = made.rotate_by_blend(queries, planes, angles, tolerance=1e-13)
    torch.testing.assert_close(blended, exponentials(queries, planes, angles), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        made.rotate_by_blend(queries, planes, angles, radius=50.0, tolerance=1e-13), blended
    )

    one_by_one = queries
    for plane in range(5):
        one_by_one = exponentials(one_by_one, planes[[plane]], angles[:, [plane]])
    torch.testing.assert_close(made.rotate_in_order(queries, planes, angles), one_by_one)
    assert (one_by_one - blended).abs().max() > 0.1


@pytest.mark.parametrize("turn", [made.rotate, made.rotate_in_order, made.rotate_by_blend])
def test_rotations_are_differentiable_in_everything(turn: Callable[..., Tensor]) -> None:
    angles = torch.tensor([[0.5, -1.0], [0.1, 2.0]], dtype=torch.float64)
    inputs = (make.unit_queries(2, 5), overlapping(2, 5), angles)
    assert torch.autograd.gradcheck(turn, [tensor.requires_grad_() for tensor in inputs])


def test_no_angle_is_no_turn_and_no_query_no_answer() -> None:
    queries, planes = make.unit_queries(3, 6), overlapping(2, 6)
    for turn in (made.rotate, made.rotate_in_order, made.rotate_by_blend):
        assert torch.equal(turn(queries, planes, torch.zeros(3, 2).double()), queries)
        assert turn(queries[:0], planes, torch.zeros(0, 2).double()).shape == (0, 6)


def test_angles_on_overlapping_planes_are_the_least_squares_ones() -> None:
    planes, bivectors = overlapping(4, 6), mixed(3, 6)
    found = book(planes)
    rows = torch.stack([from_planes(p.T, torch.ones(1).double()) for p in planes]).flatten(1)
    wanted = torch.linalg.lstsq(rows.T, bivectors.flatten(1).T).solution.T
    torch.testing.assert_close(made.angles_of(bivectors, found), wanted, rtol=0, atol=1e-5)


def test_a_repeated_plane_shares_its_angle() -> None:
    plane = overlapping(1, 6)
    L = from_planes(plane[0].T, torch.tensor([0.8]).double())[None]
    found = made.angles_of(L, book(plane.expand(2, 2, 6)))
    torch.testing.assert_close(found, torch.full((1, 2), 0.4).double(), rtol=0, atol=1e-6)
