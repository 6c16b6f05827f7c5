"""What a teacher may be told. One class per file in core/distill/teachers."""

from typing import Literal

from pydantic import Field

from core.specs.base import Closed


class Rotational(Closed):
    """Blend the logarithms of the clusters' rotations, then rotate by the exponential."""

    name: Literal["rotational"] = "rotational"
    top_k: int = Field(10, ge=1, le=1024, description="Training queries a query routes through.")
    temperature: float | None = Field(
        None, gt=0, le=100, description="Of the routing softmax; null takes the model's own."
    )
    tolerance: float = Field(
        1e-6, ge=1e-13, le=1e-2, description="Absolute error allowed per unit-length target."
    )
    dtype: Literal["float32", "float64"] = "float32"
    compat: Literal["legacy"] | None = Field(
        None, description="'legacy' blends log W as document 000 does, not log(G^T W) after G."
    )


Teacher = Rotational
