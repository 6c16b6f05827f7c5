"""Submit, list and show jobs; cancel, pause, resume, retry and change them."""

import hashlib
import json
import logging
from datetime import datetime
from typing import Annotated, Self, TypedDict

from fastapi import APIRouter, Header, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from api.bodies import StrictRoute
from api.deps import PROBLEMS, Context, Ctx, Reader, Submitter
from api.views import (
    AnySpec,
    JobId,
    JobPage,
    JobView,
    MetricsView,
    OutputPage,
    OutputView,
    View,
)
from core import logs, tracing
from core.errors import SpecInvalid
from core.jobs import control, lineage, service
from core.jobs.keys import Principal
from core.jobs.states import JobState
from core.specs.base import JobSpec

log = logging.getLogger("stillroom.api")
router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=StrictRoute, responses=PROBLEMS)
JobIdPath = Annotated[str, Path(description="The job's id.", max_length=64)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern="^[!-~]+$",
        description="Sending the same body again under the same key within 24 hours answers with "
        "the first job and Idempotent-Replayed: true; another body is a 422.",
    ),
]


@router.post("", status_code=201, summary="Submit a job")
def submit(
    spec: AnySpec,
    ctx: Ctx,
    by: Submitter,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobView:
    """Take a spec. Where an input is "job_id/output" of an unfinished job, the job waits for it."""
    view, replayed = take(ctx, by, spec, idempotency_key=idempotency_key)
    response.headers["Location"] = f"/v1/jobs/{view.id}"
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return view


class JobChange(BaseModel):
    """What to change of a job; at least one field."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"priority": 80}, {"name": "the one that counts"}]},
    )

    priority: int = Field(default_factory=int, ge=0, le=100, description="Higher runs first.")
    name: str = Field(
        default_factory=str, min_length=1, max_length=200, description="Shown in lists."
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("nothing to change; allowed: priority, name")
        return self


class RetriedView(View):
    """A job that was retried because another was."""

    id: JobId
    retry_of: str = Field(description="The job that it goes on with.")
    kind: str
    name: str | None


class RetryView(JobView):
    """The new job, and what was retried with it."""

    retried_with: list[RetriedView] = Field(
        description="Jobs that failed only for want of an output of the retried one."
    )


class _Asked(TypedDict):
    project: str
    by: str
    now: datetime
    trace: str | None


def take(
    ctx: Context, by: Principal, spec: JobSpec, *, idempotency_key: str | None = None
) -> tuple[JobView, bool]:
    """Submit a job and wake who can run it; True where the key brought back an earlier one."""
    asked: _Asked = {
        "project": by.project_id,
        "by": by.actor,
        "now": ctx.clock(),
        "trace": tracing.current_traceparent(),
    }
    with ctx.waking() as session:
        if idempotency_key is None:
            job, replayed = service.submit(session, spec, **asked), False
        else:
            said = json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()
            digest = hashlib.sha256(said).hexdigest()
            job, replayed = service.submit_once(
                session, spec, key=idempotency_key, body_sha256=digest, **asked
            )
        if not replayed:
            ctx.note(session, by, "job.submit", job.id, kind=job.kind)
        view = ctx.show_new(session, job)
    if not replayed:  # once it is committed
        with logs.about(job=view.id):
            log.info("submitted: %s", view.kind)
    return view, replayed


@router.get("", summary="List jobs, newest first", response_model=JobPage)
def list_jobs(
    ctx: Ctx,
    by: Reader,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    kind: Annotated[str | None, Query(description="Only jobs of this kind.")] = None,
    name: Annotated[str | None, Query(description="Only jobs of exactly this name.")] = None,
    label: Annotated[
        list[str] | None, Query(description="key:value; several must all match.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(description="next_cursor of the page before.")] = None,
) -> Response:
    """Return a page; follow next_cursor for the rest."""
    labels = parse_pairs(label or [], parameter="label")
    with ctx.reading() as session:
        try:
            jobs, following = service.list_jobs(
                session,
                project=by.project_id,
                limit=limit,
                cursor=cursor,
                state=state,
                kind=kind,
                name=name,
                labels=labels,
            )
        except SpecInvalid as error:
            raise of_query(error) from error
        page = JobPage(items=ctx.show(session, jobs), next_cursor=following)
    return written(page.model_dump_json())


def of_query(error: SpecInvalid) -> SpecInvalid:
    """Blame the query parameter: the core does not know where in the request a value stood."""
    return SpecInvalid(error.message, pointer=f"/query{error.pointer or '/label'}")


def parse_pairs(texts: list[str], *, parameter: str) -> dict[str, str]:
    """Split ``key:value`` texts; the key ends at the first colon."""
    found: dict[str, str] = {}
    pointer = f"/query/{parameter}"
    for text in texts:
        key, colon, value = text.partition(":")
        if not (key and colon and value):
            raise SpecInvalid(f"{parameter}: {text!r} is not key:value", pointer=pointer)
        if found.setdefault(key, value) != value:
            raise SpecInvalid(f"{parameter}: {key!r} is asked twice", pointer=pointer)
    return found


@router.get("/{job_id}", summary="Show a job", response_model=JobView)
async def get(job_id: JobIdPath, ctx: Ctx, by: Reader) -> Response:
    """Return the job with its progress, why it waits, its error and its artifacts."""
    return written(await ctx.looks.at(job_id, project=by.project_id))


def written(shown: str) -> Response:
    """Return JSON as it is; the framework would check it once more, in yet another thread."""
    return Response(shown, media_type="application/json")


@router.post("/{job_id}/cancel", summary="Cancel a job")
def cancel(job_id: JobIdPath, ctx: Ctx, by: Submitter) -> JobView:
    """Stop at once where nothing runs, else as soon as the running chunk notices (cancelling)."""
    with ctx.transaction() as session:
        job = control.cancel(session, job_id, project=by.project_id, now=ctx.clock())
        ctx.note(session, by, "job.cancel", job_id)
        return ctx.show_one(session, job)


@router.post("/{job_id}/pause", summary="Pause a job")
def pause(job_id: JobIdPath, ctx: Ctx, by: Submitter) -> JobView:
    """Start no chunk more: paused at once where none runs, else pausing until it is handed back.

    A chunk that is handed back runs again after the pause, from its last checkpoint. A job that
    waits for another may be paused too. Pausing a paused job changes nothing.
    """
    with ctx.transaction() as session:
        job = control.pause(session, job_id, project=by.project_id, now=ctx.clock())
        ctx.note(session, by, "job.pause", job_id)
        return ctx.show_one(session, job)


@router.post("/{job_id}/resume", summary="Resume a paused job")
def resume(job_id: JobIdPath, ctx: Ctx, by: Submitter) -> JobView:
    """Go on where it stopped; its place in the queue is that of its first submission."""
    with ctx.waking() as session:
        job = control.resume(session, job_id, project=by.project_id, now=ctx.clock())
        ctx.note(session, by, "job.resume", job_id)
        return ctx.show_one(session, job)


@router.post("/{job_id}/retry", status_code=201, summary="Retry a job that ended badly")
def retry(job_id: JobIdPath, ctx: Ctx, by: Submitter, response: Response) -> RetryView:
    """Go on with a failed or cancelled job as a new one, which takes over the chunks that are done.

    Jobs that failed only because they needed an output of it are retried too, and read from the
    new job. While a retry is open or has succeeded, another is a 409 that names it.
    """
    with ctx.waking() as session:
        first, *more = control.retry(
            session,
            job_id,
            project=by.project_id,
            by=by.actor,
            now=ctx.clock(),
            trace=tracing.current_traceparent(),
        )
        for job in (first, *more):
            ctx.note(session, by, "job.retry", job.id, of=job.retry_of)
        view = ctx.show_one(session, first)
        also = [RetriedView.model_validate(job) for job in more]
    response.headers["Location"] = f"/v1/jobs/{view.id}"
    return RetryView(**dict(view), retried_with=also)


@router.patch("/{job_id}", summary="Change a job's priority or name")
def change(job_id: JobIdPath, asked: JobChange, ctx: Ctx, by: Submitter) -> JobView:
    """Set what is given; the priority holds from the next chunk on. What it computes stays."""
    values = asked.model_dump(exclude_unset=True)
    with ctx.waking() as session:
        job = control.change(session, job_id, project=by.project_id, now=ctx.clock(), **values)
        ctx.note(session, by, "job.change", job_id, **values)
        return ctx.show_one(session, job)


@router.get("/{job_id}/metrics", summary="A job's curves")
def metrics(job_id: JobIdPath, ctx: Ctx, by: Reader) -> MetricsView:
    """Return every curve measured so far."""
    with ctx.reading() as session:
        service.get(session, job_id, project=by.project_id)
        return MetricsView(metrics=lineage.metrics_of(session, job_id))


@router.get("/{job_id}/artifacts", summary="What a job made")
def artifacts(job_id: JobIdPath, ctx: Ctx, by: Reader) -> OutputPage:
    """Return the job's outputs for its user."""
    return outputs(ctx, by, job_id)


def outputs(ctx: Context, by: Principal, job_id: str) -> OutputPage:
    """Return what a job made for its user; NotFound where there is no such job."""
    with ctx.reading() as session:
        service.get(session, job_id, project=by.project_id)
        found = lineage.outputs_of(session, job_id, role="artifact")
        return OutputPage(items=[OutputView.of(output, artifact) for output, artifact in found])
