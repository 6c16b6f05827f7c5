"""Stored files: what they are, where they come from, and their bytes."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from api.deps import PROBLEMS, Context, Ctx, Reader
from api.downloads import serve
from api.routes.jobs import JobIdPath
from api.views import ArtifactView
from core.errors import NotFound
from core.jobs import lineage, service
from core.jobs.keys import Principal

router = APIRouter(prefix="/v1", tags=["artifacts"], responses=PROBLEMS)
Sha256Path = Annotated[str, Path(description="SHA-256 of the bytes.", max_length=64)]
BYTES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The bytes.", "content": {"application/octet-stream": {}}},
    206: {"description": "The bytes of one Range."},
    304: {"description": "If-None-Match named these bytes."},
    416: {"description": "The Range lies outside the file."},
}


@router.get("/artifacts/{sha256}", summary="Show an artifact and its lineage")
def get(sha256: Sha256Path, ctx: Ctx, by: Reader) -> ArtifactView:
    """Return what it is, which jobs made it from what, and which uploads became it."""
    return view_artifact(ctx, by, sha256)


def view_artifact(ctx: Context, by: Principal, sha256: str) -> ArtifactView:
    """Return an artifact with its lineage in the project, or raise NotFound."""
    project = by.project_id
    with ctx.reading() as session:
        return ArtifactView.of(
            lineage.artifact(session, sha256, project=project),
            produced_by=lineage.produced_by(session, sha256, project=project),
            uploaded_as=lineage.uploaded_as(session, sha256, project=project),
        )


@router.head("/artifacts/{sha256}/content", include_in_schema=False)
@router.get(
    "/artifacts/{sha256}/content",
    summary="Download an artifact",
    response_class=Response,
    responses={**PROBLEMS, **BYTES},
)
def content(sha256: Sha256Path, request: Request, ctx: Ctx, by: Reader) -> Response:
    """Send the bytes. ETag is the SHA-256; Range and If-Range resume a broken download."""
    with ctx.reading() as session:
        found = lineage.artifact(session, sha256, project=by.project_id)
    return serve(
        request,
        ctx.store.path(sha256),
        sha256=sha256,
        file_name=found.file_name,
        media_type=found.media_type,
    )


@router.head("/jobs/{job_id}/artifacts/{name}/content", include_in_schema=False)
@router.get(
    "/jobs/{job_id}/artifacts/{name}/content",
    summary="Download a job's output by name",
    response_class=Response,
    responses={**PROBLEMS, **BYTES},
)
def job_content(
    job_id: JobIdPath,
    name: Annotated[str, Path(max_length=128)],
    request: Request,
    ctx: Ctx,
    by: Reader,
) -> Response:
    """Send the bytes under the job's own file name."""
    with ctx.reading() as session:
        service.get(session, job_id, project=by.project_id)
        made = {
            output.name: (output, artifact)
            for output, artifact in lineage.outputs_of(session, job_id, role="artifact")
        }
    if name not in made:
        there = ", ".join(sorted(made)) or "none yet"
        raise NotFound(f"job {job_id} has no output {name!r}; it has: {there}")
    output, artifact = made[name]
    return serve(
        request,
        ctx.store.path(output.sha256),
        sha256=output.sha256,
        file_name=output.file_name,
        media_type=artifact.media_type,
    )
