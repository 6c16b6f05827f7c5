"""Blends the logarithms of the clusters' rotations, then rotates by the exponential."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from core.distill.routing import EqualRows, route
from core.distill.teachers._base import Bivectors, Teacher
from core.errors import DataInvalid
from core.rotations.action import exp_action
from core.rotations.logarithm import RotationLog, rotation_log
from core.rotations.mixture import Mixture
from core.specs.teachers import Rotational
from core.tensors.formats import Federated
from core.tensors.shards import Array

VERSION = 2
"""Of the algorithm, in every cache key: raise it when the same inputs give other bytes."""
NARROWED = 1e-6
"""Relative growth of a norm by which narrowing to float32 is covered."""
TOP_K = 10
"""Of a model that does not say: document 000's."""
LARGEST_RESIDUAL = 1e-3
"""Of exp(log W) - W; what a float32 rotation stays far below."""


class RotationalTeacher:
    """``y = q G exp(sum_c w_c log(G^T W_c))``, scaled by ``exp(sum_c w_c log s_c)``.

    Document 000 blends log W_c itself. That is the same blend up to second order and takes about
    twice the steps, because log(G^T W_c) is half as long; ``compat="legacy"`` does it.
    A query whose neighbours share one cluster gets ``s_c q W_c``, of the stored float32 W_c.

    Memory above the model: its bivectors (C d^2 numbers), and for 1024 queries at a time at most
    0.75 GiB: 512 MiB of the series, 128 MiB of similarities (twice that in float64), the rest
    their own. Measured in ``core.kinds.cache_targets``.
    """

    def __init__(
        self,
        model: Federated,
        spec: Rotational,
        device: str | torch.device = "cpu",
        bivectors: Bivectors | None = None,
    ) -> None:
        """Compute the bivectors unless given.

        Args:
            model: what to blend.
            spec: how.
            device: where targets are computed.
            bivectors: the blocks of ``bivector_block`` in order, of ``spec.dtype``.
        """
        clusters, d, _ = model.rotations.shape
        self.model, self.spec = model, spec
        self.answers_new: bool = spec.answers_new
        self.device = torch.device(device)
        self.dtype = getattr(torch, spec.dtype)
        self.top_k, self.temperature = _routing(model, spec)
        if bivectors is None:
            bivectors = bivector_block(model, spec, 0, clusters)
        for name, found, needed in (
            ("bivectors", bivectors.values, [clusters, d, d]),
            ("norms of bivectors", bivectors.norms, [clusters]),
        ):
            if list(found.shape) != needed:
                raise DataInvalid(f"{name}: shape {list(found.shape)}; needed {needed}")
        self.bivectors = self._tensor(bivectors.values)
        self._norms = bivectors.norms.to(self.device)
        self.anchor = self._tensor(blend_anchor(model, spec))
        self._rotations = torch.from_numpy(model.rotations).to(self.device)
        scales = torch.from_numpy(model.scales).double()
        self._log_scales = scales.log().to(self.device) if bool((scales != 1).any()) else None
        self._keys = self._tensor(model.queries)
        self._cluster_of = torch.from_numpy(model.cluster_of).to(self.device)

    def bivectors_block(self, start: int, stop: int) -> Tensor:
        """Return the logarithms of clusters start..stop-1: [stop - start, d, d]."""
        return self.bivectors[start:stop]

    def mixture(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Mixture:
        """Return each query's convex weights over the clusters."""
        equal_to = None
        if exclude_rows is not None:
            exclude_rows, equal_to = exclude_rows.to(self.device), self._equal_to
        return route(
            self._tensor(queries),
            self._keys,
            self._cluster_of,
            cluster_count=len(self.bivectors),
            temperature=self.temperature,
            top_k=self.top_k,
            exclude_rows=exclude_rows,
            equal_to=equal_to,
        )

    def own_rows(self, queries: Array) -> Array:
        """Find queries among the training queries; see BlendingTeacher."""
        return self._equal.rows(queries)

    def targets(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Tensor:
        """Return the teacher's answers [Q, d], dtype ``spec.dtype``; see BlendingTeacher."""
        turned = self._tensor(queries)
        mixture = self.mixture(turned, exclude_rows=exclude_rows)
        return self.blend(turned, mixture)

    def blend(self, queries: Tensor | Array, mixture: Mixture) -> Tensor:
        """Rotate [Q, d] queries by given weights."""
        return exp_action(
            self._tensor(queries),
            self.bivectors,
            mixture,
            tolerance=self.spec.tolerance,
            norms=self._norms,
            log_scales=self._log_scales,
            anchor=self.anchor,
            rotations=self._rotations,
        )

    @cached_property
    def _equal(self) -> EqualRows:
        """Which training queries are the same one: hashes all of them, and only once."""
        return EqualRows.among(self.model.queries)

    @cached_property
    def _equal_to(self) -> Tensor:
        return torch.from_numpy(self._equal.first).to(self.device)

    def fingerprint(self) -> str:
        """Return SHA-256 hex of everything but the query that a target depends on."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """Hashes the whole model, once."""
        return teacher_fingerprint(self.model, self.spec)

    def _tensor(self, values: Tensor | Array) -> Tensor:
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
        return tensor.to(self.device, self.dtype)


def blend_anchor(model: Federated, spec: Rotational) -> Array:
    """Return what is applied before the blend: G, or the identity where log W is blended."""
    if spec.compat == "legacy":
        return np.eye(model.anchor.shape[0], dtype=np.float32)
    return model.anchor


def _routing(model: Federated, spec: Rotational) -> tuple[int, float]:
    """Return top_k and temperature: the spec's, else the model's own.

    Raises:
        DataInvalid: the model's own top_k is no whole number that a spec might give.
    """
    top_k = model.manifest.get("top_k", TOP_K) if spec.top_k is None else spec.top_k
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= 1024:
        raise DataInvalid(f"top_k: {top_k!r} in the manifest; needed a whole number, 1 to 1024")
    return top_k, float(spec.temperature or model.manifest["temperature"])


def bivector_block(model: Federated, spec: Rotational, start: int, stop: int) -> Bivectors:
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


def bivector_key(model: Federated, spec: Rotational, start: int, stop: int) -> str:
    """Return the cache key of ``bivector_block``: SHA-256 hex over all it depends on.

    Their last bits also depend on the number of threads and the machine's BLAS, which the key does
    not hold: whichever block was stored first is the one every job reads. Always made on a CPU.
    """
    return _digest(
        {"what": "bivectors", "version": VERSION, "dtype": spec.dtype, "compat": spec.compat},
        model.rotations[start:stop],
        blend_anchor(model, spec),
    )


def teacher_fingerprint(model: Federated, spec: Rotational) -> str:
    """Return SHA-256 hex of model and settings: what a target depends on beside its query.

    Of ``top_k`` and ``temperature`` the resolved numbers, whether spec or model said them.
    """
    top_k, temperature = _routing(model, spec)
    facts = {
        "what": "rotational",
        "version": VERSION,
        "top_k": top_k,
        "temperature": temperature,
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


def target_key(
    fingerprint: str, queries: Array, exclude_rows: Array | None = None, *, device: str
) -> str:
    """Return the cache key of one block of targets.

    Bytes differ in their last bits between devices and thread counts. The kind of device is in
    the key, so that a GPU's block is never taken for a CPU's; the number of threads is not:
    whichever block was stored first is the one every job reads.

    Args:
        fingerprint: of the teacher.
        queries: [Q, d] of the block.
        exclude_rows: as given to ``targets``.
        device: where they are computed; of ``cuda:1`` only ``cuda`` counts.
    """
    excluded = np.zeros(0, np.int64) if exclude_rows is None else exclude_rows.astype(np.int64)
    facts = {
        "what": "targets",
        "teacher": fingerprint,
        "excludes": exclude_rows is not None,
        "device": torch.device(device).type,
    }
    return _digest(facts, queries, excluded)


def _digest(facts: dict[str, object], *arrays: Array) -> str:
    """Hash facts and arrays with their dtypes and shapes, so that no two inputs look alike."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for array in arrays:
        digest.update(f"|{array.dtype.str}{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


TEACHER = Teacher(spec=Rotational, build=RotationalTeacher)
