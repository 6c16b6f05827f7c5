"""What a student may be told. One class per file in core/distill/students."""

from typing import Annotated, Literal

from pydantic import Field

from core.specs.base import Closed


class Canonical(Closed):
    """Document 000's own student: rotations in the fixed planes (2i, 2i+1).

    Kept for comparison: whatever it learns stays close to the identity (science of document 000).
    """

    name: Literal["canonical"] = "canonical"
    n_components: int = Field(64, ge=1, le=4096, description="Canonical planes; at most d/2.")
    layers: int = Field(3, ge=1, le=32)
    heads: int = Field(4, ge=1, le=64)


class RotorProduct(Closed):
    """``q G prod_c exp(w_c L_c / 2)``, forward then reversed, each factor in its own planes."""

    name: Literal["rotor_product"] = "rotor_product"
    planes: int | None = Field(
        16,
        ge=1,
        le=4096,
        description="Planes kept per cluster, largest angles first; null: all. A plane costs "
        "8 bytes per cluster and dimension: 16 planes of 64 clusters at 384 dimensions are 3.1 MB.",
    )
    router: Literal["exact", "learnt"] = "learnt"
    router_hidden: int = Field(256, ge=1, le=8192, description="Width of the learnt router.")
    train_planes: bool = Field(
        default=False,
        description="Whether plane bases and angles are trained beside the learnt router. They "
        "start from the teacher's own, so it seldom pays for the time it takes (about 1.7 times).",
    )


Student = Annotated[Canonical | RotorProduct, Field(discriminator="name")]
