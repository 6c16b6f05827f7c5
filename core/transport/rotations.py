"""What a solve hands over: per group of sites one map of the student's stream to the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """``x -> x @ full``: a student's row in the teacher's coordinates. All float64.

    ``lifted = student_basis @ core @ teacher_basis^T`` is what the moments say (document 002,
    section 4.3): a partial isometry. ``full`` completes it on what the k dimensions leave over, so
    that ``full @ full^T = I`` and nothing is lost.
    """

    group: str
    """``global``, ``stage.0``, ``layer.3`` or ``final``: see ``sites.group_of``."""
    sites: tuple[str, ...]
    student_basis: Tensor
    """[d_s, k], orthonormal columns."""
    core: Tensor
    """[k, k] orthogonal."""
    teacher_basis: Tensor
    """[d_t, k], orthonormal columns."""
    full: Tensor
    """[d_s, max(d_s, d_t)]; where the student is wider, the teacher's stream is padded with 0."""
    singular_values: Tensor
    """[k], of the cross-moment between the bases, falling."""

    @property
    def lifted(self) -> Tensor:
        """[d_s, d_t], of rank k."""
        return self.student_basis @ self.core @ self.teacher_basis.mT
