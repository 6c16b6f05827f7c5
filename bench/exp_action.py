"""The exponential action against forming exp(B) for every query: speed, error, use of the CPU."""

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
from core.rotations.logarithm import RotationLog, rotation_log
from core.rotations.mixture import Mixture

QUERIES, WIDTH, CLUSTERS, BLENDED, THREADS = 10_000, 768, 142, 4, 2
BATCH, ROUNDS, SAMPLE, SQUARE = 8, 5, 8, 3072
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
    best = _best_of(
        action=lambda: outputs.append(exp_action(queries, bivectors, mixture, norms=logs.norms)),
        matrix_exp=lambda: torch.linalg.matrix_exp(batch),
        sgemm=lambda: square @ square,
        onednn=lambda: _onednn(square),
    )
    baseline = best["matrix_exp"] / BATCH * QUERIES
    flops = _useful_flops(mixture, logs.norms)
    rates = {name: 2 * SQUARE**3 / best[name] / 1e9 for name in ("sgemm", "onednn")}
    rate = flops / best["action"] / 1e9
    rows = [
        (f"exp_action, {QUERIES} queries", best["action"], rate),
        (f"matrix_exp, {QUERIES} queries, from batches of {BATCH}", baseline, "-"),
        (f"sgemm {SQUARE}^3, torch.mm", best["sgemm"], rates["sgemm"]),
        (f"sgemm {SQUARE}^3, oneDNN", best["onednn"], rates["onednn"]),
    ]
    print_table(["", "seconds", "GFLOP/s"], rows)
    print(f"share of the oneDNN rate: {rate / rates['onednn']:.2f}")
    return verdict(
        "exp_action",
        Figure("times faster than matrix_exp", baseline / best["action"], SPEEDUP_BAR),
        Figure("max error", _error(outputs[-1], queries, logs, mixture), ERROR_BAR, at_most=True),
        Figure("share of the sgemm rate", rate / rates["sgemm"], RATE_BAR),
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
    weights = mixture.rows(torch.tensor(rows)).dense().to(bivectors.dtype)
    return torch.einsum("qc,cij->qij", weights, bivectors)


def _onednn(square: Tensor) -> Tensor:
    """The product of the library behind the action."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(square, square, None, "none", [], "")
    return product


def _useful_flops(mixture: Mixture, norms: Tensor) -> float:
    """Multiply-adds the series needs at each query's own radius: two per entry of L and pair."""
    degrees = [chebyshev_degree(float(radius), 1e-6) for radius in mixture.radii(norms)]
    pairs = float((mixture.lengths * torch.tensor(degrees)).sum())
    return 2 * pairs * WIDTH**2


def _error(output: Tensor, queries: Tensor, logs: RotationLog, mixture: Mixture) -> float:
    """Largest entry of the difference to float64 scipy.linalg.expm, over a spread sample."""
    sample = range(0, QUERIES, QUERIES // SAMPLE)
    blends = _blends(logs.bivectors, mixture, sample).numpy()
    exact = np.stack(
        [queries[row].double().numpy() @ expm(B) for row, B in zip(sample, blends, strict=True)]
    )
    return float(np.abs(output[list(sample)].double().numpy() - exact).max())


if __name__ == "__main__":
    sys.exit(main())
