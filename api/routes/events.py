"""What happens to a job: a page of JSON, or a live stream that a reader can resume anywhere."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from api.deps import PROBLEMS, Context, Ctx
from api.routes.jobs import JobIdPath
from api.views import EventPage, EventView, ProgressView
from core.jobs import service, status
from core.jobs.events import TERMINAL_EVENTS, list_events

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=PROBLEMS)
POLL_S = 0.4
HEARTBEAT_S = 15.0
BATCH = 500
STREAM_DOC: dict[int | str, dict[str, Any]] = {
    200: {
        "model": EventPage,
        "description": "Events in order; as text/event-stream where asked for by Accept.",
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'id: 7\nevent: chunk.done\ndata: {"stage":"train","index":3}\n\n',
            }
        },
    }
}


@router.get("/{job_id}/events", summary="A job's events", responses=STREAM_DOC)
async def events(
    job_id: JobIdPath,
    request: Request,
    ctx: Ctx,
    after: Annotated[int, Query(ge=0, le=2**62, description="Only later events.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    last_event_id: Annotated[
        str | None, Header(description="Where a broken stream goes on; sent by browsers.")
    ] = None,
) -> Response:
    """Return a page, or stream by Accept: text/event-stream.

    The stream replays what came after `after` (or Last-Event-ID), goes on live, and ends after
    job.succeeded, job.failed or job.cancelled. An event `progress` without id carries the job's
    progress whenever it changes. A comment every 15 s keeps the connection.
    """
    if "text/event-stream" not in request.headers.get("accept", ""):
        return await run_in_threadpool(_page, ctx, job_id, after=after, limit=limit)
    start = max(after, _resume_at(last_event_id))
    first = await run_in_threadpool(look_at, ctx, job_id, after=start)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    stream = follow(ctx, job_id, first, start)
    return StreamingResponse(stream, headers=headers, media_type="text/event-stream")


def _resume_at(last_event_id: str | None) -> int:
    """A browser may send what another server numbered: then the stream starts over."""
    text = last_event_id or ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


def _page(ctx: Context, job_id: str, *, after: int, limit: int) -> Response:
    with ctx.reading() as session:
        service.get(session, job_id)
        found = list_events(session, job_id, after=after, limit=limit + 1)
    items = [EventView.of(event) for event in found[:limit]]
    more = items[-1].id if len(found) > limit else None
    return JSONResponse(EventPage(items=items, next_after=more).model_dump(mode="json"))


@dataclass(frozen=True)
class Look:
    """One glance at a job."""

    events: Sequence[EventView]
    progress: str
    over: bool
    """The job is final and these are its last events."""


def look_at(ctx: Context, job_id: str, *, after: int) -> Look:
    """Read what is new of a job, on one snapshot."""
    with ctx.reading() as session:
        job = service.get(session, job_id)
        found = list_events(session, job_id, after=after, limit=BATCH)
        progress = status.describe(session, [job], now=ctx.clock())[0].progress
    ended = job.finished_at is not None or any(event.type in TERMINAL_EVENTS for event in found)
    return Look(
        events=[EventView.of(event) for event in found],
        progress=ProgressView.model_validate(progress).model_dump_json(),
        over=ended and len(found) < BATCH,
    )


async def follow(
    ctx: Context, job_id: str, look: Look, after: int, *, heartbeat_s: float = HEARTBEAT_S
) -> AsyncIterator[str]:
    """Yield messages until the job is over, the reader is gone or the server ends."""
    told, spoke = "", time.monotonic()
    while True:
        messages = [_message(event) for event in look.events]
        if _steady(look.progress) != _steady(told):
            told = look.progress
            # Before the terminal event, which ends the stream for its reader.
            messages.insert(max(len(messages) - 1, 0), f"event: progress\ndata: {told}\n\n")
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
        look = await run_in_threadpool(look_at, ctx, job_id, after=after)


def _steady(progress: str) -> tuple[Any, ...]:
    """The part that moves with the work, not with the clock."""
    seen = json.loads(progress or "{}")
    return tuple(seen.get(name) for name in ("done", "total", "stage"))


def _message(event: EventView) -> str:
    data = json.dumps(event.data, ensure_ascii=True)
    return f"id: {event.id}\nevent: {event.type}\ndata: {data}\n\n"
