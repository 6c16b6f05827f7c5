"""Holds bivectors and targets that came from outside against the model and the teacher.

Which rows are looked at is drawn from the hash of what is checked and the job's seed: a file cannot
be made right at rows known beforehand. Whoever tries files until one passes deceives their own job
alone, for what was only sampled is shared with nobody.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from core.distill.teachers._logs import blend_anchor
from core.errors import DataInvalid
from core.rotations.action import spectral_norms
from core.rotations.logarithm import log_residuals
from core.specs.teachers import Weighing
from core.tensors.caches import LARGEST_ENTRY
from core.tensors.formats import Federated
from core.tensors.shards import Array

ALLOWED_RESIDUAL = 1e-4
"""Of exp(L) - W, |.|_F / sqrt(d), in a file: what logarithms in float32 stay far below."""
MOST_ALLOWED = 1e-2
"""A difference, per unit of length, that would hide another teacher's answers."""
SLACK = 16
"""Units in the last place that two computations of one target may differ by, beside tolerance."""


def check_bivectors(model: Federated, spec: Weighing, given: Array, *, first: int) -> Array:
    """Compare some clusters' logarithms with their rotations.

    Args:
        model: whose clusters.
        spec: says what the logarithms are of: G^T W_c, or W_c for ``legacy``.
        given: [c, d, d] skew, of clusters first..first + c - 1.
        first: number of the first cluster.

    Returns:
        [c] float64: |exp(L) - W|_F / sqrt(d), estimated by random rows to about 20 %.

    Raises:
        DataInvalid: a residual is above ALLOWED_RESIDUAL, or a logarithm turns by more than pi.
    """
    L = torch.from_numpy(given).double()
    norms = spectral_norms(L)
    for cluster, norm in enumerate(norms.tolist(), first):
        if not norm <= LARGEST_ENTRY:
            raise DataInvalid(
                f"bivectors: cluster {cluster} turns by up to {norm:.4g} radians (allowed: pi); "
                "it is no principal logarithm"
            )
    anchor = torch.from_numpy(blend_anchor(model, spec)).double()
    rotations = anchor.T @ torch.from_numpy(model.rotations[first : first + len(given)]).double()
    found: Array = log_residuals(L, rotations, norms, seed=_seed(given)).numpy()
    worst = int(found.argmax())
    if not found[worst] <= ALLOWED_RESIDUAL:
        raise DataInvalid(
            f"bivectors: exp(L) of cluster {first + worst} is {found[worst]:.3g} away from "
            f"{'W' if spec.whole_logs() else 'G^T W'} (allowed {ALLOWED_RESIDUAL:g}, "
            f"Frobenius norm over sqrt(d)); the file is of another model{_hint(spec)}"
        )
    return found


def _hint(spec: Weighing) -> str:
    if spec.whole_logs():
        return " or of log(G^T W): leave teacher.compat null"
    return " or, as document 000's, of log W: say teacher.compat 'legacy'"


def sample_rows(given: Array, count: int, *, seed: int) -> Array:
    """Draw which rows of a block are recomputed: [min(count, n)] int64, ascending.

    A block of which a share p is wrong passes with probability (1 - p)^count at most.

    Args:
        given: [n, d], the block itself: the draw depends on its bytes.
        count: >= 1.
        seed: of the job.
    """
    draws = np.random.default_rng([seed, _seed(given)])
    rows: Array = np.sort(draws.permutation(len(given))[:count])
    return rows


def allowed_difference(*, tolerance: float, temperature: float, reach: float, dtype: str) -> float:
    """Return how far apart two computations of a target may be, per unit of its length.

    The teacher's tolerance, and SLACK units in the last place, which the softmax of the routing
    magnifies by up to pi reach / temperature: an inner product is rounded by its factors' lengths,
    a weight moves by that over the temperature, and a blend by that times the largest angle.

    Args:
        tolerance: of the teacher.
        temperature: of its routing.
        reach: largest |q| |k| of a query and a training query.
        dtype: of the teacher.

    Returns:
        Above MOST_ALLOWED comparing some rows says nothing: compute them all.
    """
    rounding = SLACK * float(np.finfo(dtype).eps)
    return tolerance + rounding * (1 + math.pi * reach / temperature)


def longest(rows: Array) -> float:
    """Return the largest length of [n, d] rows."""
    return float(np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64).max()))


def check_targets(given: Array, computed: Array, rows: Array, *, allowed: float) -> float:
    """Compare targets with those computed here; return the largest difference over length.

    Args:
        given: [r, d].
        computed: [r, d].
        rows: [r] int64, their numbers in the whole file, for the message.
        allowed: |given - computed| over |computed|, see ``allowed_difference``.

    Raises:
        DataInvalid: a row is further off than allowed.
    """
    wide = computed.astype(np.float64)
    off = np.linalg.norm(given - wide, axis=1) / np.linalg.norm(wide, axis=1)
    worst = int(off.argmax())
    if not off[worst] <= allowed:
        raise DataInvalid(
            f"targets: row {rows[worst]} is {off[worst]:.3g} of its length away from the "
            f"teacher's answer (allowed {allowed:.3g}, {int((~(off <= allowed)).sum())} of "
            f"{len(rows)} recomputed rows are); the file is of another teacher or other queries"
        )
    return float(off[worst])


def check_digests(found: Array, expected: Array, *, first: int) -> None:
    """Raise DataInvalid where the digests of some queries, [b, 16], are not the expected ones."""
    wrong = (found != expected).any(axis=1)
    if wrong.any():
        row = first + int(wrong.argmax())
        raise DataInvalid(
            f"query_digests: row {row} is of another query ({int(wrong.sum())} of the "
            f"{len(wrong)} rows from {first} on are); the targets answer other queries"
        )


def _seed(given: Array) -> int:
    """Return 63 bits of the hash of an array."""
    digest = hashlib.sha256(np.ascontiguousarray(given).data).digest()
    return int.from_bytes(digest[:8], "little") >> 1
