"""What every student's spec has: which models it learns from, and how a model's sizes bind it."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Self

from core.errors import SpecInvalid
from core.specs.base import Closed
from core.specs.losses import Compares
from core.specs.sizes import Sizes
from core.specs.teachers import ModelFormat


class Shaped(Closed):
    """A student; one that keeps lengths and learns from models of rotations unless it says."""

    learns_from: ClassVar[tuple[ModelFormat, ...]] = ("federated_model",)
    """Formats of the models whose teachers it can follow."""

    def check_sizes(self, sizes: Sizes) -> None:
        """Raise SpecInvalid where a student of these sizes cannot be built."""
        if sizes.dim < 2:
            raise SpecInvalid(f"width {sizes.dim} has no plane to rotate in; allowed: 2 and more")

    def as_built(self, sizes: Sizes) -> Self:
        """Return the same student with its fields as they act on a model.

        What null means is told, and what a model has fewer of is cut: two specs of which this
        is equal are one student.
        """
        del sizes
        return self

    def alike(self, sizes: Sizes) -> str:
        """Return what two specs have in common if and only if they are one map on this model."""
        return self.as_built(sizes).model_dump_json()

    def compares(self, sizes: Sizes) -> Compares:
        """Return what of its answers is held against the teacher's."""
        del sizes
        return "directions"

    @abstractmethod
    def parameters(self, sizes: Sizes) -> int:
        """Return how many numbers the built student keeps, buffers too; never fewer."""

    def copied(self, sizes: Sizes) -> int:
        """Return how many of those are the model's training queries, which no training changes."""
        del sizes
        return 0

    @abstractmethod
    def units(self, sizes: Sizes) -> int:
        """Return about how many numbers of one query the gradient keeps, rather too many."""

    def routes(self) -> bool:
        """Whether it has a router of its own that the teacher's weights can teach."""
        return False

    def decodes(self) -> bool:
        """Whether it has a decoder, which brings its answers back to the teacher's width."""
        return False
