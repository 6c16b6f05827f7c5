"""What document 000's own student may be told: its planes, its form, its size."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from core.errors import SpecInvalid
from core.specs.codebooks import (
    MOST_PLANES,
    PLANES,
    CanonicalPlanes,
    Codebook,
    CombinedPlanes,
    PrincipalPlanes,
    check_planes,
)
from core.specs.counts import linear
from core.specs.shaped import Shaped
from core.specs.sizes import Sizes


class Canonical(Shaped):
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

    def as_built(self, sizes: Sizes) -> Self:
        """Tell the planes, canonical ones by their number; see Shaped."""
        planes = self.planes()
        if isinstance(planes, CanonicalPlanes):
            return self.model_copy(update={"codebook": None, "n_components": planes.n_components})
        if isinstance(planes, CombinedPlanes):
            most = min(planes.planes_per_cluster, sizes.dim // 2)
            planes = planes.model_copy(update={"planes_per_cluster": most})
        return self.model_copy(update={"codebook": planes})

    def alike(self, sizes: Sizes) -> str:
        """See Shaped; on disjoint planes two of the forms are one."""
        built, planes = self.as_built(sizes), self.planes()
        disjoint = not isinstance(planes, PrincipalPlanes) or planes.disjoint
        if disjoint and self.transformer_type == "bivector_blend":
            built = built.model_copy(update={"transformer_type": "composed"})
        return built.model_dump_json()

    def planes(self) -> Codebook:
        """Return the codebook that is meant."""
        return self.codebook or CanonicalPlanes(n_components=self.n_components or PLANES)

    def parameters(self, sizes: Sizes) -> int:
        """Count query map, keys and biases of each layer, own planes and the anchor; see Shaped."""
        planes, dim = self.planes(), sizes.dim
        layer = linear(dim, dim) + planes.n_components * (dim + 1) + dim
        own = not isinstance(planes, CanonicalPlanes)
        kept = 2 * planes.n_components * dim + dim * dim if own else 0
        return self.layers * layer + kept + 1

    def units(self, sizes: Sizes) -> int:
        """See Shaped; planes that overlap are turned in one after another, each from a row."""
        planes = self.planes()
        overlap = isinstance(planes, PrincipalPlanes) and not planes.disjoint
        each = 2 * self.heads + 8 + (2 * sizes.dim if overlap else 0)
        return self.layers * (8 * sizes.dim + planes.n_components * each)

    def check_sizes(self, sizes: Sizes) -> None:
        """Raise SpecInvalid where the width has too few planes, or the heads do not divide it."""
        if self.codebook is None:
            check_planes(self.planes().n_components, sizes.dim, "/student/n_components")
        else:
            self.codebook.check_width(sizes.dim, "/student/codebook")
        self.check_heads(sizes.dim)

    def check_heads(self, dim: int) -> None:
        """Raise SpecInvalid where the heads do not divide the width."""
        if dim % self.heads:
            raise SpecInvalid(
                f"student.heads {self.heads} does not divide the width {dim}",
                pointer="/student/heads",
            )
