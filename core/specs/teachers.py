"""What a teacher may be told. One class per file in core/distill/teachers."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from core.specs.base import Closed

FLOAT32_TOLERANCE = 1e-6
"""What float32 holds; below it a tolerance would be a promise that rounding breaks."""


class Rotational(Closed):
    """Blend the logarithms of the clusters' rotations, then rotate by the exponential."""

    answers_new: ClassVar[bool] = True
    """Whether it answers queries that nobody stored."""

    name: Literal["rotational"] = "rotational"
    top_k: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Training queries a query routes through; null takes the model's own "
        "(10 where it has none).",
    )
    temperature: float | None = Field(
        None, gt=0, le=100, description="Of the routing softmax; null takes the model's own."
    )
    tolerance: float = Field(
        1e-6,
        ge=1e-13,
        le=1e-2,
        description="Absolute error allowed per unit-length target; with float32 at least 1e-6.",
    )
    dtype: Literal["float32", "float64"] = "float32"
    compat: Literal["legacy"] | None = Field(
        None, description="'legacy' blends log W as document 000 does, not log(G^T W) after G."
    )

    @model_validator(mode="after")
    def _float32_holds_the_tolerance(self) -> Self:
        if self.dtype == "float32" and self.tolerance < FLOAT32_TOLERANCE:
            raise ValueError(
                f"tolerance {self.tolerance:g} with dtype 'float32'; allowed: tolerance from "
                f"{FLOAT32_TOLERANCE:g} up, or dtype 'float64' from 1e-13 up"
            )
        return self


Teacher = Rotational
