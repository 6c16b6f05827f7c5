"""Rotate queries by the exponential of their own blend of bivectors, never forming it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from core.rotations.chebyshev import Plan, chebyshev_degree, plan, run_block
from core.rotations.mixture import Mixture

__all__ = ["Series", "chebyshev_degree", "exp_action", "spectral_norms"]

Series = Callable[[Tensor, Tensor, Plan, slice], Tensor]
"""(queries [Q, d], bivectors [C, d, d], plan, block) -> the sums of the block, in the plan's order;
``run_block`` on torch, ``core.rotations.jax_action.JaxSeries`` on JAX."""

DROP_SHARE = 1 / 16
"""Share of the tolerance spent on dropping small weights; the rest bounds the series."""


def spectral_norms(bivectors: Tensor) -> Tensor:
    """Bound ||L||_2 from above, tightly: the root of the largest eigenvalue of L^T L.

    Args:
        bivectors: [C, d, d], skew.

    Returns:
        [C] float64, on the device of ``bivectors``, at most 1e-8 (relative) above the norm.
    """
    squares = [torch.linalg.eigvalsh(L.mT @ L)[-1] for L in map(Tensor.double, bivectors)]
    if not squares:
        return bivectors.new_zeros(0, dtype=torch.float64)
    return torch.stack(squares).clamp(min=0).sqrt() * (1 + 1e-9)


def exp_action(  # noqa: PLR0913 - what goes around the series, by keyword
    queries: Tensor,
    bivectors: Tensor,
    mixture: Mixture,
    *,
    tolerance: float = 1e-6,
    norms: Tensor | None = None,
    log_scales: Tensor | None = None,
    anchor: Tensor | None = None,
    rotations: Tensor | None = None,
    series: Series = run_block,
) -> Tensor:
    """Compute y_q = q G exp(sum_c w_qc L_c) for every query; no gradient.

    In exact arithmetic |dy| <= tolerance |q| (2-norm), for sum_c |w_qc| ||L_c|| up to 1e4; rounding
    adds a few units in the last place (more where torch's float32 matmul precision is set below
    "highest"). The same inputs give the same bytes on the same device with as many threads.
    Scratch memory stays below ``chebyshev.WORKSPACE_BYTES``, beside a copy of the queries.

    Args:
        queries: [Q, d] float32 or float64, one per row.
        bivectors: [C, d, d] skew, same dtype and device.
        mixture: Q queries over C clusters, same device.
        tolerance: > 0, relative to the length of the query.
        norms: [C], upper bounds of ||L_c||_2; where absent ``spectral_norms`` computes them,
            which costs as much as thousands of queries: keep them.
        log_scales: [C]; the result is multiplied by exp(sum_c w_qc log_scales_c).
        anchor: G, [d, d], applied to each query first; the identity where absent.
        rotations: [C, d, d], W_c = G exp(L_c), any float dtype: a query with one cluster, at
            weight 1, is then q @ W_c.
        series: what sums a block of the Chebyshev series.

    Returns:
        [Q, d], dtype and device of ``queries``.
    """
    _check(queries, bivectors, mixture, tolerance)
    norms = (spectral_norms(bivectors) if norms is None else norms).double()
    scales = None if log_scales is None else mixture.sums(log_scales).exp()
    budget = DROP_SHARE * tolerance
    mixture = _without_tails(mixture, norms, budget=budget)
    single = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    if rotations is not None:
        single = _is_single(mixture, norms, budget=budget)
    result = torch.empty_like(queries)
    with torch.no_grad():
        if rotations is not None:
            _rotate_singles(result, queries, rotations, mixture, single)
        radii = mixture.radii(norms)
        rest = plan(mixture, radii, (~single).nonzero().flatten(), tolerance=tolerance - budget)
        turned = queries if anchor is None else queries @ anchor
        for block in rest.blocks(queries.shape[1] * queries.element_size()):
            result[rest.order[block]] = series(turned, bivectors, rest, block)
        if scales is not None:
            result *= scales.to(result.dtype)[:, None]
    return result


def _check(queries: Tensor, bivectors: Tensor, mixture: Mixture, tolerance: float) -> None:
    """Refuse shapes and dtypes that do not fit together."""
    Q, d = queries.shape
    expected = (mixture.cluster_count, d, d)
    if mixture.query_count != Q or tuple(bivectors.shape) != expected:
        raise ValueError(
            f"{Q} queries of width {d} need a mixture of as many (got {mixture.query_count}) and "
            f"bivectors of shape {expected} (got {tuple(bivectors.shape)})"
        )
    if {queries.dtype, bivectors.dtype} not in ({torch.float32}, {torch.float64}):
        raise ValueError(
            "queries and bivectors must share a dtype, float32 or float64, "
            f"not {queries.dtype} and {bivectors.dtype}"
        )
    if not tolerance > 0:
        raise ValueError(f"tolerance {tolerance} must be > 0")


def _without_tails(mixture: Mixture, norms: Tensor, *, budget: float) -> Mixture:
    """Drop weights with w ||L|| <= budget / entries: |dy| <= |q| sum w ||L|| <= budget |q|.

    Holds because ||exp(A) - exp(B)|| <= ||A - B|| for skew A and B.
    """
    shares = budget / mixture.lengths.clamp(min=1)
    reach = mixture.weights.double().abs() * norms[mixture.clusters]
    keep = reach > shares.repeat_interleave(mixture.lengths, output_size=len(reach))
    return mixture if bool(keep.all()) else mixture.kept(keep)


def _is_single(mixture: Mixture, norms: Tensor, *, budget: float) -> Tensor:
    """[Q] bool: one cluster, at weight 1 up to ``budget`` in the result."""
    single = mixture.lengths == 1
    first = mixture.offsets[:-1][single]
    reach = (mixture.weights.double()[first] - 1).abs() * norms[mixture.clusters[first]]
    single[single.clone()] = reach <= budget
    return single


def _rotate_singles(
    result: Tensor, queries: Tensor, rotations: Tensor, mixture: Mixture, single: Tensor
) -> None:
    """Write q @ W_c into the rows of ``result`` where ``single`` ([Q] bool) holds."""
    rows = single.nonzero().flatten()
    clusters, by_cluster = mixture.clusters[mixture.offsets[:-1][rows]].sort(stable=True)
    distinct, counts = clusters.unique_consecutive(return_counts=True)
    groups = rows[by_cluster].split(counts.tolist())
    for cluster, group in zip(distinct.tolist(), groups, strict=True):
        result[group] = queries[group] @ rotations[cluster].to(queries.dtype)
