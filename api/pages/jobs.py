"""The list of jobs, and a job's own page."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import RedirectResponse, Response

from api.deps import Context, Ctx
from api.pages.render import PageRoute, page
from api.pages.submit import check_kind, uses_of
from api.routes import jobs as resource
from api.routes.jobs import JobIdPath
from api.views import EventView, JobView, WorkerView
from core.jobs import pool, service
from core.jobs.events import list_events
from core.jobs.states import TERMINAL, JobState
from core.kinds._base import kinds

router = APIRouter(route_class=PageRoute)
PAGE_SIZE = 50
EVENTS_SHOWN = 1000


@router.get("/")
def index(
    request: Request,
    ctx: Ctx,
    state: JobState | Literal[""] = "",
    kind: str = "",
    cursor: Annotated[str | None, Query()] = None,
) -> Response:
    """Show the jobs, newest first."""
    check_kind(kind)
    with ctx.reading() as session:
        jobs, following = service.list_jobs(
            session, limit=PAGE_SIZE, cursor=cursor, state=state or None, kind=kind or None
        )
        items = ctx.show(session, jobs)
        workers = _workers(ctx)
    return page(
        request,
        "index.html",
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
def show(job_id: JobIdPath, request: Request, ctx: Ctx) -> Response:
    """Show a job: live progress, curves, artifacts, spec, what happened."""
    with ctx.reading() as session:
        job: JobView = ctx.show(session, [service.get(session, job_id)])[0]
        events = list_events(session, job_id, after=0, limit=EVENTS_SHOWN)
    artifacts = resource.outputs(ctx, job_id, role="artifact").items
    checkpoints = resource.outputs(ctx, job_id, role="checkpoint").items
    return page(
        request,
        "job.html",
        job=job,
        over=job.state in TERMINAL,
        events=[EventView.of(event) for event in events],
        artifacts=artifacts,
        checkpoints=checkpoints,
        uses={output.format: uses_of(output.format) for output in artifacts},
    )


@router.post("/jobs/{job_id}/cancel")
def cancel(job_id: JobIdPath, ctx: Ctx) -> Response:
    """Cancel and show the job again."""
    with ctx.transaction() as session:
        service.cancel(session, job_id, now=ctx.clock())
    return RedirectResponse(f"/jobs/{job_id}", 303)
