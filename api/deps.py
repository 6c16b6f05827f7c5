"""What a route may reach: one Context per application, handed in by the framework."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any

from anyio import from_thread
from fastapi import Depends
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect, Request

from api import views
from core.artifacts.store import Store
from core.db.models import Job
from core.db.session import reading, transaction
from core.jobs import status
from core.jobs.uploads import Uploads
from core.settings import Settings


@dataclass(frozen=True)
class Context:
    """The world, as the routes see it."""

    settings: Settings
    engine: Engine
    store: Store
    uploads: Uploads
    clock: Callable[[], datetime]
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


def get_context(request: Request) -> Context:
    """Return the application's context."""
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(get_context)]

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
