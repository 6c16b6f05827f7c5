"""What happens to a job: a page of JSON, or a live stream that a reader can resume anywhere."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from api.deps import PROBLEMS, Context, Ctx, Reader
from api.problems import Busy
from api.routes.jobs import JobIdPath
from api.views import EventPage, EventView
from core.errors import Unauthorized
from core.jobs import service
from core.jobs.events import TERMINAL_EVENTS, last_id, list_events
from core.jobs.keys import Principal
from core.jobs.states import JobState

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=PROBLEMS)
POLL_S = 0.4
STILL_S = 2.0
"""Why a job waits changes with the others' jobs, and takes long to find out."""
HEARTBEAT_S = 15.0
BATCH = 500
STANDING_STILL = frozenset({JobState.WAITING, JobState.QUEUED, JobState.PAUSED})
"""Of a job in such a state it is told why it does not run."""
STREAM_DOC: dict[int | str, dict[str, Any]] = {
    200: {
        "model": EventPage,
        "description": "Events in order; as text/event-stream where asked for by Accept.",
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'event: progress\ndata: {"done":3.2,"total":9,"fraction":0.3556,'
                '"stage":"train","rate":0.4,"eta_s":14.5}\n\n'
                'id: 7\nevent: chunk.done\ndata: {"stage":"train","index":3}\n\n',
            }
        },
    }
}


@router.get("/{job_id}/events", summary="A job's events", responses=STREAM_DOC)
async def events(
    job_id: JobIdPath,
    request: Request,
    ctx: Ctx,
    by: Reader,
    after: Annotated[int, Query(ge=0, le=2**62, description="Only later events.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    last_event_id: Annotated[
        str | None, Header(description="Where a broken stream goes on; sent by browsers.")
    ] = None,
) -> Response:
    """Return a page, or stream by Accept: text/event-stream.

    The stream replays what came after `after` (or Last-Event-ID), goes on live, and ends after
    job.succeeded, job.failed or job.cancelled. An event `progress` without id carries the job's
    progress whenever it changes; of a job that does not run it says `waits_for`: why. A paused job
    keeps its stream: job.pausing, job.paused and job.unpaused are events like the others. Where the
    number to go on from is beyond the job's last event (another server gave it out), an event
    `reset` comes first and all are told from the start. A comment about every 15 s keeps the
    connection.
    """
    if "text/event-stream" not in request.headers.get("accept", ""):
        return await run_in_threadpool(_page, ctx, by, job_id, after=after, limit=limit)
    asked = max(after, _resume_at(last_event_id))
    start = await run_in_threadpool(_known, ctx, by, job_id, asked) if asked else 0
    first = await look_at(ctx, by, job_id, after=start)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    stream = follow(ctx, by, job_id, first, start, reset=start < asked)
    return StreamingResponse(stream, headers=headers, media_type="text/event-stream")


def _resume_at(last_event_id: str | None) -> int:
    """Return where the stream goes on; from the start where what was sent is no number."""
    text = last_event_id or ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


def _known(ctx: Context, by: Principal, job_id: str, asked: int) -> int:
    """Return ``asked`` if the job's events came so far, else 0: the start."""
    with ctx.reading() as session:
        service.get(session, job_id, project=by.project_id)
        return asked if asked <= last_id(session, job_id) else 0


def _page(ctx: Context, by: Principal, job_id: str, *, after: int, limit: int) -> Response:
    with ctx.reading() as session:
        service.get(session, job_id, project=by.project_id)
        found = list_events(session, job_id, after=after, limit=limit + 1)
    items = [EventView.of(event) for event in found[:limit]]
    more = items[-1].id if len(found) > limit else None
    return JSONResponse(EventPage(items=items, next_after=more).model_dump(mode="json"))


@dataclass(frozen=True)
class Look:
    """What one look at a job found."""

    events: Sequence[EventView]
    progress: str
    over: bool
    """The job is final and these are its last events."""
    at: float
    """Of the monotonic clock, when the progress was asked for; -inf where it is older than the
    events."""


async def look_at(
    ctx: Context, by: Principal, job_id: str, *, after: int, last: Look | None = None
) -> Look:
    """Read what is new of a job since ``last``; where nothing is, at the cost of a shared glance.

    Raises:
        Unauthorized: the key of who asks was revoked meanwhile.
        Busy: no answer, or no place, came in time.
    """
    if not ctx.principals.knows(by):
        again = partial(ctx.principals.again, by)
        await ctx.looks.places.run(again, project=by.project_id)
    glance = await ctx.looks.glance(job_id, project=by.project_id)
    news, now = glance.last_event > after, time.monotonic()
    if glance.shown is None and not news and last is not None and now - last.at < STILL_S:
        return replace(last, events=[])
    shown = glance.shown or await ctx.looks.alone(job_id, project=by.project_id)
    job = json.loads(shown)
    found = await _later(ctx, by, job_id, after) if news or job["finished_at"] else []
    if not job["finished_at"] and any(event.type in TERMINAL_EVENTS for event in found):
        # It ended since it was shown, and its last progress is told before its last event.
        job = json.loads(await ctx.looks.at(job_id, project=by.project_id))
    return Look(
        events=found,
        progress=_progress(job),
        over=job["finished_at"] is not None and len(found) < BATCH,
        at=-math.inf if found and found[-1].id > glance.last_event else now,
    )


async def _later(ctx: Context, by: Principal, job_id: str, after: int) -> list[EventView]:
    def read() -> list[EventView]:
        with ctx.reading() as session:
            found = list_events(session, job_id, after=after, limit=BATCH)
            return [EventView.of(event) for event in found]

    return await ctx.looks.places.run(read, project=by.project_id)


def _progress(job: dict[str, Any]) -> str:
    facts = job["progress"]
    if job["state"] in STANDING_STILL and job["waits_for"]:
        facts["waits_for"] = job["waits_for"]
    return json.dumps(facts)


async def follow(
    ctx: Context,
    by: Principal,
    job_id: str,
    look: Look,
    after: int,
    *,
    reset: bool = False,
    heartbeat_s: float = HEARTBEAT_S,
) -> AsyncIterator[str]:
    """Yield messages until the job is over, the reader or its key is gone, or the server ends."""
    told, spoke = "", time.monotonic()
    if reset:
        yield "event: reset\ndata: {}\n\n"
    while True:
        messages = [_message(event) for event in look.events]
        if _news(look.progress, told):
            told = look.progress
            messages.insert(_place_of_progress(look.events), f"event: progress\ndata: {told}\n\n")
        if messages:
            yield "".join(messages)
            spoke = time.monotonic()
        if look.events:
            after = look.events[-1].id
        if look.over or ctx.stopping.is_set():
            return
        if time.monotonic() - spoke > heartbeat_s:
            yield ": still here\n\n"
            spoke = time.monotonic()
        if len(look.events) < BATCH:
            await asyncio.sleep(POLL_S)
        try:
            look = await _look_again(ctx, by, job_id, look, after)
        except Unauthorized:
            return  # who comes back is told so


async def _look_again(ctx: Context, by: Principal, job_id: str, last: Look, after: int) -> Look:
    try:
        return await look_at(ctx, by, job_id, after=after, last=last)
    except Busy:
        return replace(last, events=[])  # nothing new for now; the reader need not know


def _place_of_progress(events: Sequence[EventView]) -> int:
    """Before the terminal event, which ends the stream for its reader; else before the last."""
    ends = (place for place, event in enumerate(events) if event.type in TERMINAL_EVENTS)
    return next(ends, max(len(events) - 1, 0))


def _news(progress: str, told: str) -> bool:
    """Whether there is more to tell than that time went by."""
    now, before = json.loads(progress), json.loads(told or "{}")
    moved = any(now[name] != before.get(name, "") for name in ("done", "total", "stage"))
    why = now.get("waits_for")
    return moved or (why is not None and why != before.get("waits_for"))


def _message(event: EventView) -> str:
    data = json.dumps(event.data, ensure_ascii=True)
    return f"id: {event.id}\nevent: {event.type}\ndata: {data}\n\n"
