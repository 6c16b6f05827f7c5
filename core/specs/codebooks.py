"""What a codebook of rotation planes may be told: which planes, and how they are found."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core.errors import SpecInvalid
from core.specs.base import Closed

MOST_PLANES = 4096
PLANES = 64
"""Of a codebook that is told no number: document 000's."""


class CanonicalPlanes(Closed):
    """The planes (2i, 2i+1) of the axes, made from nothing."""

    method: Literal["canonical"] = "canonical"
    n_components: int = Field(PLANES, ge=1, le=MOST_PLANES, description="Planes; at most d/2.")

    def check_width(self, dim: int, pointer: str = "/codebook") -> None:
        """Raise SpecInvalid where the width has too few planes."""
        check_planes(self.n_components, dim, f"{pointer}/n_components")


class PrincipalPlanes(Closed):
    """The leading planes of the principal components of the clusters' bivectors."""

    method: Literal["pca"] = "pca"
    n_components: int = Field(
        PLANES,
        ge=1,
        le=MOST_PLANES,
        description="Planes; at most d/2 where they are disjoint, else at most d(d-1)/2.",
    )
    solver: Literal["full", "randomized", "incremental"] = Field(
        "full",
        description="'full' is exact, through the C x C Gram matrix; 'randomized' sketches the "
        "leading components from the job's seed (of teacher 'orthogonal' from 0); 'incremental' "
        "reads the clusters in blocks and keeps memory bounded however many there are.",
    )
    disjoint: bool = Field(
        default=True,
        description="Whether planes are made orthogonal to each other, the largest first, so that "
        "their rotations commute. False keeps them as found, overlapping.",
    )

    def check_width(self, dim: int, pointer: str = "/codebook") -> None:
        """Raise SpecInvalid where the width has too few planes."""
        most = None if self.disjoint else dim * (dim - 1) // 2
        check_planes(self.n_components, dim, f"{pointer}/n_components", most=most)


class CombinedPlanes(Closed):
    """Disjoint planes that several codebooks share, each weighed by what it explains.

    The sources are the model's clusters, each with its own leading planes and the weight of its
    training queries; a ``build_codebook`` job may add the codebook of another model.
    """

    method: Literal["combined"] = "combined"
    n_components: int = Field(PLANES, ge=1, le=MOST_PLANES, description="Planes; at most d/2.")
    planes_per_cluster: int = Field(
        16,
        ge=1,
        le=256,
        description="Leading planes each cluster brings; d/2 where that is less, and fewer where "
        f"all clusters together would bring more than {MOST_PLANES}.",
    )

    def brought(self, clusters: int, dim: int) -> int:
        """Return how many planes a cluster brings: what is combined grows with their square."""
        return min(self.planes_per_cluster, dim // 2, max(1, MOST_PLANES // clusters))

    def check_width(self, dim: int, pointer: str = "/codebook") -> None:
        """Raise SpecInvalid where the width has too few planes."""
        check_planes(self.n_components, dim, f"{pointer}/n_components")


Codebook = Annotated[
    CanonicalPlanes | PrincipalPlanes | CombinedPlanes, Field(discriminator="method")
]


def check_planes(planes: int, dim: int, pointer: str, *, most: int | None = None) -> None:
    """Raise SpecInvalid unless 1 <= planes <= most (d // 2, what disjoint planes allow)."""
    most = dim // 2 if most is None else most
    if not 1 <= planes <= most:
        allowed = f"allowed: 1 to {most}" if most else "which leaves no plane to rotate in"
        raise SpecInvalid(
            f"{pointer[1:].replace('/', '.')} {planes}; width {dim} has {most} planes, {allowed}",
            pointer=pointer,
        )
