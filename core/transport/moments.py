"""Moments of aligned rows of two residual streams: additive, so any split of the rows gives them.

One pair of sites holds ``8 (1 + d_s + d_t + d_s^2 + d_t^2 + d_s d_t)`` bytes. Statistics of neurons
and heads are of the same sort; ``memory.moments_bytes`` tells what all of a capture takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor

from core.architectures.shape import ModelShape
from core.errors import DataInvalid
from core.specs.transport import Permute
from core.transport.memory import permutable, permuted_layers
from core.transport.sites import sites

ROWS = 4096
"""Rows summed in one float32 product, before its result is added to float64."""
PANELS, NARROWEST = 8, 192
"""A symmetric product is computed in so many panels, none narrower, of its upper half alone."""


@dataclass(frozen=True)
class _Sums:
    """Tensors of float64 that add."""

    whole: ClassVar[bool] = False
    """Whether xx and yy are matrices, not diagonals alone."""

    def __add__(self, other: Self) -> Self:
        """Return the sums over both sets of rows."""
        pairs = zip(self.tensors().values(), other.tensors().values(), strict=True)
        return type(self)(*(mine + theirs for mine, theirs in pairs))

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape that each sum must have, by those of ``xy`` alone."""
        student, teacher = self.tensors()["xy"].shape
        return {
            "n": (),
            "sum_x": (student,),
            "sum_y": (teacher,),
            "xx": (student, student) if self.whole else (student,),
            "yy": (teacher, teacher) if self.whole else (teacher,),
            "xy": (student, teacher),
        }


@dataclass(frozen=True)
class Moments(_Sums):
    """Sums over aligned tokens: x the student's row, y the teacher's, w the token's weight.

    All float64; ``sum w``, ``sum w x`` [d_s], ``sum w y`` [d_t], ``sum w x^T x`` [d_s, d_s],
    ``sum w y^T y`` [d_t, d_t], ``sum w x^T y`` [d_s, d_t].
    """

    whole: ClassVar[bool] = True
    n: Tensor
    """[] float64."""
    sum_x: Tensor
    sum_y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    @classmethod
    def zeros(cls, student: int, teacher: int, *, device: torch.device) -> Moments:
        """Return the moments of no rows, for streams of these widths."""
        shapes = [(), (student,), (teacher,), (student,) * 2, (teacher,) * 2, (student, teacher)]
        return cls(*_zeros(shapes, device))


@dataclass(frozen=True)
class NeuronMoments(_Sums):
    """The same sums of MLP activations, of their squares the diagonals alone. float64.

    x: the student's neurons [M_s], silu(gate) * up; y: the teacher's [M_t].
    """

    n: Tensor
    """[]"""
    sum_x: Tensor
    """[M_s]"""
    sum_y: Tensor
    """[M_t]"""
    xx: Tensor
    """[M_s]: ``sum w x^2``"""
    yy: Tensor
    """[M_t]"""
    xy: Tensor
    """[M_s, M_t]"""

    @classmethod
    def zeros(cls, student: int, teacher: int, *, device: torch.device) -> NeuronMoments:
        """Return the moments of no rows, for MLPs with so many neurons."""
        shapes = [(), (student,), (teacher,), (student,), (teacher,), (student, teacher)]
        return cls(*_zeros(shapes, device))


@dataclass(frozen=True)
class HeadMoments(_Sums):
    """Inner products of attention maps, summed over texts. float64.

    ``xy[i, j] / sqrt(xx[i] yy[j])`` is the cosine of the maps of the student's head i and the
    teacher's head j.
    """

    xx: Tensor
    """[H_s]: squared lengths of the student's maps"""
    yy: Tensor
    """[H_t]"""
    xy: Tensor
    """[H_s, H_t]"""

    @classmethod
    def zeros(cls, student: int, teacher: int, *, device: torch.device) -> HeadMoments:
        """Return the products of no texts, for so many query heads."""
        return cls(*_zeros([(student,), (teacher,), (student, teacher)], device))


@dataclass(frozen=True)
class Captured:
    """All that a capture sums; layers and sites are the student's."""

    sites: Mapping[str, Moments]
    neurons: Mapping[int, NeuronMoments]
    heads: Mapping[int, HeadMoments]

    @classmethod
    def zeros(
        cls,
        student: ModelShape,
        teacher: ModelShape,
        *,
        permute: Permute | None,
        device: torch.device,
    ) -> Captured:
        """Return the sums over no texts, all that ``memory.moments_bytes`` counts."""
        layers = permuted_layers(permute, student.layers)
        neurons, heads = permutable(student, teacher, permute)
        return cls(
            {
                site: Moments.zeros(student.width, teacher.width, device=device)
                for site in sites(student)
            },
            {
                layer: NeuronMoments.zeros(student.neurons, teacher.neurons, device=device)
                for layer in (layers if neurons else ())
            },
            {
                layer: HeadMoments.zeros(student.heads, teacher.heads, device=device)
                for layer in (layers if heads else ())
            },
        )

    def sums(self) -> Iterator[tuple[str, _Sums]]:
        """Yield every sum by its name in a file: ``attention.3``, ``neurons.3``, ``heads.3``."""
        yield from self.sites.items()
        yield from ((f"neurons.{layer}", found) for layer, found in self.neurons.items())
        yield from ((f"heads.{layer}", found) for layer, found in self.heads.items())

    def check_finite(self) -> None:
        """Raise DataInvalid, naming the first place, where a sum is infinite or no number."""
        for name, found in self.sums():
            for what, tensor in found.tensors().items():
                if not torch.isfinite(tensor).all():
                    raise DataInvalid(
                        f"{name}: {what} is not finite; a model overflows in its dtype, or its "
                        "weights are broken: try dtype float32"
                    )


def add_rows(into: Moments, x: Tensor, y: Tensor, weight: Tensor) -> None:
    """Add the moments of aligned rows to ``into``, in place; of its symmetric ones the upper half.

    Products are float32 (float64 of float64 rows) over at most ``ROWS`` rows and added in float64.
    ``mirror`` fills in the lower halves, once, after the last rows.

    Args:
        into: changed.
        x: [P, d_s], the student's; may be scaled in place.
        y: [P, d_t], the teacher's; may be scaled in place.
        weight: [P], not negative, of the rows' dtype.
    """
    root = weight.sqrt()
    into.n.add_(weight.sum(dtype=torch.float64))
    x.mul_(root[:, None])
    y.mul_(root[:, None])
    for start in range(0, len(x), ROWS):
        rows, ours, theirs = (whole[start : start + ROWS] for whole in (root, x, y))
        into.sum_x.add_(rows @ ours)
        into.sum_y.add_(rows @ theirs)
        _add_gram(into.xx, ours)
        _add_gram(into.yy, theirs)
        into.xy.add_(ours.mT @ theirs)


def add_activations(into: NeuronMoments, x: Tensor, y: Tensor, weight: Tensor) -> None:
    """Add the sums of aligned rows of activations to ``into``, in place.

    Args:
        into: changed.
        x: [P, M_s]; may be scaled in place.
        y: [P, M_t]; may be scaled in place.
        weight: [P], not negative, of the rows' dtype.
    """
    root = weight.sqrt()
    into.n.add_(weight.sum(dtype=torch.float64))
    x.mul_(root[:, None])
    y.mul_(root[:, None])
    for start in range(0, len(x), ROWS):
        rows, ours, theirs = (whole[start : start + ROWS] for whole in (root, x, y))
        into.sum_x.add_(rows @ ours)
        into.sum_y.add_(rows @ theirs)
        into.xx.add_(ours.square().sum(0))
        into.yy.add_(theirs.square().sum(0))
        into.xy.add_(ours.mT @ theirs)


def add_maps(into: HeadMoments, x: Tensor, y: Tensor, weight: Tensor) -> None:
    """Add the inner products of one text's attention maps to ``into``, in place.

    Args:
        into: changed.
        x: [H_s, P, K], the student's: of aligned queries to keys.
        y: [H_t, P, K], the teacher's, on the same queries and keys.
        weight: [P] of the queries.
    """
    root = weight.sqrt()[:, None]
    ours, theirs = (x * root).flatten(1), (y * root).flatten(1)
    into.xx.add_(ours.square().sum(-1))
    into.yy.add_(theirs.square().sum(-1))
    into.xy.add_(ours @ theirs.mT)


def mirror(moments: Moments) -> None:
    """Copy the upper halves of the symmetric moments into the lower ones, in place."""
    for whole in (moments.xx, moments.yy):
        for start, stop in _panels(len(whole)):
            whole[stop:, start:stop].copy_(whole[start:stop, stop:].mT)


def _add_gram(into: Tensor, rows: Tensor) -> None:
    """Add rows^T rows, panel by panel: of each what stands on the diagonal and to its right."""
    for start, stop in _panels(len(into)):
        into[start:stop, start:].add_(rows[:, start:stop].mT @ rows[:, start:])


def _panels(width: int) -> list[tuple[int, int]]:
    step = max(NARROWEST, -(-width // PANELS))
    return [(start, min(start + step, width)) for start in range(0, width, step)]


def _zeros(shapes: list[tuple[int, ...]], device: torch.device) -> Iterator[Tensor]:
    return (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
