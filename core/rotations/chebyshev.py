"""The Chebyshev series of an exponential action: how long it is, and how a block runs through it.

exp(B) q = J_0(r) q + 2 sum_k J_k(r) phi_k, with phi_1 = (B / r) q and, because B is skew,
phi_{k+1} = (2 B / r) phi_k + phi_{k-1} (the Chebyshev recurrence at an imaginary argument;
Tal-Ezer and Kosloff 1984). All |phi_k| <= |q| where r >= ||B||_2, so the tail of the
Bessel functions bounds the error.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import jv
from torch import Tensor
from torch.nn.functional import embedding_bag

from core.rotations.grouped import GroupedStep
from core.rotations.mixture import Mixture

WORKSPACE_BYTES = 512 * 2**20
"""Scratch memory of one block of queries, beside the inputs and the result. Grouped products
(``core.rotations.grouped``) take up to a seventh more, and their GATHER_BYTES."""
RADIUS_STEP = math.pi / 64 * (1 + 4e-6)
"""Radii are rounded up to multiples of this, so that few Bessel series are evaluated. Never down:
beyond its radius a series grows like cosh. The sliver over pi / 64 keeps pi * (1 + rounding), a
blend of half turns in float32, in the bucket that ends at pi."""
LARGEST_RADIUS = 1e4
"""Supported ||B||_2, radians; blends of principal logarithms reach pi. Up to here the recurrence
adds no more than rounding; coefficients take 8 bytes per query and radian."""
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether oneDNN's product is compiled in; without it the same code runs on torch.mm."""


def chebyshev_degree(radius: float, tolerance: float) -> int:
    """Return the least K with 2 sum_{k > K} |J_k(radius)| <= tolerance."""
    if not (radius >= 0 and tolerance > 0):
        raise ValueError(f"radius {radius} must be >= 0 and tolerance {tolerance} > 0")
    most = math.ceil(1.5 * radius + 40 - math.log10(min(tolerance, 1.0)))
    terms = 2 * np.abs(jv(np.arange(most + 2), radius))
    tails = np.cumsum(terms[::-1])[::-1]  # tails[k] = sum of the terms k, k + 1, ...
    short = np.flatnonzero(tails[1:] <= tolerance)
    return int(short[0]) if len(short) else most + 1


@functools.lru_cache(maxsize=4096)
def series(step: int, tolerance: float) -> tuple[float, ...]:
    """Return the coefficients of phi_0 ... phi_K at the radius ``step * RADIUS_STEP``."""
    radius = step * RADIUS_STEP
    orders = np.arange(chebyshev_degree(radius, tolerance) + 1)
    values = np.where(orders == 0, 1.0, 2.0) * jv(orders, radius)
    return tuple(float(value) for value in values)


def _multiply(rows: Tensor, matrix: Tensor, *, out: Tensor) -> None:
    """Write rows @ matrix: through oneDNN for float32 on a CPU, twice MKL's rate on AMD."""
    if ONEDNN and rows.dtype == torch.float32 and not rows.is_cuda:
        product = torch.ops.mkldnn._linear_pointwise(rows, matrix.mT, None, "none", [], "")
        out.copy_(product)
    else:
        torch.mm(rows, matrix, out=out)


@dataclass(frozen=True)
class Plan:
    """N queries by descending degree, each with its series."""

    order: Tensor
    """[N] int64: which rows of the queries."""
    mixture: Mixture
    """N queries, in this order."""
    degrees: list[int]
    """[N], descending."""
    inverse_radii: Tensor
    """[N] float64: 1 / r."""
    coefficients: Tensor
    """[N, K + 1] float64, zero beyond a query's own degree."""

    def blocks(self, row_bytes: int) -> Iterator[slice]:
        """Yield runs whose scratch fits WORKSPACE_BYTES; a run holds at least one query."""
        budget = WORKSPACE_BYTES // row_bytes
        offsets = self.mixture.offsets.tolist()
        # Rows of scratch: two per entry (gathered, multiplied), five per query.
        rows = [2 * entry + 5 * query for query, entry in enumerate(offsets)]
        start = 0
        while start < len(self.degrees):
            stop = max(start + 1, bisect.bisect_right(rows, rows[start] + budget) - 1)
            yield slice(start, stop)
            start = stop


def plan(mixture: Mixture, radii: Tensor, order: Tensor, *, tolerance: float) -> Plan:
    """Choose radius and degree of the queries in ``order``.

    Args:
        mixture: Q queries over C clusters.
        radii: [Q] float64, upper bounds of ||B_q||_2.
        order: [N] int64, the rows to plan.
        tolerance: bound of the truncation error, relative to the length of a query.

    Raises:
        ValueError: a radius is above LARGEST_RADIUS, or NaN.
    """
    wanted = radii[order]
    if not bool((wanted <= LARGEST_RADIUS).all()):
        raise ValueError(
            f"a blend of norm {float(wanted.max()):.4g}; allowed: at most {LARGEST_RADIUS:g} "
            "radians, reduce weights or bivectors"
        )
    steps = (wanted / RADIUS_STEP).ceil().long()
    distinct, which = steps.unique(return_inverse=True)  # ascending radius
    all_series = [series(step, tolerance) for step in distinct.tolist()]
    width = max(map(len, all_series), default=1)
    padded = [[*row, *[0.0] * (width - len(row))] for row in all_series]
    table = torch.tensor(padded, dtype=torch.float64).reshape(-1, width)
    descending = which.argsort(descending=True, stable=True)
    which = which[descending]
    return Plan(
        order=order[descending],
        mixture=mixture.rows(order[descending]),
        degrees=[len(all_series[index]) - 1 for index in which.tolist()],
        inverse_radii=1 / (distinct.clamp(min=1).double() * RADIUS_STEP)[which],
        coefficients=table.to(which.device)[which],
    )


def run_block(
    queries: Tensor, bivectors: Tensor, plan: Plan, block: slice, *, grouped: bool | None = None
) -> Tensor:
    """Sum the series for one block: [R, d], in the order of the plan.

    Args:
        queries: [Q, d] floating.
        bivectors: [C, d, d] skew, dtype and device of ``queries``.
        plan: of the queries.
        block: a run of the plan's ``blocks``.
        grouped: multiply clusters of like size together rather than one by one; where absent
            on CUDA alone, where launches cost more than padding.
    """
    steps = GroupedStep if (queries.is_cuda if grouped is None else grouped) else _Step
    degrees = plan.degrees[block]
    current = queries[plan.order[block]]  # [R, d]
    coefficients = plan.coefficients[block].to(current.dtype)
    result = coefficients[:, :1] * current
    previous = torch.zeros_like(current)
    step: _Step | GroupedStep | None = None
    for k in range(1, degrees[0] + 1):
        active = bisect.bisect_right(degrees, -k, key=lambda degree: -degree)
        if step is None or active != step.active:
            rows = slice(block.start, block.start + active)
            step = steps.of(plan.mixture.rows(rows), plan.inverse_radii[rows], current)
        following = step.apply(current, bivectors)  # [active, d]: (2 B / r) phi
        if k == 1:
            following *= 0.5
        else:
            following += previous[:active]
        result[:active].addcmul_(coefficients[:active, k, None], following)
        previous, current = current, following
    return result


@dataclass(frozen=True)
class _Step:
    """phi -> (2 B / r) phi for the first ``active`` queries, pairs grouped by cluster."""

    active: int
    rows: Tensor
    """[E] int64: the query of each pair, pairs by cluster."""
    positions: Tensor
    """[E] int64: where the product of each entry of the mixture stands among the pairs."""
    offsets: Tensor
    """[active + 1] int64, into ``positions``."""
    weights: Tensor
    """[E]: 2 w / r."""
    spans: list[tuple[int, int, int]]
    """(cluster, start, stop) among the pairs."""
    gathered: Tensor
    """[longest span, d] scratch."""
    products: Tensor
    """[E, d] scratch."""

    @classmethod
    def of(cls, mixture: Mixture, inverse_radii: Tensor, like: Tensor) -> _Step:
        """Sort the pairs of some queries, of dtype and width of ``like``, by cluster."""
        by_cluster = mixture.clusters.argsort(stable=True)
        positions = torch.empty_like(by_cluster)
        positions[by_cluster] = torch.arange(len(by_cluster), device=by_cluster.device)
        counts = mixture.clusters.bincount(minlength=mixture.cluster_count)
        stops = counts.cumsum(0).tolist()
        spans = [
            (cluster, stop - count, stop)
            for cluster, (stop, count) in enumerate(zip(stops, counts.tolist(), strict=True))
            if count
        ]
        doubled = 2 * inverse_radii.repeat_interleave(mixture.lengths)
        longest = max((stop - start for _, start, stop in spans), default=0)
        return cls(
            active=mixture.query_count,
            rows=mixture.queries[by_cluster],
            positions=positions,
            offsets=mixture.offsets,
            weights=(mixture.weights.double() * doubled).to(like.dtype),
            spans=spans,
            gathered=like.new_empty(longest, like.shape[1]),
            products=like.new_empty(len(positions), like.shape[1]),
        )

    def apply(self, phi: Tensor, bivectors: Tensor) -> Tensor:
        """Return [active, d] from phi: [>= active, d]."""
        for cluster, start, stop in self.spans:  # A span at a time stays in cache.
            rows = self.gathered[: stop - start]
            torch.index_select(phi, 0, self.rows[start:stop], out=rows)
            _multiply(rows, bivectors[cluster], out=self.products[start:stop])
        return embedding_bag(
            self.positions,
            self.products,
            self.offsets,
            mode="sum",
            per_sample_weights=self.weights,
            include_last_offset=True,
        )
