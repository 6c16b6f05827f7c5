"""What the teachers over a federated model share: its tensors, routing, logarithms and identity."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from core.distill.routing import VERSION as ROUTING
from core.distill.routing import route
from core.distill.teachers._base import Answers, Bivectors, TrainedTeacher
from core.distill.teachers._keys import digest
from core.distill.teachers._logs import VERSION as LOGS
from core.distill.teachers._logs import bivector_block, blend_anchor
from core.errors import DataInvalid
from core.rotations.mixture import Mixture
from core.tensors.formats import Federated
from core.tensors.shards import Array

TOP_K = 10
"""Of a model that does not say: document 000's."""


class FederatedTeacher(TrainedTeacher):
    """Routes queries to clusters; what is done with the weights is each teacher's own ``blend``.

    Memory above the model: its bivectors (C d^2 numbers) where they are used, and for 1024 queries
    at a time at most 0.75 GiB: 512 MiB of a teacher's own work, 128 MiB of similarities (twice
    that in float64), the rest theirs. Measured in ``core.kinds.cache_targets``.
    """

    model: Federated
    VERSION: ClassVar[int] = 1
    """Of the algorithm, in the fingerprint: raise it when the same inputs give other bytes."""
    DEPENDS_ON: ClassVar[tuple[str, ...]] = ("rotations", "scales", "queries", "cluster_of")
    """The model's arrays that a target depends on, beside what is applied before the blend."""

    def __init__(
        self,
        model: Federated,
        spec: Any,
        device: str | torch.device = "cpu",
        bivectors: Bivectors | None = None,
    ) -> None:
        """Take the model to a device; bivectors are computed when first asked for, unless given.

        Args:
            model: what to blend.
            spec: how.
            device: where targets are computed.
            bivectors: the blocks of ``bivector_block`` in order, of ``spec.dtype``.
        """
        clusters, d, _ = model.rotations.shape
        super().__init__(model, spec, device)
        self.routes_over: Literal["queries", "sources", "centroids"] = spec.routes_over
        self.answers_new: bool = spec.answers_new
        self.top_k, self.temperature = routing(model, spec)
        self._given = _checked(bivectors, clusters, d)
        self.anchor = self._tensor(blend_anchor(model, spec))
        self._rotations = torch.from_numpy(model.rotations).to(self.device)
        scales = torch.from_numpy(model.scales).double()
        self._log_scales = scales.log().to(self.device) if bool((scales != 1).any()) else None
        self._keys = self._tensor(model.queries)
        self._cluster_of = torch.from_numpy(model.cluster_of).to(self.device)

    @property
    def centroids(self) -> Array:
        """[C, d] float32, of the clusters."""
        return self.model.centroids

    @abstractmethod
    def blend(self, queries: Tensor | Array, mixture: Mixture) -> Tensor:
        """Answer [Q, d] queries by given weights: [Q, d]."""

    @cached_property
    def bivectors(self) -> Tensor:
        """[C, d, d] skew, of ``spec.dtype``, on the device."""
        return self._tensor(self._logs.values)

    @cached_property
    def _norms(self) -> Tensor:
        return self._logs.norms.to(self.device)

    @cached_property
    def _logs(self) -> Bivectors:
        return self._given or bivector_block(self.model, self.spec, 0, len(self.model.rotations))

    def mixture(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Mixture:
        """Return each query's convex weights over the clusters."""
        equal_to = None
        if exclude_rows is not None:
            exclude_rows, equal_to = exclude_rows.to(self.device), self._equal_to
        return route(
            self._tensor(queries),
            self._keys,
            self._cluster_of,
            cluster_count=len(self._rotations),
            temperature=self.temperature,
            top_k=self.top_k,
            exclude_rows=exclude_rows,
            equal_to=equal_to,
        )

    def answers(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Answers:
        """Return targets [Q, d], dtype ``spec.dtype``, and weights; see TeacherModel."""
        given = self._tensor(queries)
        mixture = self.mixture(given, exclude_rows=exclude_rows)
        return Answers(self.blend(given, mixture), mixture)

    def targets(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Tensor:
        """Return the teacher's answers [Q, d], dtype ``spec.dtype``; see TeacherModel."""
        return self.answers(queries, exclude_rows=exclude_rows).vectors

    def _hash(self) -> str:
        return fingerprint(type(self), self.model, self.spec)

    @cached_property
    def _equal_to(self) -> Tensor:
        return torch.from_numpy(self._equal.first).to(self.device)


def fingerprint(teacher: type[FederatedTeacher], model: Federated, spec: Any) -> str:
    """Return SHA-256 hex of model and settings: what a target depends on beside its query.

    Of ``top_k`` and ``temperature`` the resolved numbers, whether spec or model said them.
    """
    top_k, temperature = routing(model, spec)
    told = spec.model_dump(mode="json")
    facts = {
        **told,
        "what": told["name"],
        "version": teacher.VERSION,
        "top_k": top_k,
        "temperature": temperature,
        "routing": ROUTING,
        "logs": LOGS if spec.needs_logs else None,
        "sources": _sources(model) if spec.routes_over == "sources" else None,
    }
    arrays = [getattr(model, name) for name in teacher.DEPENDS_ON]
    return digest(facts, blend_anchor(model, spec), *arrays)


def _sources(model: Federated) -> list[dict[str, Any]]:
    """What of the sources decides an answer; what they are called does not."""
    found = model.manifest.get("sources", ())
    return [{name: told[name] for name in told if name != "model"} for told in found]


def routing(model: Federated, spec: Any) -> tuple[int, float]:
    """Return top_k and temperature: the spec's, else the model's own.

    Raises:
        DataInvalid: the model's own top_k is no whole number that a spec might give.
    """
    told = getattr(spec, "top_k", None)  # who routes over centroids keeps them all
    top_k = model.manifest.get("top_k", TOP_K) if told is None else told
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= 1024:
        raise DataInvalid(f"top_k: {top_k!r} in the manifest; needed a whole number, 1 to 1024")
    return top_k, float(spec.temperature or model.manifest["temperature"])


def _checked(bivectors: Bivectors | None, clusters: int, d: int) -> Bivectors | None:
    """Refuse logarithms of another model's shape."""
    if bivectors is None:
        return None
    for name, found, needed in (
        ("bivectors", bivectors.values, [clusters, d, d]),
        ("norms of bivectors", bivectors.norms, [clusters]),
    ):
        if list(found.shape) != needed:
            raise DataInvalid(f"{name}: shape {list(found.shape)}; needed {needed}")
    return bivectors
