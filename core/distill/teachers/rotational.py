"""Blends the logarithms of the clusters' rotations, then rotates by the exponential."""

from __future__ import annotations

from torch import Tensor

from core.distill.teachers._base import Teacher
from core.distill.teachers._federated import FederatedTeacher
from core.rotations.action import Series, exp_action
from core.rotations.chebyshev import run_block
from core.rotations.mixture import Mixture
from core.specs.teachers import Rotational
from core.tensors.shards import Array


class RotationalTeacher(FederatedTeacher):
    """``y = q G exp(sum_c w_c log(G^T W_c))``, scaled by ``exp(sum_c w_c log s_c)``.

    Document 000 blends log W_c itself. That is the same blend up to second order and takes about
    twice the steps, because log(G^T W_c) is half as long; ``compat="legacy"`` does it.
    A query whose neighbours share one cluster gets ``s_c q W_c``, of the stored float32 W_c.
    """

    VERSION = 3
    series: Series = staticmethod(run_block)
    """What sums the Chebyshev series of a block of queries."""

    def blend(self, queries: Tensor | Array, mixture: Mixture) -> Tensor:
        """Rotate [Q, d] queries by given weights: [Q, d], dtype ``spec.dtype``."""
        return exp_action(
            self._tensor(queries),
            self.bivectors,
            mixture,
            tolerance=self.spec.tolerance,
            norms=self._norms,
            log_scales=self._log_scales,
            anchor=self.anchor,
            rotations=self._rotations,
            series=self.series,
        )


TEACHER = Teacher(spec=Rotational, build=RotationalTeacher)
