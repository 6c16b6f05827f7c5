"""What a route may reach: one Context per application, handed in by the framework."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, TypeVar, get_args, get_origin

from anyio import CapacityLimiter, Semaphore, fail_after, from_thread, to_thread
from fastapi import Depends
from fastapi.exceptions import RequestValidationError
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect, Request

from api import views
from api.problems import Busy
from core.artifacts.store import Store
from core.db.models import Job
from core.db.session import reading, transaction
from core.jobs import status
from core.jobs.uploads import Uploads
from core.settings import Settings

T = TypeVar("T")


class Lane:
    """Threads of its own for long work: the pool that answers everything else stays free."""

    def __init__(self, what: str, places: int, *, wait_s: float) -> None:
        self._what = what
        self._places = Semaphore(places)
        self._wait_s = wait_s

    async def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread once a place is free; waiting holds no thread.

        Raises:
            Busy: no place became free.
        """
        try:
            with fail_after(self._wait_s):
                await self._places.acquire()
        except TimeoutError:
            raise Busy(f"too many {self._what} at once; send the request again") from None
        try:
            # The place is the limit; a fresh limiter keeps the work out of the common pool.
            return await to_thread.run_sync(work, limiter=CapacityLimiter(1))
        finally:
            self._places.release()


@dataclass(frozen=True)
class Context:
    """The world, as the routes see it."""

    settings: Settings
    engine: Engine
    store: Store
    uploads: Uploads
    clock: Callable[[], datetime]
    embedded: bool
    """Whether this server runs workers of its own."""
    parts: Lane
    imports: Lane
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the server is told to end: event streams end too."""

    def transaction(self) -> AbstractContextManager[Session]:
        """Open a session that writes."""
        return transaction(self.engine)

    def reading(self) -> AbstractContextManager[Session]:
        """Open a session that only reads."""
        return reading(self.engine)

    def show(self, session: Session, jobs: Sequence[Job]) -> list[views.JobView]:
        """Return jobs as they are shown."""
        return views.job_views(jobs, status.describe(session, jobs, now=self.clock()))


async def get_context(request: Request) -> Context:
    """Return the application's context."""
    context: Context = request.app.state.context
    return context


# Dependencies are async: the framework would run others in the common pool, for every request.
Ctx = Annotated[Context, Depends(get_context)]


async def known_query(request: Request) -> None:
    """Refuse query parameters that the route does not have, and one value given twice."""
    declared = {
        param.alias: param.field_info.annotation
        for param in request.scope["route"].dependant.query_params
    }
    counts = Counter(name for name, _ in request.query_params.multi_items())
    errors = []
    for name, count in counts.items():
        if name not in declared:
            message = f"no such parameter; allowed: {', '.join(sorted(declared)) or 'none'}"
        elif count > 1 and not _several(declared[name]):
            message = "given more than once"
        else:
            continue
        given = request.query_params[name]
        errors.append({"type": "query", "loc": ("query", name), "msg": message, "input": given})
    if errors:
        raise RequestValidationError(errors)


def _several(annotation: Any) -> bool:
    return any(get_origin(one) is list for one in (annotation, *get_args(annotation)))


PROBLEMS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "A problem",
        "content": {
            "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
        },
    }
}
"""Every operation may answer with a Problem; app.py puts its schema in place."""


def body_steps(request: Request) -> Iterator[bytes]:
    """Yield the raw body piece by piece in a worker thread, never the whole of it."""
    stream = request.stream()

    async def step() -> bytes | None:
        return await anext(stream, None)

    try:
        while (piece := from_thread.run(step)) is not None:
            yield piece
    except ClientDisconnect:
        return  # what came so far is kept: the client asks for received_bytes and goes on
