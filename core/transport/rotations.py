"""What a solve hands over: per group of sites one map of the student's stream to the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from core.errors import DataInvalid
from core.transport.sites import Tie, group_of


@dataclass(frozen=True)
class Rotation:
    """``x -> x @ full``: a student's row in the teacher's coordinates. All float64.

    ``lifted = student_basis @ core @ teacher_basis^T`` is what the moments say (document 002,
    section 4.3): a partial isometry. ``full`` completes it on what the k dimensions leave over, so
    that ``full @ full^T = I`` and nothing is lost.
    """

    orthogonal: ClassVar[bool] = True

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


@dataclass(frozen=True)
class Unwhitened:
    """``x -> x @ matrix + offset``: the document's fit of z-scores, undone. Not orthogonal.

    Section 4.1 of document 002 fits ``(x - mean) / scale`` channel by channel on both sides. Said
    of the streams themselves that map scales channels, so it can be reported and not folded. Bases
    and core are of z-scores. All float64.
    """

    orthogonal: ClassVar[bool] = False

    group: str
    sites: tuple[str, ...]
    student_basis: Tensor
    """[d_s, k], orthonormal columns."""
    core: Tensor
    """[k, k] orthogonal."""
    teacher_basis: Tensor
    """[d_t, k], orthonormal columns."""
    student_mean: Tensor
    """[d_s]"""
    student_scale: Tensor
    """[d_s], > 0."""
    teacher_mean: Tensor
    """[d_t]"""
    teacher_scale: Tensor
    """[d_t], > 0."""
    singular_values: Tensor
    """[k], of the z-scores' cross-moment between the bases, falling."""

    @property
    def matrix(self) -> Tensor:
        """[d_s, d_t]."""
        turned = self.student_basis @ self.core @ self.teacher_basis.mT
        return turned / self.student_scale[:, None] * self.teacher_scale

    @property
    def offset(self) -> Tensor:
        """[d_t]."""
        return self.teacher_mean - self.student_mean @ self.matrix


@dataclass(frozen=True)
class RotationSet:
    """The maps of some or all groups of one student, and what they were solved from."""

    tie: Tie
    stage_layers: int
    layers: int
    """Of the student."""
    student_width: int
    teacher_width: int
    maps: Mapping[str, Rotation | Unwhitened]
    """By group."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of what they were solved from, by what it is, such as ``student`` and ``ledger``."""
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    """By group: JSON values of ``rotate.solve`` and ``refine.refine``."""
    means: Mapping[str, Tensor] = field(default_factory=dict)
    """By site of the student: the teacher's mean row on the texts fitted on, [d_t] float64."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Name every group that the student has, in the order of the stream."""
        return all_groups(tie=self.tie, stage_layers=self.stage_layers, layers=self.layers)

    def rotations(self) -> dict[str, Rotation]:
        """Return the rotation of every group, in the order of the stream: what a fold needs.

        Raises:
            DataInvalid: a group has no map, or one that is not orthogonal.
        """
        found: dict[str, Rotation] = {}
        for group in self.groups:
            one = self.maps.get(group)
            if one is None:
                raise DataInvalid(f"rotations: {group} is missing; needed {', '.join(self.groups)}")
            if not isinstance(one, Rotation):
                raise DataInvalid(
                    f"rotations: {group} was fitted on z-scores (whiten), so its map is not "
                    "orthogonal and cannot be folded; solve with whiten false"
                )
            found[group] = one
        return found


def all_groups(*, tie: Tie, stage_layers: int, layers: int) -> tuple[str, ...]:
    """Name every group of a student of so many layers, in the order of the stream."""
    order = [*range(layers), None]
    names = [group_of(at, tie=tie, stage_layers=stage_layers, layers=layers) for at in order]
    return tuple(dict.fromkeys(names))


def join(sets: list[RotationSet]) -> RotationSet:
    """Put the groups of several sets, solved apart, into one.

    Raises:
        DataInvalid: none is given, they are of different students, teachers or ties, or two hold
            the same group.
    """
    if not sets:
        raise DataInvalid("rotations: needed at least one set, got none")
    first = sets[0]
    maps: dict[str, Rotation | Unwhitened] = {}
    diagnostics: dict[str, Any] = {}
    means: dict[str, Tensor] = {}
    for other in sets:
        if _facts(other) != _facts(first):
            raise DataInvalid(f"rotations: {_facts(other)} cannot be joined to {_facts(first)}")
        if twice := sorted(maps.keys() & other.maps.keys()):
            raise DataInvalid(f"rotations: {', '.join(twice)} is in two of the sets; needed in one")
        maps.update(other.maps)
        diagnostics.update(other.diagnostics)
        means.update(other.means)
    ordered = {group: maps[group] for group in first.groups if group in maps}
    told = {group: diagnostics[group] for group in ordered if group in diagnostics}
    return RotationSet(**_facts(first), maps=ordered, diagnostics=told, means=means)


def _facts(of: RotationSet) -> dict[str, Any]:
    return {
        "tie": of.tie,
        "stage_layers": of.stage_layers,
        "layers": of.layers,
        "student_width": of.student_width,
        "teacher_width": of.teacher_width,
        "sources": dict(of.sources),
    }
