"""What a student may be told. One class per file in core/distill/students."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.errors import SpecInvalid
from core.specs.base import Closed
from core.specs.teachers import Weighing

ROUTER_HIDDEN = 256
"""Width of a learnt router that is told none."""


class Canonical(Closed):
    """Document 000's own student: rotations in the fixed planes (2i, 2i+1).

    Kept for comparison: whatever it learns stays close to the identity (science of document 000).
    """

    name: Literal["canonical"] = "canonical"
    n_components: int = Field(64, ge=1, le=4096, description="Canonical planes; at most d/2.")
    layers: int = Field(3, ge=1, le=32)
    heads: int = Field(4, ge=1, le=64)

    def check_width(self, dim: int) -> None:
        """Raise SpecInvalid where the width has too few planes, or the heads do not divide it."""
        if self.n_components > dim // 2:
            raise SpecInvalid(
                f"student.n_components {self.n_components}; width {dim} has {dim // 2} planes, "
                f"allowed: 1 to {dim // 2}",
                pointer="/student/n_components",
            )
        if dim % self.heads:
            raise SpecInvalid(
                f"student.heads {self.heads} does not divide the width {dim}",
                pointer="/student/heads",
            )


class RotorProduct(Closed):
    """``q G prod_c exp(w_c L_c / 2)``, forward then reversed, each factor in its own planes."""

    name: Literal["rotor_product"] = "rotor_product"
    planes: int | None = Field(
        16,
        ge=1,
        le=4096,
        description="Planes kept per cluster, largest angles first; all dim // 2 where that "
        "is less, or null. A plane costs "
        "8 bytes per cluster and dimension: 16 planes of 64 clusters at 384 dimensions are 3.1 MB.",
    )
    router: Literal["exact", "learnt"] = "learnt"
    router_hidden: int | None = Field(
        None,
        ge=1,
        le=8192,
        description=f"Width of the learnt router; null: {ROUTER_HIDDEN}. The exact one has none.",
    )
    train_planes: bool = Field(
        default=False,
        description="Whether plane bases and angles are trained beside the learnt router. They "
        "start from the teacher's own, so it seldom pays for the time it takes (about 1.7 times). "
        "With the exact router and false nothing is trained: losses and learning rate then say "
        "nothing, and one epoch judges the student.",
    )

    @model_validator(mode="after")
    def _exact_has_no_width(self) -> RotorProduct:
        # Not model_fields_set: a stored job's spec names every field.
        if self.router == "exact" and self.router_hidden is not None:
            raise ValueError(
                f"router_hidden {self.router_hidden} is the learnt router's: leave it null with "
                "router 'exact'"
            )
        return self

    def check_width(self, dim: int) -> None:
        """Every width from 2 fits: it has dim // 2 planes, and all are kept where fewer."""
        if dim < 2:
            raise SpecInvalid(f"width {dim} has no plane to rotate in; allowed: 2 and more")


def check_router(student: Closed, teacher: Weighing) -> None:
    """Raise SpecInvalid where a student copies a routing that the teacher does not have."""
    if getattr(student, "router", None) == "exact" and teacher.routes_over != "queries":
        raise SpecInvalid(
            f"student.router 'exact' copies a routing over training queries; this teacher routes "
            f"over {teacher.routes_over}, allowed for it: 'learnt'",
            pointer="/student/router",
        )


Student = Annotated[Canonical | RotorProduct, Field(discriminator="name")]
