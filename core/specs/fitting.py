"""What every fit to pairs may be told: which pairs, and what of them it never sees. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core.specs.base import JobSpec, Reads, Reference

Split = Literal["query", "cluster"]
TestFraction = Annotated[float, Field(gt=0, lt=0.9)]


class FittingSpec(JobSpec):
    """The pairs, and which of them are held out."""

    pairs: Annotated[Reference, Reads("pairs")] = Field(
        description="Queries and their targets; groups, where there are, say which belong together."
    )
    test_fraction: TestFraction = Field(
        0.2, description="Of the distinct queries, never fitted on; by cluster about."
    )
    split: Split = Field(
        "query",
        description="What is held out together: single queries, or whole clusters of targets "
        "(of the same clustering), so that what is judged is of a sort never fitted on.",
    )
