"""What a job would cost and when it would start, before it is submitted."""

from datetime import datetime
from typing import Literal

from fastapi import APIRouter
from pydantic import Field

from api.bodies import StrictRoute
from api.deps import PROBLEMS, Ctx, Submitter
from api.specs import AnySpec
from api.views import View
from core.jobs import estimates

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=StrictRoute, responses=PROBLEMS)


class StageEstimateView(View):
    """Chunks that run alike."""

    name: str
    chunks: int
    chained: bool = Field(description="Whether each chunk starts from what the one before made.")
    device: Literal["cpu", "gpu"] | None = Field(description="The only kind it runs on; null: any.")
    memory_bytes: int = Field(description="What a chunk asks of its device at least.")
    seconds_per_chunk: float | None = Field(
        description="Mean of the project's latest finished jobs of the kind; null: never timed."
    )


class StageCostView(View):
    """Of all chunks of a stage together."""

    stage: str
    operations: float = Field(description="Of floating-point numbers.")
    read_bytes: float
    written_bytes: float
    seconds: float = Field(description="On one device, at the rates that `assumes` tells.")


class CostView(View):
    """What a job would take by counting, whatever was run before."""

    stages: list[StageCostView]
    passes: dict[str, int] = Field(description="Forward passes by model, in tokens.")
    assumes: dict[str, str] = Field(description="What the seconds rest on.")


class EstimateView(View):
    """What is known of a job before it is submitted; null where nothing is."""

    stages: list[StageEstimateView] | None = Field(
        description="Null while an input is yet to be made by another job."
    )
    chunks: int | None
    memory_bytes: int | None = Field(description="The most that any chunk asks of its device.")
    device_seconds: float | None = Field(description="Of all chunks together, on one device each.")
    device_seconds_from: str = Field(description="What that rests on, or why there is none.")
    cache_hits: int | None = Field(
        description="Files that need not be computed; null where that shows only when it runs."
    )
    cache_hits_from: str = Field(description="What that rests on, or why there is none.")
    can_run: bool = Field(description="Whether live workers could run every stage.")
    why_not: str | None = Field(description="What is missing, where they could not.")
    waits_for: str | None = Field(description="Why it would not run at once.")
    queue_position: int | None = Field(description="It would have in its project's queue.")
    predicted_start_at: datetime | None = Field(description="A guess; null where none is made.")
    cost: CostView | None = Field(
        description="Counted from the inputs' sizes; null where the kind cannot, or an input is "
        "yet to be made."
    )


@router.post("/estimate", summary="Estimate a job")
def estimate(spec: AnySpec, ctx: Ctx, by: Submitter) -> EstimateView:
    """Check a spec as submitting it would, and tell what the job would take. Nothing is kept.

    What could not be submitted is refused in the same way, with the same code and pointers.
    """
    with ctx.transaction() as session:
        found = estimates.estimate(
            session,
            spec,
            project=by.project_id,
            by=by.actor,
            now=ctx.clock(),
            fairness=ctx.fairness,
        )
    return EstimateView.model_validate(found)
