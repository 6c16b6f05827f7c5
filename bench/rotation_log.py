"""The logarithm of rotations against scipy.linalg.logm: speed, residual, and the hard cases.

The hard cases go through the split into scale and rotation that every import uses.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from time import perf_counter

import numpy as np
import torch
from scipy.linalg import expm, logm
from torch import Tensor

from bench._report import Figure, options, print_table, seconds, verdict
from core.rotations.logarithm import rotation_log
from core.rotations.scaled import split

WIDTH, CLUSTERS, THREADS, SLICES = 768, 142, 2, 6
SPEEDUP_BAR, RESIDUAL_BAR = 5.0, 1e-10


def main() -> int:
    """Take turns: one matrix for scipy, a slice for us; the best turn of each counts."""
    args = options(__doc__).parse_args()
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    rotations = haar_rotations(CLUSTERS, WIDTH, generator=generator)
    ours, scipys, residuals = math.inf, math.inf, [0.0]
    for part in rotations.tensor_split(SLICES):
        scipys = min(scipys, seconds(partial(logm, part[0].numpy())))
        start = perf_counter()
        log = rotation_log(part)
        ours = min(ours, (perf_counter() - start) / len(part))
        residuals.append(float(log.residuals.max()))
    rows: list[tuple[str, float, float]] = [
        ("scipy.linalg.logm, extrapolated", scipys * CLUSTERS, math.nan),
        ("rotation_log", ours * CLUSTERS, max(residuals)),
    ]
    hard = [(name, math.nan, _case_error(*case)) for name, case in _cases(generator).items()]
    worst = float(np.max([row[2] for row in hard]))  # unlike max, a NaN anywhere stays one
    print_table([f"{CLUSTERS} of width {WIDTH}", "seconds", "residual"], rows + hard)
    return verdict(
        "rotation_log",
        Figure("times faster than logm", scipys / ours, SPEEDUP_BAR),
        Figure("residual", max(residuals), RESIDUAL_BAR, at_most=True),
        Figure("worst hard case", worst, RESIDUAL_BAR, at_most=True),
        check=args.check,
    )


def haar_rotations(count: int, width: int, *, generator: torch.Generator) -> Tensor:
    """Draw rotations uniformly (Mezzadri 2007): [count, width, width] float64, determinant +1."""
    stack = torch.empty(count, width, width, dtype=torch.float64)
    for index in range(count):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        q *= r.diagonal().sign()
        q[:, 0] *= torch.linalg.slogdet(q).sign
        stack[index] = q
    return stack


def _cases(generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Hard matrices of width 64, each with its rotation (where only one is nearest)."""
    basis = haar_rotations(1, 64, generator=generator)[0]
    spread = torch.linspace(0, 3, 32, dtype=torch.float64).tolist()
    single, repeated, all_pi, near = (
        _rotation(basis, angles)
        for angles in (
            [math.pi, *spread[1:]],
            [math.pi] * 9 + spread[9:],
            [math.pi] * 32,
            [math.pi, math.pi - 1e-9, math.pi - 1e-6, math.pi - 1e-3, *spread[4:]],
        )
    )
    still, still_pi = (_rotation(basis, [0.0, first, *spread[2:]]) for first in (1.0, math.pi))
    mirror = 2 * torch.outer(basis[:, 0], basis[:, 0])  # about an axis both leave alone
    return {
        "angle pi, once": (single, single),
        "angle pi, 9 times": (repeated, repeated),
        "angle pi, everywhere": (all_pi, all_pi),
        "angles pi - 0, 1e-9, 1e-6, 1e-3": (near, near),
        "determinant -1": (still - mirror, still),
        "determinant -1 beside an angle pi": (still_pi - mirror, None),
    }


def _rotation(basis: Tensor, angles: list[float]) -> Tensor:
    """Rotate by ``angles`` in the planes of consecutive columns of ``basis``."""
    blocks = [
        torch.tensor(
            [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]],
            dtype=torch.float64,
        )
        for angle in angles
    ]
    turned: Tensor = torch.block_diag(*blocks)
    return basis @ turned @ basis.mT


def _case_error(matrix: Tensor, expected: Tensor | None) -> float:
    """Largest entry by which exp of the logarithm misses; the determinant must come out +1."""
    given = split(matrix.numpy(), cluster="of the bench")  # what every import goes through
    rotation = torch.from_numpy(given.rotation)
    bivector = rotation_log(rotation).bivectors[0]
    error = (torch.from_numpy(expm(bivector.numpy())) - rotation).abs().max()
    sound = torch.linalg.slogdet(rotation).sign > 0
    if expected is not None:  # where -1 repeats, the axis to reflect is free
        error = torch.maximum(error, (rotation - expected).abs().max())
    return float(error) if sound else math.nan


if __name__ == "__main__":
    sys.exit(main())
