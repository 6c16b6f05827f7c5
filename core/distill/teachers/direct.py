"""Blends the clusters' maps themselves, all that a query routes to or the heaviest alone."""

from __future__ import annotations

import torch
from torch import Tensor

from core.distill.teachers._base import Teacher
from core.distill.teachers._linear import LinearTeacher
from core.rotations.mixture import Mixture
from core.specs.teachers import Direct
from core.tensors.shards import Array


class DirectTeacher(LinearTeacher):
    """``y = sum_c w_c q W_c`` put to the query's length, or ``y = q W_c`` of the heaviest cluster.

    As good as the exponential where the clusters' rotations nearly agree (nlerp against slerp),
    and the cheapest teacher: no logarithms, one product per cluster and query.
    """

    def mixture(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Mixture:
        """Return each query's weights over the clusters; one entry of weight 1 for ``top1``."""
        found = super().mixture(queries, exclude_rows=exclude_rows)
        return heaviest(found) if self.spec.blend == "top1" else found


def heaviest(mixture: Mixture) -> Mixture:
    """Give each query its heaviest cluster alone, at weight 1; among equals the first."""
    best = mixture.dense().argmax(dim=1)
    rows = torch.arange(len(best) + 1, device=best.device)
    return Mixture(
        rows, best, torch.ones_like(best, dtype=mixture.weights.dtype), mixture.cluster_count
    )


TEACHER = Teacher(spec=Direct, build=DirectTeacher)
