"""The exponential action on JAX: one compiled function, ``lax.scan`` over the degree.

The plan (radii, degrees, coefficients) is torch's own, from ``core.rotations.chebyshev``; only the
series runs on JAX. The trap is to write it as documents do: ``jax.scipy.linalg.expm`` under vmap
runs every branch of its Pade table and all of its squarings for every query, because a batched
condition becomes a select; and it forms exp(B), d^3 work where the action needs d^2. The other one
is ``lax.ragged_dot``, which on a CPU multiplies every row with every cluster's matrix.

Pairs of query and cluster are sorted by cluster and cut into tiles of T rows, each with one matrix.
How many tiles run is a number, not a shape: the tiles stand by descending degree, and at degree k
only those with a query that still needs it are multiplied. So sizes are rounded up generously (R
rows, M entries a query, K degrees to powers of two, T one of TILE_ROWS) and few are compiled.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.dlpack import from_dlpack

from core.rotations.chebyshev import WORKSPACE_BYTES, Plan
from core.tensors.shards import Array

TILE_ROWS = (16, 48, 128)
"""T, from which each block takes what pads least."""
MATRIX_ROWS = 32
"""Rows whose product takes as long as fetching one matrix: what a tile more costs."""
LEAST_ROWS, MOST_ROWS = 64, 16384
"""R lies between these, a power of two."""
LEAST_ENTRIES, LEAST_DEGREE = 4, 8
"""M and K are powers of two from here up."""
GATHER_BYTES = 128 * 2**20
"""Bivectors copied for tiles that a GPU multiplies at once."""


class JaxSeries:
    """A ``Series`` of ``core.rotations.action.exp_action`` that runs on JAX.

    Products are IEEE float32 or float64 (``Precision.HIGHEST``: no TF32), sums have a fixed order:
    the same bytes twice on the same device. Scratch memory stays below WORKSPACE_BYTES, beside
    GATHER_BYTES on a GPU and, where torch's memory cannot be shared, a copy of the bivectors.

    Compiled at most once per (R, M, T, K) and model: with tolerance 1e-6, blends up to pi and up to
    16 clusters a query 9 x 3 x 3 x 2 = 162 sizes, of which blocks of one length meet one to three.
    """

    def __init__(self, *, tiles_at_once: int | None = None) -> None:
        """Compile nothing yet.

        Args:
            tiles_at_once: products in one batch, >= 1; where absent one on a CPU, where each
                matrix then stays in cache, and as many as GATHER_BYTES allow on a GPU.
        """
        if tiles_at_once is not None and tiles_at_once < 1:
            raise ValueError(f"tiles_at_once {tiles_at_once}; allowed: from 1 up, or None")
        # Else JAX takes three quarters of a GPU's memory at its first touch, and torch starves.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # noqa: TID251 - JAX's own
        self._at_once = tiles_at_once
        self._kept: tuple[Tensor, jax.Array] | None = None

    def __call__(self, queries: Tensor, bivectors: Tensor, plan: Plan, block: slice) -> Tensor:
        """Sum the series for one block: [R, d], in the order of the plan.

        Args:
            queries: [Q, d] float32 or float64.
            bivectors: [C, d, d] skew, dtype and device of ``queries``; not to be changed
                afterwards, because the last ones given stay on the device for the next block.
            plan: of the queries.
            block: a run of the plan.
        """
        with jax.enable_x64(queries.dtype == torch.float64):
            matrices = self._shared(bivectors)
            at_once = self._at_once or _tiles_at_once(bivectors)
            parts = [
                _run(queries, matrices, Tiles.of(plan, part, queries, at_once=at_once))
                for part in _parts(plan, block, queries, at_once=at_once)
            ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _shared(self, bivectors: Tensor) -> jax.Array:
        if self._kept is None or self._kept[0] is not bivectors:
            self._kept = None  # Frees the last ones first.
            self._kept = bivectors, to_jax(bivectors)
        return self._kept[1]


def device_of(device: torch.device) -> Any:
    """Return JAX's name for a device of torch.

    Raises:
        RuntimeError: JAX has no such device: it was installed for another platform.
    """
    return jax.devices(device.type)[device.index or 0]


def to_jax(tensor: Tensor) -> jax.Array:
    """Hand a tensor to JAX, sharing its memory where its alignment allows it."""
    array: jax.Array = jax.dlpack.from_dlpack(tensor.contiguous(), device=device_of(tensor.device))
    return array


def _tiles_at_once(bivectors: Tensor) -> int:
    """One on a CPU; on a GPU a power of two, so that the ends of blocks are shared."""
    if not bivectors.is_cuda:
        return 1
    matrix_bytes = bivectors.shape[-1] ** 2 * bivectors.element_size()
    return int(1 << max(0, (GATHER_BYTES // max(matrix_bytes, 1)).bit_length() - 1))


def _power(count: int, least: int) -> int:
    """Return the least power of two that is >= both."""
    return int(1 << (max(count, least) - 1).bit_length())


def _capacity(rows: int, entries: int, tile_rows: int, clusters: int, at_once: int) -> int:
    """Return how many tiles any mixture of this size may need: a multiple of ``at_once``."""
    pairs = rows * entries
    tiles = min(clusters, pairs) + pairs // tile_rows
    return -(-max(tiles, 1) // at_once) * at_once


def _parts(plan: Plan, block: slice, like: Tensor, *, at_once: int) -> Iterator[slice]:
    """Yield runs of a block whose scratch fits WORKSPACE_BYTES; at most MOST_ROWS, at least one."""
    entries = _entries(plan)
    budget = WORKSPACE_BYTES // (like.shape[1] * like.element_size())
    most = MOST_ROWS
    while most > LEAST_ROWS and budget < _scratch_rows(
        most, entries, TILE_ROWS[0], plan.mixture.cluster_count, at_once
    ):
        most //= 2
    for start in range(block.start, block.stop, most):
        yield slice(start, min(start + most, block.stop))


def _scratch_rows(rows: int, entries: int, tile_rows: int, clusters: int, at_once: int) -> int:
    """Rows of scratch: the tiles' products, one batch gathered and multiplied, six per query."""
    tiles = _capacity(rows, entries, tile_rows, clusters, at_once) + 2 * at_once
    return tiles * tile_rows + 6 * rows


def _entries(plan: Plan) -> int:
    """M: of the whole plan, so that its blocks share it."""
    return _power(int(plan.mixture.lengths.max()), LEAST_ENTRIES)


class Layout(NamedTuple):
    """The pairs of R queries in G tiles. Padding has weight, coefficient and degree 0."""

    rows: Any
    """[G, T] int32: the query of each row of a tile."""
    clusters: Any
    """[G] int32: the matrix of each tile."""
    places: Any
    """[M, R] int32: where the product of a query's m-th entry stands among the tiles' rows."""
    weights: Any
    """[M, R]: 2 w / r."""
    coefficients: Any
    """[K + 1, R]."""
    degrees: Any
    """[R] int32."""
    batches: Any
    """[K] int32: batches of tiles that hold a query of degree k or more; k from 1."""


@dataclass(frozen=True)
class Tiles:
    """A part of a plan, padded to one of few sizes."""

    start: Tensor
    """[R, d]: the queries."""
    count: int
    """Of them, without padding."""
    layout: Layout
    """numpy arrays."""
    at_once: int
    """Tiles in a batch."""

    @property
    def size(self) -> tuple[int, int, int, int]:
        """(R, M, T, K): what is compiled once."""
        (M, R), (_, T) = self.layout.places.shape, self.layout.rows.shape
        return R, M, T, len(self.layout.batches)

    @classmethod
    def of(cls, plan: Plan, part: slice, queries: Tensor, *, at_once: int) -> Tiles:
        """Cut the pairs of a part, of descending degree, into tiles."""
        n, d = part.stop - part.start, queries.shape[1]
        R, M = _power(n, LEAST_ROWS), _entries(plan)
        return cls(
            start=pad(queries[plan.order[part]], (0, 0, 0, R - n)),
            count=n,
            layout=_layout(plan, part, R, M, d * queries.element_size(), at_once),
            at_once=at_once,
        )


def _layout(plan: Plan, part: slice, R: int, M: int, row_bytes: int, at_once: int) -> Layout:
    """Place the pairs of a part; numbers in float64 (float32 where JAX has no float64 on)."""
    n = part.stop - part.start
    mixture = plan.mixture.rows(part)
    lengths, clusters = (t.cpu().numpy() for t in (mixture.lengths, mixture.clusters))
    degrees = np.zeros(R, np.int32)
    degrees[:n] = plan.degrees[part]
    counts = np.bincount(clusters, minlength=mixture.cluster_count)
    T = _tile_rows(counts, R, M, row_bytes, at_once)
    G = _capacity(R, M, T, mixture.cluster_count, at_once)
    of_entry = np.repeat(np.arange(n), lengths)
    tile, slot, tile_clusters, tile_degrees = _place(clusters, degrees[of_entry], counts, T)
    nth = np.arange(len(clusters)) - (lengths.cumsum() - lengths)[of_entry]
    weights = mixture.weights.double() * 2 * plan.inverse_radii[part][mixture.queries]
    K = _power(int(degrees[0]), LEAST_DEGREE)
    known = plan.coefficients[part, : K + 1].cpu().numpy().T
    active = (tile_degrees >= np.arange(1, K + 1)[:, None]).sum(1)
    return Layout(
        rows=_table((G, T), (tile, slot), of_entry, np.int32),
        clusters=_table((G,), slice(len(tile_clusters)), tile_clusters, np.int32),
        places=_table((M, R), (nth, of_entry), tile * T + slot, np.int32),
        weights=_table((M, R), (nth, of_entry), weights.cpu().numpy(), np.float64),
        coefficients=_table((K + 1, R), (slice(len(known)), slice(n)), known, np.float64),
        degrees=degrees,
        batches=-(-active // at_once).astype(np.int32),
    )


def _tile_rows(counts: Array, rows: int, entries: int, row_bytes: int, at_once: int) -> int:
    """Choose T: the least time of those whose scratch fits, else the smallest."""
    fitting = [
        T
        for T in TILE_ROWS
        if row_bytes * _scratch_rows(rows, entries, T, len(counts), at_once) <= WORKSPACE_BYTES
    ]
    return min(
        fitting or TILE_ROWS[:1], key=lambda T: int((-(-counts // T)).sum()) * (T + MATRIX_ROWS)
    )


def _place(
    clusters: Array, degrees: Array, counts: Array, T: int
) -> tuple[Array, Array, Array, Array]:
    """Put E pairs, of descending degree within a cluster, into tiles of descending degree.

    Returns:
        [E] the tile and [E] the row in it of each pair; of each tile its cluster and its degree.
    """
    by_cluster = clusters.argsort(kind="stable")
    tiles_of = -(-counts // T)
    first_pair, first_tile = counts.cumsum() - counts, tiles_of.cumsum() - tiles_of
    sorted_clusters = clusters[by_cluster]
    rank = np.arange(len(clusters)) - first_pair[sorted_clusters]
    tile_sorted = first_tile[sorted_clusters] + rank // T
    tile, slot = np.empty_like(by_cluster), np.empty_like(by_cluster)
    tile[by_cluster], slot[by_cluster] = tile_sorted, rank % T
    leads = by_cluster[rank % T == 0]  # [tiles]: the pair of highest degree in each
    descending = (-degrees[leads]).argsort(kind="stable")
    moved = np.empty_like(descending)
    moved[descending] = np.arange(len(descending))
    return moved[tile], slot, clusters[leads][descending], degrees[leads][descending]


def _table(shape: tuple[int, ...], where: Any, values: Array, dtype: Any) -> Array:
    """Zeros of ``shape`` with ``values`` at ``where``."""
    table = np.zeros(shape, dtype)
    table[where] = values
    return table


def _run(queries: Tensor, matrices: jax.Array, tiles: Tiles) -> Tensor:
    """Return [count, d]."""
    layout = jax.device_put(tiles.layout, device_of(queries.device))
    result = _compiled(tiles.at_once)(to_jax(tiles.start), matrices, layout)
    answers: Tensor = from_dlpack(result.block_until_ready())
    return answers[: tiles.count]


@functools.cache
def _compiled(at_once: int) -> Any:
    """The one function; JAX keeps what it compiled per size."""
    return jax.jit(functools.partial(_series, at_once=at_once))


def _series(start: Any, matrices: Any, layout: Layout, *, at_once: int) -> Any:
    """Sum the series: [R, d] from the queries [R, d] and the bivectors [C, d, d]."""
    (_, d), (G, T) = start.shape, layout.rows.shape
    weights, coefficients = (
        numbers.astype(start.dtype) for numbers in (layout.weights, layout.coefficients)
    )

    def multiply(phi: Any, products: Any, count: Any) -> Any:
        def batch(index: Any, products: Any) -> Any:
            at = index * at_once
            given = phi[lax.dynamic_slice_in_dim(layout.rows, at, at_once)]  # [at_once, T, d]
            if at_once == 1:  # A plain product, which a CPU computes a sixth faster.
                matrix = lax.dynamic_index_in_dim(matrices, layout.clusters[at], keepdims=False)
                turned = jnp.dot(given[0], matrix, precision=lax.Precision.HIGHEST)[None]
            else:
                several = matrices[lax.dynamic_slice_in_dim(layout.clusters, at, at_once)]
                turned = jnp.matmul(given, several, precision=lax.Precision.HIGHEST)
            return lax.dynamic_update_slice_in_dim(products, turned, at, 0)

        return lax.fori_loop(0, count, batch, products)

    def mix(products: Any) -> Any:
        flat = products.reshape(G * T, d)

        def add(total: Any, entry: Any) -> Any:
            place, weight = entry
            return total + weight[:, None] * flat[place], None

        return lax.scan(add, jnp.zeros_like(start), (layout.places, weights), unroll=8)[0]

    def step(carry: Any, at: Any) -> Any:
        current, previous, result, products = carry
        k, coefficient, count = at
        products = multiply(current, products, count)

        def grow() -> Any:
            following = jnp.where(k == 1, 0.5, 1.0).astype(start.dtype) * mix(products) + previous
            # Beyond its own degree a query is not computed; zero, so that it stays finite.
            following = jnp.where((layout.degrees >= k)[:, None], following, 0)
            return following, current, result + coefficient[:, None] * following

        after = lax.cond(count > 0, grow, lambda: (current, previous, result))
        return (*after, products), None

    K = len(layout.batches)
    first = (start, jnp.zeros_like(start), coefficients[0][:, None] * start)
    carry = (*first, jnp.zeros((G, T, d), start.dtype))
    numbers = jnp.arange(1, K + 1, dtype=jnp.int32)
    return lax.scan(step, carry, (numbers, coefficients[1:], layout.batches))[0][2]
