"""Files on their way in: announced, sent in parts, checked, imported."""

from typing import Annotated, Literal

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from api.bodies import StrictRoute
from api.deps import PROBLEMS, Context, Ctx, Reader, Submitter, body_steps
from api.routes.artifacts import view_artifact
from api.views import ArtifactView, UploadAsked, UploadPage, UploadView
from core.db.models import Upload

router = APIRouter(
    prefix="/v1/uploads", tags=["uploads"], route_class=StrictRoute, responses=PROBLEMS
)
UploadId = Annotated[str, Path(description="The upload's id.", max_length=64)]
Offset = Annotated[
    int,
    Header(alias="Upload-Offset", ge=0, le=2**53, description="Must equal received_bytes."),
]
UploadState = Literal["open", "importing", "complete", "failed"]
RAW_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("", status_code=201, summary="Announce a file")
def create(asked: UploadAsked, ctx: Ctx, by: Submitter, response: Response) -> UploadView:
    """Open an upload; send the bytes with PATCH, then complete it."""
    upload = ctx.uploads.create(project=by.project_id, by=by.actor, **asked.model_dump())
    response.headers["Location"] = f"/v1/uploads/{upload.id}"
    return show(ctx, upload)


@router.get("", summary="List uploads, newest first")
def list_uploads(
    ctx: Ctx,
    by: Reader,
    state: Annotated[UploadState | None, Query(description="Only uploads in this state.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> UploadPage:
    """Return the latest uploads; those with state=open can be gone on with, or discarded."""
    found = ctx.uploads.list(project=by.project_id, state=state, limit=limit)
    return UploadPage(items=[show(ctx, upload) for upload in found])


def show(ctx: Context, upload: Upload) -> UploadView:
    """Show an upload with what has come so far."""
    return UploadView.of(
        upload,
        received_bytes=ctx.uploads.received_bytes(upload),
        part_limit_bytes=ctx.settings.part_limit_bytes,
    )


@router.get("/{upload_id}", summary="Show an upload")
def get(upload_id: UploadId, ctx: Ctx, by: Reader) -> UploadView:
    """Return how much has come; after a broken part go on from received_bytes."""
    return show(ctx, ctx.uploads.get(upload_id, project=by.project_id))


@router.patch("/{upload_id}", summary="Send a part", openapi_extra=RAW_BODY)
async def append(
    upload_id: UploadId, offset: Offset, request: Request, ctx: Ctx, by: Submitter
) -> UploadView:
    """Append raw bytes at Upload-Offset; a wrong offset is a 409 that names the right one.

    A body that stops coming is a 408, and too many parts at once are a 503; both keep what came:
    ask for received_bytes and go on there.
    """

    def work() -> UploadView:
        upload = ctx.uploads.append(
            upload_id, offset=offset, stream=body_steps(request), project=by.project_id
        )
        return show(ctx, upload)

    return await ctx.parts.run(work, project=by.project_id)


@router.delete("/{upload_id}", status_code=204, summary="Discard an upload")
def discard(upload_id: UploadId, ctx: Ctx, by: Submitter) -> None:
    """Forget an unfinished upload and remove its bytes."""
    ctx.uploads.discard(upload_id, project=by.project_id, by=by.actor)


@router.post("/{upload_id}/complete", status_code=201, summary="Check and import a file")
async def complete(
    upload_id: UploadId, ctx: Ctx, by: Submitter, response: Response
) -> ArtifactView:
    """Check size and SHA-256, import in a sandbox, and return the artifact it became.

    The artifact's SHA-256 is that of the checked, canonical file. Completing again returns the
    same artifact. Content that breaks its format is a 422, and the upload is failed. Few files are
    imported at once: the call waits for its turn, and is a 503 where that does not come.
    """

    def work() -> ArtifactView:
        artifact = ctx.uploads.complete(upload_id, project=by.project_id, by=by.actor)
        return view_artifact(ctx, by, artifact.sha256)

    upload = await run_in_threadpool(ctx.uploads.get, upload_id, project=by.project_id)
    # Only an open upload can be imported; of any other it is said at once how it stands.
    if upload.state == "open":
        view = await ctx.imports.run(work, project=by.project_id)
    else:
        view = await run_in_threadpool(work)
    response.headers["Location"] = f"/v1/artifacts/{view.sha256}"
    return view
