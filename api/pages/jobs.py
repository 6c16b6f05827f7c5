"""The list of jobs, a job's own page, and the buttons on it."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from api.deps import Context, Ctx, Reader, Submitter
from api.pages.render import PageRoute, form_of, page
from api.pages.submit import check_kind, uses_of
from api.problems import shown
from api.routes import jobs as resource
from api.routes.checkpoints import IndexPath, StagePath, kept, set_pinned
from api.routes.jobs import JobChange, JobIdPath
from api.views import EventView, JobView, WorkerView
from core.errors import SpecInvalid
from core.jobs import control, pool, projects, service
from core.jobs.events import latest
from core.jobs.keys import Principal
from core.jobs.states import TERMINAL, JobState
from core.kinds._base import kinds

router = APIRouter(route_class=PageRoute)
PAGE_SIZE = 50
EVENTS_SHOWN = 1000


@router.get("/")
def index(
    request: Request,
    ctx: Ctx,
    by: Reader,
    state: JobState | Literal[""] = "",
    kind: str = "",
    cursor: Annotated[str | None, Query()] = None,
) -> Response:
    """Show the jobs, newest first."""
    check_kind(kind)
    with ctx.reading() as session:
        jobs, following = service.list_jobs(
            session,
            project=by.project_id,
            limit=PAGE_SIZE,
            cursor=cursor,
            state=state or None,
            kind=kind or None,
        )
        items = ctx.show(session, jobs)
        project = projects.get(session, by.project_id).name
        workers = _workers(ctx)
    return page(
        request,
        "index.html",
        project=project,
        jobs=items,
        following=following,
        cursor=cursor,
        state=state,
        kind=kind,
        states=list(JobState),
        kinds=list(kinds()),
        workers=workers,
    )


def _workers(ctx: Context) -> list[WorkerView]:
    with ctx.reading() as session:
        found = pool.workers(session, now=ctx.clock())
    return [WorkerView.of(worker, alive=alive) for worker, alive in found if alive]


@router.get("/jobs/{job_id}")
def show(job_id: JobIdPath, request: Request, ctx: Ctx, by: Reader) -> Response:
    """Show a job: live progress, curves, artifacts, spec, what happened."""
    with ctx.reading() as session:
        found = service.get(session, job_id, project=by.project_id)
        job: JobView = ctx.show_one(session, found)
        events = latest(session, job_id, limit=EVENTS_SHOWN)
        retried_as = control.retried_as(session, job_id)
    artifacts = resource.outputs(ctx, by, job_id).items
    return page(
        request,
        "job.html",
        job=job,
        over=job.state in TERMINAL,
        events=[EventView.of(event) for event in events],
        artifacts=artifacts,
        checkpoints=kept(ctx, by, job_id),
        uses={output.format: uses_of(output.format) for output in artifacts},
        retried_as=retried_as,
    )


@router.post("/jobs/{job_id}/cancel")
def cancel(job_id: JobIdPath, ctx: Ctx, by: Submitter) -> Response:
    """Cancel and show the job again."""
    resource.cancel(job_id, ctx, by)
    return _back(job_id)


def _back(job_id: str) -> Response:
    return RedirectResponse(f"/jobs/{job_id}", 303)


@router.post("/jobs/{job_id}/pause")
def pause(job_id: JobIdPath, ctx: Ctx, by: Submitter) -> Response:
    """Pause and show the job again."""
    resource.pause(job_id, ctx, by)
    return _back(job_id)


@router.post("/jobs/{job_id}/resume")
def resume(job_id: JobIdPath, ctx: Ctx, by: Submitter) -> Response:
    """Resume and show the job again."""
    resource.resume(job_id, ctx, by)
    return _back(job_id)


@router.post("/jobs/{job_id}/retry")
def retry(job_id: JobIdPath, ctx: Ctx, by: Submitter) -> Response:
    """Retry and show the new job."""
    return _back(resource.retry(job_id, ctx, by, Response()).id)


@router.post("/jobs/{job_id}/priority")
async def prioritise(job_id: JobIdPath, request: Request, ctx: Ctx, by: Submitter) -> Response:
    """Change the priority and show the job again."""
    fields = await form_of(request)
    return await run_in_threadpool(_prioritise, job_id, ctx, by, fields.get("priority", ""))


def _prioritise(job_id: str, ctx: Context, by: Principal, text: str) -> Response:
    with ctx.reading() as session:
        service.get(session, job_id, project=by.project_id)  # before the value is looked at
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else -1
    if not 0 <= number <= 100:
        raise SpecInvalid(f"priority: {shown(text)}; allowed: 0 to 100", pointer="/priority")
    resource.change(job_id, JobChange(priority=number), ctx, by)
    return _back(job_id)


@router.post("/jobs/{job_id}/checkpoints/{stage}/{index}/pin")
def pin(job_id: JobIdPath, stage: StagePath, index: IndexPath, ctx: Ctx, by: Submitter) -> Response:
    """Pin and show the job again."""
    set_pinned(ctx, by, job_id, stage, index, pinned=True)
    return _back(job_id)


@router.post("/jobs/{job_id}/checkpoints/{stage}/{index}/unpin")
def unpin(
    job_id: JobIdPath, stage: StagePath, index: IndexPath, ctx: Ctx, by: Submitter
) -> Response:
    """Unpin and show the job again."""
    set_pinned(ctx, by, job_id, stage, index, pinned=False)
    return _back(job_id)
