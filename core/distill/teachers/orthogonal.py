"""Rotates by a blend that is kept to the planes of a codebook."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from core.distill.teachers._base import Teacher
from core.distill.teachers._federated import FederatedTeacher
from core.rotations import codebook as codebooks
from core.rotations.codebook import Codebook, angles_of
from core.rotations.mixture import Mixture
from core.specs.teachers import Orthogonal
from core.tensors.shards import Array


class OrthogonalTeacher(FederatedTeacher):
    """``y = q G exp(sum_i theta_i(q) P_i)``, ``theta(q) = sum_c w_c angles_of(L_c)``.

    The same blend of logarithms as ``rotational``, projected onto m planes: what a student that
    turns in those planes could reach at best. In disjoint planes the exponential is Rodrigues'
    formula, exact; overlapping ones go through the series of their blend.
    """

    VERSION = 2

    def blend(self, queries: Tensor | Array, mixture: Mixture) -> Tensor:
        """Rotate [Q, d] queries by given weights: [Q, d], dtype ``spec.dtype``."""
        given = self._tensor(queries)
        angles = mixture.dense().to(self.dtype) @ self._angles
        turned = given @ self.anchor
        with torch.no_grad():
            if self.codebook.disjoint:
                answers = codebooks.rotate(turned, self._planes, angles)
            else:
                answers = codebooks.rotate_by_blend(
                    turned,
                    self._planes,
                    angles,
                    radius=self._radius,
                    tolerance=self.spec.exactness(),
                )
        if self._log_scales is not None:
            answers = answers * mixture.sums(self._log_scales).exp().to(self.dtype)[:, None]
        return answers

    @cached_property
    def codebook(self) -> Codebook:
        """The planes, made of the clusters' logarithms weighed by their training queries."""
        sizes = self._cluster_of.bincount(minlength=len(self._rotations)).double().cpu()
        return codebooks.build(self.spec.codebook, self.bivectors.cpu(), weights=sizes)

    @cached_property
    def _planes(self) -> Tensor:
        return self._tensor(self.codebook.planes)

    @cached_property
    def _radius(self) -> float:
        """A bound for every convex blend, so that no answer depends on the others of its batch."""
        return float(self._angles.abs().sum(dim=1).max()) * (1 + 1e-6)

    @cached_property
    def _angles(self) -> Tensor:
        """[C, m] radians at weight 1."""
        return angles_of(self.bivectors, self.codebook)


TEACHER = Teacher(spec=Orthogonal, build=OrthogonalTeacher)
