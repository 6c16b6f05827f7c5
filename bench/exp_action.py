"""The exponential action against forming exp(B) for every query: speed, error, use of the CPU.

The error that counts is the longest row of the difference: the 2-norm, which the action promises.
The sgemm rate that counts is the faster of torch.mm and oneDNN on the machine of the run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import expm
from torch import Tensor

from bench._report import Figure, options, print_table, seconds, verdict
from bench.rotation_log import haar_rotations
from core.rotations.action import chebyshev_degree, exp_action
from core.rotations.chebyshev import ONEDNN
from core.rotations.logarithm import RotationLog, rotation_log
from core.rotations.mixture import Mixture

QUERIES, WIDTH, CLUSTERS, BLENDED, THREADS = 10_000, 768, 142, 4, 2
BATCH, ROUNDS, SAMPLE, SQUARE = 8, 5, 64, 3072
SPEEDUP_BAR, ERROR_BAR, RATE_BAR = 150.0, 1e-6, 0.70


def main() -> int:
    """Measure in turns, keep the best of each, compare."""
    args = options(__doc__).parse_args()
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    logs = rotation_log(haar_rotations(CLUSTERS, WIDTH, generator=generator))
    bivectors = logs.bivectors.float()
    queries, mixture = _problem(generator)

    outputs: list[Tensor] = []
    batch = _blends(bivectors, mixture, range(BATCH))
    square = torch.randn(SQUARE, SQUARE, generator=generator)
    gemms: dict[str, Callable[[], object]] = {"torch.mm": lambda: square @ square}
    if ONEDNN:
        gemms["oneDNN"] = lambda: _onednn(square)
    best = _best_of(
        action=lambda: outputs.append(exp_action(queries, bivectors, mixture, norms=logs.norms)),
        matrix_exp=lambda: torch.linalg.matrix_exp(batch),
        **gemms,
    )
    baseline = best["matrix_exp"] / BATCH * QUERIES
    flops = _useful_flops(mixture, logs.norms)
    rates = {name: 2 * SQUARE**3 / best[name] / 1e9 for name in gemms}
    rate = flops / best["action"] / 1e9
    rows = [
        (f"exp_action, {QUERIES} queries", best["action"], rate),
        (f"matrix_exp, {QUERIES} queries, from batches of {BATCH}", baseline, "-"),
        *((f"sgemm {SQUARE}^3, {name}", best[name], rates[name]) for name in gemms),
    ]
    print_table(["", "seconds", "GFLOP/s"], rows)
    shares = ", ".join(f"{rate / found:.3f} of {name}" for name, found in rates.items())
    entry, row = _errors(outputs[-1], queries, logs, mixture)
    print(f"share of the rate: {shares}")
    print(f"error over {SAMPLE} queries: largest entry {entry:.3g}, longest row {row:.3g}")
    return verdict(
        "exp_action",
        Figure("times faster than matrix_exp", baseline / best["action"], SPEEDUP_BAR),
        Figure(f"max error of {SAMPLE} rows, 2-norm", row, ERROR_BAR, at_most=True),
        Figure("share of the faster sgemm rate", rate / max(rates.values()), RATE_BAR),
        check=args.check,
    )


def _problem(generator: torch.Generator) -> tuple[Tensor, Mixture]:
    """Unit queries and convex weights over BLENDED distinct clusters each."""
    queries = torch.randn(QUERIES, WIDTH, generator=generator)
    queries /= torch.linalg.vector_norm(queries, dim=1, keepdim=True)
    clusters = torch.rand(QUERIES, CLUSTERS, generator=generator).topk(BLENDED).indices
    weights = torch.randn(QUERIES, BLENDED, generator=generator).softmax(1)
    return queries, Mixture.from_topk(clusters, weights, CLUSTERS)


def _best_of(**works: Callable[[], object]) -> dict[str, float]:
    """Best seconds of each, taken in turns."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        for name, work in works.items():
            best[name] = min(best[name], seconds(work))
    return best


def _blends(bivectors: Tensor, mixture: Mixture, rows: range) -> Tensor:
    """B_q of a few queries: [len(rows), d, d]."""
    few = mixture.rows(torch.tensor(rows))
    blends = bivectors.new_zeros(len(rows), WIDTH, WIDTH)
    for row, c, weight in zip(few.queries, few.clusters, few.weights, strict=True):
        blends[row] += weight.to(bivectors.dtype) * bivectors[c]
    return blends


def _onednn(square: Tensor) -> Tensor:
    """The product of the library behind the action."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(square, square, None, "none", [], "")
    return product


def _useful_flops(mixture: Mixture, norms: Tensor) -> float:
    """Multiply-adds the series needs at each query's own radius: two per entry of L and pair."""
    degrees = [chebyshev_degree(float(radius), 1e-6) for radius in mixture.radii(norms)]
    pairs = float((mixture.lengths * torch.tensor(degrees)).sum())
    return 2 * pairs * WIDTH**2


def _errors(
    output: Tensor, queries: Tensor, logs: RotationLog, mixture: Mixture
) -> tuple[float, float]:
    """Largest entry and longest row of what float64 scipy.linalg.expm says otherwise."""
    gaps = []
    for row in range(0, QUERIES, QUERIES // SAMPLE)[:SAMPLE]:
        blend = _blends(logs.bivectors, mixture, range(row, row + 1))[0].numpy()
        exact = queries[row].double().numpy() @ expm(blend)
        gaps.append(output[row].double().numpy() - exact)
    return float(np.abs(gaps).max()), float(np.linalg.norm(gaps, axis=1).max())


if __name__ == "__main__":
    sys.exit(main())
