"""Submit, list, show and cancel jobs."""

import hashlib
import json
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Response

from api.bodies import StrictRoute
from api.deps import PROBLEMS, Context, Ctx
from api.views import AnySpec, JobPage, JobView, MetricsView, OutputPage, OutputView
from core.errors import SpecInvalid
from core.jobs import lineage, service
from core.jobs.states import JobState

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
    spec: AnySpec, ctx: Ctx, response: Response, idempotency_key: IdempotencyKey = None
) -> JobView:
    """Take a spec. Where an input is "job_id/output" of an unfinished job, the job waits for it."""
    now = ctx.clock()
    with ctx.transaction() as session:
        if idempotency_key is None:
            job, replayed = service.submit(session, spec, now=now), False
        else:
            said = json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()
            digest = hashlib.sha256(said).hexdigest()
            job, replayed = service.submit_once(
                session, spec, key=idempotency_key, body_sha256=digest, now=now
            )
        view = ctx.show(session, [job])[0]
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return view


@router.get("", summary="List jobs, newest first")
def list_jobs(
    ctx: Ctx,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    kind: Annotated[str | None, Query(description="Only jobs of this kind.")] = None,
    name: Annotated[str | None, Query(description="Only jobs of exactly this name.")] = None,
    label: Annotated[
        list[str] | None, Query(description="key:value; several must all match.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(description="next_cursor of the page before.")] = None,
) -> JobPage:
    """Return a page; follow next_cursor for the rest."""
    labels = parse_pairs(label or [], parameter="label")
    with ctx.reading() as session:
        try:
            jobs, following = service.list_jobs(
                session,
                limit=limit,
                cursor=cursor,
                state=state,
                kind=kind,
                name=name,
                labels=labels,
            )
        except SpecInvalid as error:
            raise of_query(error) from error
        return JobPage(items=ctx.show(session, jobs), next_cursor=following)


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


@router.get("/{job_id}", summary="Show a job")
def get(job_id: JobIdPath, ctx: Ctx) -> JobView:
    """Return the job with its progress, why it waits, its error and its artifacts."""
    with ctx.reading() as session:
        return ctx.show(session, [service.get(session, job_id)])[0]


@router.post("/{job_id}/cancel", summary="Cancel a job")
def cancel(job_id: JobIdPath, ctx: Ctx) -> JobView:
    """Stop at once where nothing runs, else as soon as the running chunk notices (cancelling)."""
    with ctx.transaction() as session:
        job = service.cancel(session, job_id, now=ctx.clock())
        return ctx.show(session, [job])[0]


@router.get("/{job_id}/metrics", summary="A job's curves")
def metrics(job_id: JobIdPath, ctx: Ctx) -> MetricsView:
    """Return every curve measured so far."""
    with ctx.reading() as session:
        service.get(session, job_id)
        return MetricsView(metrics=lineage.metrics_of(session, job_id))


@router.get("/{job_id}/artifacts", summary="What a job made")
def artifacts(job_id: JobIdPath, ctx: Ctx) -> OutputPage:
    """Return the job's outputs for its user."""
    return outputs(ctx, job_id, role="artifact")


@router.get("/{job_id}/checkpoints", summary="A job's checkpoints")
def checkpoints(job_id: JobIdPath, ctx: Ctx) -> OutputPage:
    """Return what the job's chunks leave for later chunks."""
    return outputs(ctx, job_id, role="checkpoint")


def outputs(ctx: Context, job_id: str, *, role: str) -> OutputPage:
    """Return a job's outputs in one role; NotFound where there is no such job."""
    with ctx.reading() as session:
        service.get(session, job_id)
        found = lineage.outputs_of(session, job_id, role=role)
        return OutputPage(items=[OutputView.of(output, artifact) for output, artifact in found])
