"""The logarithms of a model's rotations, in blocks that any job finds again by their key."""

from __future__ import annotations

import numpy as np
import torch

from core.distill.teachers._base import Bivectors
from core.distill.teachers._keys import digest
from core.errors import DataInvalid
from core.rotations.logarithm import RotationLog, rotation_log
from core.specs.teachers import Weighing
from core.tensors.formats import Federated
from core.tensors.shards import Array

VERSION = 2
"""Of the algorithm, in every cache key: raise it when the same inputs give other bytes."""
NARROWED = 1e-6
"""Relative growth of a norm by which narrowing to float32 is covered."""
LARGEST_RESIDUAL = 1e-3
"""Of exp(log W) - W; what a float32 rotation stays far below."""


def blend_anchor(model: Federated, spec: Weighing) -> Array:
    """Return what is applied before the blend: G, or the identity where log W is blended."""
    if spec.whole_logs():
        return np.eye(model.anchor.shape[0], dtype=np.float32)
    return model.anchor


def bivector_block(model: Federated, spec: Weighing, start: int, stop: int) -> Bivectors:
    """Compute log(G^T W_c), or log W_c for ``legacy``, of clusters start..stop-1.

    Returns:
        stop - start of them, of ``spec.dtype``, on the CPU.

    Raises:
        DataInvalid: a logarithm does not give its rotation back.
    """
    anchor = torch.from_numpy(blend_anchor(model, spec)).double()
    rotations = torch.from_numpy(model.rotations[start:stop]).double()
    found: RotationLog = rotation_log(anchor.T @ rotations)
    worst = int(found.residuals.argmax()) if stop > start else 0
    if stop > start and found.residuals[worst] > LARGEST_RESIDUAL:
        raise DataInvalid(
            f"rotations: cluster {start + worst} is {float(found.residuals[worst]):.3g} away from "
            f"the exponential of its logarithm (allowed {LARGEST_RESIDUAL}); it is no rotation"
        )
    values = found.bivectors.to(getattr(torch, spec.dtype))
    return Bivectors(values, found.norms * (1 + NARROWED))


def bivector_key(model: Federated, spec: Weighing, start: int, stop: int) -> str:
    """Return the cache key of ``bivector_block``: SHA-256 hex over all it depends on.

    Their last bits also depend on the number of threads and the machine's BLAS, which the key does
    not hold: whichever block was stored first is the one every job reads. Always made on a CPU.
    """
    compat = "legacy" if spec.whole_logs() else None
    return digest(
        {"what": "bivectors", "version": VERSION, "dtype": spec.dtype, "compat": compat},
        model.rotations[start:stop],
        blend_anchor(model, spec),
    )
