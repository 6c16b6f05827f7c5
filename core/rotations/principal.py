"""Principal components of weighted bivectors, uncentred, by three solvers that agree.

Uncentred, because a codebook has no constant term: q G exp(sum_i theta_i P_i) must reach the mean
bivector through the planes like any other. (After an anchor G the mean is small anyway.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from core.errors import DataInvalid

Blocks = Callable[[], Iterable[Tensor]]
"""Gives blocks [b, d, d] of bivectors, in the same order each time it is called."""

BLOCK = 16
"""Clusters read at a time."""
NOISE = 1e-12
"""Variance, relative to the largest, below which a component is rounding."""
OVERSAMPLES = 10
"""Components kept beyond those asked for, by the two solvers that are not exact."""
POWER_ITERATIONS = 7
COLUMNS = 1 << 16
"""Columns widened to float64 at a time."""


@dataclass(frozen=True)
class Components:
    """The leading terms of sum_c p_c vec(L_c) vec(L_c)^T, p_c the weights, summing to 1."""

    values: Tensor
    """[k, d, d] skew, unit Frobenius norm, mutually orthogonal."""
    variances: Tensor
    """[k] float64, descending, > 0, in squared radians."""


def weigh(weights: Tensor | None, count: int) -> Tensor:
    """Return [C] float64 summing to 1; equal ones where none are given.

    Raises:
        DataInvalid: negative, not finite, all zero or not one per cluster.
    """
    if weights is None:
        return torch.full((count,), 1 / max(count, 1), dtype=torch.float64)
    given = weights.detach().cpu().double()
    if (
        given.shape != (count,)
        or not bool((given >= 0).all())
        or not 0 < float(given.sum()) < 1e300
    ):
        raise DataInvalid(
            f"weights: shape {list(given.shape)}, sum {float(given.sum()):g}; needed {count} "
            "finite ones >= 0, not all zero"
        )
    return given / given.sum()


def in_blocks(bivectors: Tensor | Blocks) -> Blocks:
    """Return a function that gives bivectors in blocks."""
    return (lambda: bivectors.split(BLOCK)) if isinstance(bivectors, Tensor) else bivectors


def principal_components(
    bivectors: Tensor | Blocks, weights: Tensor, *, most: int, solver: str = "full", seed: int = 0
) -> Components:
    """Find at most ``most`` components; fewer where the bivectors span fewer.

    Memory beside a block: *full* holds all C bivectors once, and its Gram matrix [C, C];
    *randomized* holds their upper triangles and a few [most + 10, d^2 / 2]; *incremental* holds
    (most + 10 + b) d^2 numbers at most twice, whatever C is.

    Args:
        bivectors: [C, d, d] skew, float32 or float64, or blocks of them.
        weights: [C] float64 summing to 1.
        most: components, >= 1.
        solver: full (exact), randomized (Halko et al. 2011, algorithm 5.1 after power iterations;
            exact where most + 10 >= C), incremental (merges block after block: Ross et al. 2008,
            without its mean; exact where most + 10 >= C).
        seed: of the randomized solver; the others draw nothing.

    Raises:
        DataInvalid: every bivector is zero.
    """
    if solver == "incremental":
        return _incremental(in_blocks(bivectors), weights, most)
    whole = bivectors if isinstance(bivectors, Tensor) else torch.cat(list(bivectors()))
    solve = {"full": _full, "randomized": _randomized}[solver]
    return solve(whole, weights, most, seed)


def gram_of(rows: Tensor) -> Tensor:
    """Return rows rows^T in float64: [n, n] from [n, D]; D is widened in pieces."""
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for piece in rows.split(COLUMNS, dim=1):
        wide = piece.double()
        gram.addmm_(wide, wide.T)
    return gram


def nothing_turns() -> DataInvalid:
    """Return the error of bivectors that are all zero."""
    return DataInvalid(
        "every bivector is zero: the clusters rotate alike, and there are no planes to find; "
        "method 'canonical' needs none"
    )


def leading_pairs(gram: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [k] descending, above rounding, and eigenvectors [n, k] of a Gram matrix.

    Raises:
        DataInvalid: it is zero.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    count = min(most, int((values > NOISE * values[0].clamp(min=0)).sum()))
    if not count:
        raise nothing_turns()
    return values[:count], vectors[:, :count]


def _full(whole: Tensor, weights: Tensor, most: int, seed: int) -> Components:
    del seed
    roots = weights.sqrt().to(whole.device)
    rows = whole.flatten(1)
    gram = roots[:, None] * gram_of(rows) * roots
    variances, vectors = leading_pairs(gram, most)
    mix = (vectors * roots[:, None] / variances.sqrt()).T.to(whole.dtype)  # [k, C]
    return Components((mix @ rows).view(-1, *whole.shape[1:]), variances)


def _randomized(whole: Tensor, weights: Tensor, most: int, seed: int) -> Components:
    rows = _triangles(whole, weights.sqrt().to(whole))
    if not bool(rows.any()):
        raise nothing_turns()
    _, sizes, vectors = randomized_svd(
        rows.cpu().numpy(),
        n_components=min(most, *rows.shape),
        n_oversamples=OVERSAMPLES,
        n_iter=POWER_ITERATIONS,
        power_iteration_normalizer="QR",
        random_state=seed,
    )
    variances = torch.from_numpy(sizes).double().square()
    count = int((variances > NOISE * variances[0]).sum())
    found = torch.from_numpy(vectors[:count]).to(whole)
    return Components(_skew(found, whole.shape[1]), variances[:count])


def _incremental(blocks: Blocks, weights: Tensor, most: int) -> Components:
    """Keep sigma_j V_j of what was read so far; a block joins as further rows."""
    kept: Tensor | None = None
    start, dim, variances = 0, 0, weights
    for block in blocks():
        dim, stop = block.shape[1], start + len(block)
        rows = _triangles(block, weights[start:stop].sqrt().to(block))
        start = stop
        rows = rows if kept is None else torch.cat([kept, rows])
        if not bool(rows.any()):
            continue
        variances, vectors = leading_pairs(gram_of(rows), most + OVERSAMPLES)
        kept = vectors.T.to(rows.dtype) @ rows
    if kept is None:
        raise nothing_turns()
    sizes = variances[:most].sqrt()
    return Components(_skew(kept[:most] / sizes[:, None].to(kept), dim), variances[:most])


def _triangles(block: Tensor, scales: Tensor) -> Tensor:
    """[b, d, d] skew -> [b, d (d - 1) / 2] rows with the same inner products, scaled."""
    d = block.shape[1]
    upper = torch.triu_indices(d, d, 1, device=block.device)
    return block[:, upper[0], upper[1]] * (scales * 2**0.5)[:, None]


def _skew(rows: Tensor, d: int) -> Tensor:
    """Undo ``_triangles``."""
    upper = torch.triu_indices(d, d, 1, device=rows.device)
    half = rows.new_zeros(len(rows), d, d)
    half[:, upper[0], upper[1]] = rows * 0.5**0.5
    return half - half.mT
