"""What a student may be told. One class per file in core/distill/students."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.errors import SpecInvalid
from core.specs.base import Closed
from core.specs.codebooks import MOST_PLANES, PLANES, CanonicalPlanes, Codebook, check_planes
from core.specs.teachers import Weighing

ROUTER_HIDDEN = 256
"""Width of a learnt router that is told none."""


class Canonical(Closed):
    """Document 000's own student: rotations in the planes of a codebook, by attention weights.

    On canonical planes it is kept for comparison: whatever it learns there stays close to the
    identity (science of document 000). Planes made of the teacher's bivectors, a larger
    ``angle_scale`` and ``bias: angle`` let it reach further.
    """

    name: Literal["canonical"] = "canonical"
    transformer_type: Literal["additive", "composed", "bivector_blend"] = Field(
        "composed",
        description="How a layer turns by one weight per plane: 'additive' sums the plane "
        "rotations by weight and puts the length right; 'composed' rotates in plane after plane; "
        "'bivector_blend' is the exponential of the blend. Disjoint planes commute: on them the "
        "last two are the same map.",
    )
    n_components: int | None = Field(
        None,
        ge=1,
        le=MOST_PLANES,
        description=f"Canonical planes, at most d/2; null: {PLANES}, or the codebook's.",
    )
    codebook: Codebook | None = Field(
        None,
        description="Which planes; null: canonical ones. 'pca' and 'combined' are made of the "
        "teacher's own bivectors, and the student then starts from q G as the teacher does.",
    )
    bias: Literal["none", "angle", "vector"] = Field(
        "none",
        description="'angle': a learnt constant angle per plane and layer. 'vector': a learnt "
        "vector, times the length of the query, added before lengths are put right.",
    )
    layers: int = Field(3, ge=1, le=32)
    heads: int = Field(4, ge=1, le=64)
    angle_scale: float = Field(
        1.0,
        gt=0,
        le=256,
        description="Radians by which all of a layer's weight in one plane turns it; document "
        "000's is 1.",
    )
    compat: Literal["legacy"] | None = Field(
        None,
        description="'legacy' adds document 000's learnt softplus scale, which changes lengths.",
    )

    @model_validator(mode="after")
    def _planes_are_told_once(self) -> Canonical:
        # Not model_fields_set: a stored job's spec names every field.
        if self.codebook is not None and self.n_components is not None:
            raise ValueError(
                f"n_components {self.n_components} beside codebook: leave it null, the codebook "
                "has its own"
            )
        if self.compat == "legacy" and self.angle_scale != 1.0:
            raise ValueError(
                f"angle_scale {self.angle_scale:g} with compat 'legacy'; allowed: 1, document 000's"
            )
        return self

    def planes(self) -> Codebook:
        """Return the codebook that is meant."""
        return self.codebook or CanonicalPlanes(n_components=self.n_components or PLANES)

    def check_width(self, dim: int) -> None:
        """Raise SpecInvalid where the width has too few planes, or the heads do not divide it."""
        if self.codebook is None:
            check_planes(self.planes().n_components, dim, "/student/n_components")
        else:
            self.codebook.check_width(dim, "/student/codebook")
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
