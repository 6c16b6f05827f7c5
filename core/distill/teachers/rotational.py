"""Blends the logarithms of the clusters' rotations, then rotates by the exponential."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from core.distill.routing import route
from core.distill.teachers._base import Teacher
from core.errors import DataInvalid
from core.rotations.action import exp_action, spectral_norms
from core.rotations.logarithm import RotationLog, rotation_log
from core.rotations.mixture import Mixture
from core.specs.teachers import Rotational
from core.tensors.formats import Federated
from core.tensors.shards import Array

VERSION = 1
"""Of the algorithm, in every cache key: raise it when the same inputs give other bytes."""
LARGEST_RESIDUAL = 1e-3
"""Of exp(log W) - W; what a float32 rotation stays far below."""


class RotationalTeacher:
    """``y = q G exp(sum_c w_c log(G^T W_c))``, scaled by ``exp(sum_c w_c log s_c)``.

    Document 000 blends log W_c itself. That is the same blend up to second order and takes about
    twice the steps, because log(G^T W_c) is half as long; ``compat="legacy"`` does it.
    """

    def __init__(
        self,
        model: Federated,
        spec: Rotational,
        device: str | torch.device = "cpu",
        bivectors: Tensor | Array | None = None,
    ) -> None:
        """Compute the bivectors unless given.

        Args:
            model: what to blend.
            spec: how.
            device: where targets are computed.
            bivectors: [C, d, d], the blocks of ``bivector_block`` in order, of ``spec.dtype``.
        """
        clusters, d, _ = model.rotations.shape
        self.model, self.spec = model, spec
        self.device = torch.device(device)
        self.dtype = getattr(torch, spec.dtype)
        self.top_k = spec.top_k
        self.temperature = float(spec.temperature or model.manifest["temperature"])
        if bivectors is None:
            bivectors = bivector_block(model, spec, 0, clusters)
        if tuple(bivectors.shape) != (clusters, d, d):
            raise DataInvalid(
                f"bivectors: shape {list(bivectors.shape)}; needed {[clusters, d, d]}"
            )
        self.bivectors = self._tensor(bivectors)
        self.anchor = self._tensor(blend_anchor(model, spec))
        self._log_scales = self._tensor(model.scales).log() if (model.scales != 1).any() else None
        self._keys = self._tensor(model.queries)
        self._cluster_of = torch.from_numpy(model.cluster_of).to(self.device)

    def bivectors_block(self, start: int, stop: int) -> Tensor:
        """Return the logarithms of clusters start..stop-1: [stop - start, d, d]."""
        return self.bivectors[start:stop]

    def mixture(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Mixture:
        """Return each query's convex weights over the clusters."""
        if exclude_rows is not None:
            exclude_rows = exclude_rows.to(self.device)
        return route(
            self._tensor(queries),
            self._keys,
            self._cluster_of,
            cluster_count=len(self.bivectors),
            temperature=self.temperature,
            top_k=self.top_k,
            exclude_rows=exclude_rows,
        )

    def targets(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Tensor:
        """Return the teacher's answers [Q, d], dtype ``spec.dtype``; see BlendingTeacher."""
        turned = self._tensor(queries)
        mixture = self.mixture(turned, exclude_rows=exclude_rows)
        return self.blend(turned, mixture)

    def blend(self, queries: Tensor | Array, mixture: Mixture) -> Tensor:
        """Rotate [Q, d] queries by given weights."""
        return exp_action(
            self._tensor(queries) @ self.anchor,
            self.bivectors,
            mixture,
            tolerance=self.spec.tolerance,
            norms=self._norms,
            log_scales=self._log_scales,
        )

    @cached_property
    def _norms(self) -> Tensor:
        """[C] bounds of the bivectors' norms; seconds to compute, and needed only to blend."""
        return spectral_norms(self.bivectors)

    def fingerprint(self) -> str:
        """Return SHA-256 hex of everything but the query that a target depends on."""
        return teacher_fingerprint(self.model, self.spec)

    def _tensor(self, values: Tensor | Array) -> Tensor:
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
        return tensor.to(self.device, self.dtype)


def blend_anchor(model: Federated, spec: Rotational) -> Array:
    """Return what is applied before the blend: G, or the identity where log W is blended."""
    if spec.compat == "legacy":
        return np.eye(model.anchor.shape[0], dtype=np.float32)
    return model.anchor


def bivector_block(model: Federated, spec: Rotational, start: int, stop: int) -> Tensor:
    """Compute log(G^T W_c), or log W_c for ``legacy``, of clusters start..stop-1.

    Returns:
        [stop - start, d, d] skew, of ``spec.dtype``, on the CPU.

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
    return found.bivectors.to(getattr(torch, spec.dtype))


def bivector_key(model: Federated, spec: Rotational, start: int, stop: int) -> str:
    """Return the cache key of ``bivector_block``: SHA-256 hex over all it depends on."""
    return _digest(
        {"what": "bivectors", "version": VERSION, "dtype": spec.dtype, "compat": spec.compat},
        model.rotations[start:stop],
        blend_anchor(model, spec),
    )


def teacher_fingerprint(model: Federated, spec: Rotational) -> str:
    """Return SHA-256 hex of model and settings: what a target depends on beside its query."""
    facts = {
        "what": "rotational",
        "version": VERSION,
        "top_k": spec.top_k,
        "temperature": float(spec.temperature or model.manifest["temperature"]),
        "dtype": spec.dtype,
        "tolerance": spec.tolerance,
        "compat": spec.compat,
    }
    return _digest(
        facts,
        model.rotations,
        model.scales,
        blend_anchor(model, spec),
        model.queries,
        model.cluster_of,
    )


def target_key(fingerprint: str, queries: Array, exclude_rows: Array | None = None) -> str:
    """Return the cache key of one block of targets.

    Args:
        fingerprint: of the teacher.
        queries: [Q, d] of the block.
        exclude_rows: as given to ``targets``.
    """
    excluded = np.zeros(0, np.int64) if exclude_rows is None else exclude_rows.astype(np.int64)
    facts = {"what": "targets", "teacher": fingerprint, "excludes": exclude_rows is not None}
    return _digest(facts, queries, excluded)


def _digest(facts: dict[str, object], *arrays: Array) -> str:
    """Hash facts and arrays with their dtypes and shapes, so that no two inputs look alike."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for array in arrays:
        digest.update(f"|{array.dtype.str}{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


TEACHER = Teacher(spec=Rotational, build=RotationalTeacher)
