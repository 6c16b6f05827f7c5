"""Codebooks of rotation planes: how they are made of bivectors, and rotations inside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.errors import DataInvalid
from core.rotations.plane_choice import (
    half_gram_inverse,
    inner_products,
    leading_of,
    projections,
)
from core.rotations.plane_turns import bases_of, rotate, rotate_by_blend, rotate_in_order
from core.rotations.principal import (
    Blocks,
    Components,
    in_blocks,
    leading_pairs,
    nothing_turns,
    principal_components,
    weigh,
)
from core.rotations.skew import from_planes
from core.specs.codebooks import CanonicalPlanes, CombinedPlanes, PrincipalPlanes, check_planes
from core.tensors.codebooks import Codebook

__all__ = [
    "Codebook",
    "angles_of",
    "bases_of",
    "build",
    "canonical",
    "combine",
    "pca",
    "rotate",
    "rotate_by_blend",
    "rotate_in_order",
]


def canonical(dim: int, n_components: int) -> Codebook:
    """Return the planes (2i, 2i+1) of the axes; they explain nothing, being made from nothing.

    Raises:
        SpecInvalid: more planes than d // 2, or none.
    """
    check_planes(n_components, dim, "/codebook/n_components")
    axes = torch.eye(dim)[: 2 * n_components].view(n_components, 2, dim)
    return Codebook(axes.numpy(), torch.zeros(n_components).numpy(), "canonical")


def pca(
    bivectors: Tensor | Blocks,
    n_components: int,
    *,
    weights: Tensor | None = None,
    solver: str = "full",
    disjoint: bool = True,
    seed: int = 0,
) -> Codebook:
    """Return the leading planes of the principal components of bivectors.

    Component j, of variance v_j, splits into planes of angles t_ji; plane (j, i) has the size
    2 v_j t_ji^2, and they are taken in that order. Disjoint ones are made orthogonal to all
    before them, which leaves of a later one what stands out. At most ``n_components`` components
    are looked at. ``explained`` is measured on the bivectors themselves.

    Args:
        bivectors: [C, d, d] skew, or a function that gives them in blocks (read
            three times).
        n_components: m; disjoint at most d // 2.
        weights: [C] of the clusters, for example their training queries; equal where absent.
        solver: full, randomized or incremental; see ``principal_components``.
        disjoint: whether planes are made orthogonal to each other.
        seed: of the randomized solver.

    Returns:
        m planes, the most explaining first, each turned so that the weighted mean bivector
        rotates a towards b.

    Raises:
        SpecInvalid: more planes than the width has.
        DataInvalid: every bivector is zero, or there are too few overlapping planes.
    """
    blocks = in_blocks(bivectors)
    counts, dim = [], 0
    for block in blocks():
        counts.append(len(block))
        dim = block.shape[1]
    most = None if disjoint else dim * (dim - 1) // 2
    check_planes(n_components, dim, "/codebook/n_components", most=most)
    shares = weigh(weights, sum(counts))
    found = principal_components(bivectors, shares, most=n_components, solver=solver, seed=seed)
    planes = leading_of(found, n_components, disjoint=disjoint)
    facts: dict[str, Any] = {
        "solver": solver,
        "seed": seed,
        "clusters": sum(counts),
        "components": len(found.values),
    }
    return _measured(planes, blocks, shares, "pca", facts)


def combine(
    codebooks: Sequence[Codebook], n_components: int, *, weights: Sequence[float] | None = None
) -> Codebook:
    """Return disjoint planes for several codebooks, each plane weighed by what it explains.

    The leading planes of the principal components of all planes P_i, weighed by
    ``weights * explained``: a plane that two codebooks share counts twice. Inner products need no
    d x d matrix: <P_i, P_j> = 2 [(a_i a_j)(b_i b_j) - (a_i b_j)(b_i a_j)]. ``explained`` is the
    share of these weighted planes.

    Memory: four float64 matrices of M x M, M the planes of all codebooks.

    Args:
        codebooks: of one width.
        n_components: m, at most d // 2.
        weights: of the codebooks, >= 0; equal where absent.

    Raises:
        SpecInvalid: more planes than the width has.
        DataInvalid: no codebook, different widths, or none that explains anything (canonical).
    """
    if not codebooks or len({codebook.dim for codebook in codebooks}) > 1:
        dims = ", ".join(str(codebook.dim) for codebook in codebooks) or "none"
        raise DataInvalid(f"codebooks: widths {dims}; needed one or more of the same width")
    dim = codebooks[0].dim
    check_planes(n_components, dim, "/codebook/n_components")
    given = weigh(None if weights is None else torch.tensor(weights), len(codebooks))
    planes = torch.cat([torch.from_numpy(codebook.planes) for codebook in codebooks]).double()
    sizes = torch.cat(
        [
            torch.from_numpy(codebook.explained).double() * weight
            for codebook, weight in zip(codebooks, given, strict=True)
        ]
    )
    planes, sizes = planes[sizes > 0], sizes[sizes > 0]
    if not len(sizes):
        raise DataInvalid(
            "codebooks: none says of a plane that it explains anything, as canonical ones do not; "
            "combine codebooks that were made from models"
        )
    found = _components_of_planes(planes, sizes / sizes.sum(), most=n_components)
    chosen = leading_of(found, n_components, disjoint=True)
    inner = inner_products(chosen, planes) / 2  # [m, M]: a^T P_i b
    shares = inner.square() @ (sizes / sizes.sum())
    order = shares.argsort(descending=True, stable=True)
    facts = {"sources": len(codebooks), "together": float(shares.sum().clamp(max=1))}
    return _codebook(chosen[order], shares[order], "combined", facts)


def build(
    spec: CanonicalPlanes | PrincipalPlanes | CombinedPlanes,
    bivectors: Tensor,
    *,
    weights: Tensor | None = None,
    seed: int = 0,
) -> Codebook:
    """Return the codebook a spec names, from the clusters' bivectors.

    Args:
        spec: which planes.
        bivectors: [C, d, d] skew.
        weights: [C] of the clusters; equal where absent.
        seed: of a randomized solver.
    """
    if isinstance(spec, CanonicalPlanes):
        return canonical(bivectors.shape[1], spec.n_components)
    if isinstance(spec, PrincipalPlanes):
        return pca(
            bivectors,
            spec.n_components,
            weights=weights,
            solver=spec.solver,
            disjoint=spec.disjoint,
            seed=seed,
        )
    squares = bivectors.double().square().sum((1, 2)).cpu()
    turning = weigh(weights, len(bivectors)) * squares
    clusters, d, _ = bivectors.shape
    own = clusters_own(bivectors, spec.brought(clusters, d))
    return combine_clusters(own, turning, spec)


def clusters_own(bivectors: Tensor, planes: int) -> list[Codebook | None]:
    """Return every cluster's own leading planes as a codebook; None where it does not turn."""
    return [pca(bivector[None], planes) if bool(bivector.any()) else None for bivector in bivectors]


def combine_clusters(
    own: Sequence[Codebook | None],
    turning: Tensor,
    spec: CombinedPlanes,
    *,
    others: Sequence[Codebook] = (),
) -> Codebook:
    """Combine the clusters' own codebooks, and other models', each of which weighs as all those.

    What a model's planes explain is less than all it turns, the less the more dimensions that
    fills: each model is weighed by what its planes explain together, so that all bring as much.

    Args:
        own: of ``clusters_own``, C of them.
        turning: [C], p_c |L_c|^2.
        spec: how many planes.
        others: of the same width.

    Raises:
        DataInvalid: no cluster turns, or another codebook explains nothing.
    """
    if not float(turning.sum()) > 0:
        raise nothing_turns()
    shares = (turning / turning.sum()).tolist()
    sources = [(codebook, share) for codebook, share in zip(own, shares, strict=True) if codebook]
    together = sum(share * float(codebook.explained.sum()) for codebook, share in sources)
    sources = [(codebook, share / together) for codebook, share in sources]
    for number, other in enumerate(others):
        explained = float(other.explained.sum())
        if not explained > 0:
            raise DataInvalid(
                f"with_codebooks: number {number + 1} says of no plane that it explains anything, "
                "as canonical ones do not; give one that was made from a model"
            )
        sources.append((other, 1.0 / explained))
    made = combine(
        [codebook for codebook, _ in sources],
        spec.n_components,
        weights=[share for _, share in sources],
    )
    facts = {**made.facts, "planes_per_cluster": spec.planes_per_cluster, "clusters": len(own)}
    return Codebook(made.planes, made.explained, made.method, facts)


def angles_of(bivectors: Tensor, codebook: Codebook) -> Tensor:
    """Return the least-squares angles of bivectors on the planes: argmin |L - sum_i theta_i P_i|_F.

    On disjoint planes theta_i = a_i^T L b_i; on overlapping ones the normal equations are solved,
    of least norm where planes repeat.

    Args:
        bivectors: [C, d, d] skew.
        codebook: of width d.

    Returns:
        [C, m] radians, dtype and device of ``bivectors``; summed in float64.

    Raises:
        DataInvalid: the widths differ.
    """
    if bivectors.shape[1] != codebook.dim:
        raise DataInvalid(
            f"codebook: {codebook.dim} dimensions, the bivectors {bivectors.shape[1]}"
        )
    planes = torch.from_numpy(codebook.planes).double().to(bivectors.device)
    sides = projections(bivectors, planes)
    if not codebook.disjoint:
        sides = sides @ half_gram_inverse(planes)
    return sides.to(bivectors.dtype)


def _measured(
    planes: Tensor, blocks: Blocks, weights: Tensor, method: str, facts: dict[str, Any]
) -> Codebook:
    """Order planes by what they explain of the bivectors, and turn them as the mean does."""
    m = len(planes)
    inverse = half_gram_inverse(planes)
    shares, means = torch.zeros(m).double(), torch.zeros(m).double()
    together, total, start = 0.0, 0.0, 0
    for block in blocks():
        own = weights[start : start + len(block)]
        start += len(block)
        angles = projections(block, planes.to(block.device)).cpu()  # [b, m]
        shares += own @ angles.square()
        means += own @ angles
        together += float(own @ ((angles @ inverse) * angles).sum(1))
        total += float(own @ block.double().square().sum((1, 2)).cpu())
    shares = 2 * shares / total
    planes = torch.where((means < 0)[:, None, None], planes.flip(1), planes)
    order = shares.argsort(descending=True, stable=True)
    facts = {**facts, "together": min(1.0, 2 * together / total)}
    return _codebook(planes[order], shares[order], method, facts)


def _codebook(planes: Tensor, shares: Tensor, method: str, facts: dict[str, Any]) -> Codebook:
    return Codebook(
        planes.float().contiguous().numpy(), shares.clamp(0, 1).float().numpy(), method, facts
    )


def _components_of_planes(planes: Tensor, weights: Tensor, *, most: int) -> Components:
    """Principal components of sqrt(weight) P_i, through their Gram matrix."""
    roots = weights.sqrt()
    gram = roots[:, None] * inner_products(planes, planes) * roots
    variances, vectors = leading_pairs(gram, most)
    mix = vectors * roots[:, None] / variances.sqrt()  # [M, k]
    values = torch.stack([from_planes(bases_of(planes), column) for column in mix.unbind(1)])
    return Components(values.float(), variances)
