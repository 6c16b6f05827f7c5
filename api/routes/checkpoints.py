"""What a job's chunks left for later chunks: shown, and pinned against retention."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import Field

from api.bodies import StrictRoute
from api.deps import PROBLEMS, Context, Ctx, Reader, Submitter
from api.routes.jobs import JobIdPath
from api.views import OutputView, View
from core.db.models import Artifact, Chunk, Output
from core.jobs import checkpoints, control, service
from core.jobs.keys import Principal

router = APIRouter(
    prefix="/v1/jobs/{job_id}/checkpoints",
    tags=["jobs"],
    route_class=StrictRoute,
    responses=PROBLEMS,
)
StagePath = Annotated[str, Path(description="The chunk's stage.", max_length=64)]
IndexPath = Annotated[int, Path(description="The chunk's index in its stage.", ge=0, le=2**31 - 1)]


class CheckpointView(OutputView):
    """A file that a chunk left for later chunks, and why it is still there."""

    stage: str
    index: int = Field(description="Of the chunk, within its stage.")
    score: float | None = Field(description="How good it is, the lowest of a stage is kept.")
    pinned: bool = Field(description="Kept whatever retention says.")

    @classmethod
    def shown(cls, output: Output, artifact: Artifact, chunk: Chunk) -> "CheckpointView":
        """Join what it is with the chunk that made it."""
        file = OutputView.of(output, artifact).model_dump()
        whose = {"stage": chunk.stage, "index": chunk.index, "score": chunk.score}
        return cls.model_validate({**file, **whose, "pinned": output.pinned})


class CheckpointPage(View):
    """Checkpoints in the order of their chunks."""

    items: list[CheckpointView]


@router.get("", summary="A job's checkpoints")
def list_checkpoints(job_id: JobIdPath, ctx: Ctx, by: Reader) -> CheckpointPage:
    """Return what retention has left: of a chain the best, the latest and the pinned ones."""
    return CheckpointPage(items=kept(ctx, by, job_id))


def kept(ctx: Context, by: Principal, job_id: str) -> Sequence[CheckpointView]:
    """Return a job's checkpoints; NotFound where there is no such job."""
    with ctx.reading() as session:
        service.get(session, job_id, project=by.project_id)
        found = checkpoints.kept(session, job_id)
        return [CheckpointView.shown(*row) for row in found]


@router.post("/{stage}/{index}/pin", summary="Keep a chunk's checkpoints")
def pin(
    job_id: JobIdPath, stage: StagePath, index: IndexPath, ctx: Ctx, by: Submitter
) -> CheckpointPage:
    """Keep what this chunk left, whatever retention says; a 404 where it is gone already."""
    return set_pinned(ctx, by, job_id, stage, index, pinned=True)


@router.delete("/{stage}/{index}/pin", summary="Leave a chunk's checkpoints to retention")
def unpin(
    job_id: JobIdPath, stage: StagePath, index: IndexPath, ctx: Ctx, by: Submitter
) -> CheckpointPage:
    """Take the pin off: the next chunk of the stage that ends may take them away."""
    return set_pinned(ctx, by, job_id, stage, index, pinned=False)


def set_pinned(
    ctx: Context, by: Principal, job_id: str, stage: str, index: int, *, pinned: bool
) -> CheckpointPage:
    """Pin or unpin, and show the chunk's checkpoints."""
    action = "checkpoint.pin" if pinned else "checkpoint.unpin"
    with ctx.transaction() as session:
        control.pin(session, job_id, stage=stage, index=index, pinned=pinned, project=by.project_id)
        ctx.note(session, by, action, job_id, stage=stage, index=index)
        found = checkpoints.kept(session, job_id, stage=stage, index=index)
        return CheckpointPage(items=[CheckpointView.shown(*row) for row in found])
