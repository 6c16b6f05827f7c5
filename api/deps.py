"""What a route may reach, and whom it serves: one Context, and a Principal with the right scope."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, get_args, get_origin

from anyio import from_thread
from fastapi import Depends
from fastapi.exceptions import RequestValidationError
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect, Request

from api import views
from api.lanes import Lane
from api.looks import Looks
from api.principals import METRICS, Principals
from api.rates import Rates
from core.artifacts.store import Store
from core.db.models import Job
from core.db.session import reading, transaction
from core.errors import Forbidden
from core.jobs import audit, overview, recovery, status
from core.jobs.hints import Hints
from core.jobs.keys import Principal, Scope
from core.jobs.lease import Rules
from core.jobs.shares import Fairness
from core.jobs.uploads import Uploads
from core.settings import Settings

LONG_QUEUE = 200
"""Jobs before one that is submitted, above which its place is not looked for at once."""


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
    principals: Principals
    rates: Rates
    hints: Hints
    """Tells workers of new work, once it is committed."""
    looks: Looks
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the server is told to end: event streams end too."""

    @property
    def fairness(self) -> Fairness:
        """How use of the pool is weighed."""
        return Rules.of(self.settings).fairness

    def transaction(self) -> AbstractContextManager[Session]:
        """Open a session that writes."""
        return transaction(self.engine)

    @contextmanager
    def waking(self) -> Iterator[Session]:
        """Open a session that writes, and tell workers once it is committed: work may be ready."""
        with self.transaction() as session:
            yield session
            team = self.settings.team
            pools = recovery.ready_pools(session, now=self.clock()) if team else {}
        self.hints.wake(pools)

    def reading(self) -> AbstractContextManager[Session]:
        """Open a session that only reads."""
        return reading(self.engine)

    def show(self, session: Session, jobs: Sequence[Job]) -> list[views.JobView]:
        """Return jobs as they are shown."""
        return views.job_views(jobs, status.describe(session, jobs, now=self.clock()))

    def show_one(self, session: Session, job: Job) -> views.JobView:
        """Return a job as it is shown alone: with its place in the queue and why it waits."""
        return views.JobView.of(job, self.looks.status_of(session, job))

    def show_new(self, session: Session, job: Job) -> views.JobView:
        """Return a job just submitted; behind a long queue its place is told by GET alone.

        Else a burst of submissions would cost by the square of its size.
        """
        if overview.queue_passes(session, LONG_QUEUE):
            return self.show(session, [job])[0]
        return self.show_one(session, job)

    def note(
        self,
        session: Session,
        by: Principal,
        action: str,
        target: str,
        *,
        project: str | None = None,
        **data: Any,
    ) -> None:
        """Write into the audit log, in the transaction of the change; ``data`` holds no secret.

        ``project`` is the one that is changed, where that is not the actor's own.
        """
        changed = project or by.project_id
        now = self.clock()
        audit.record(
            session,
            project=changed,
            actor=by.actor,
            action=action,
            target=target,
            now=now,
            data=data,
        )


async def get_context(request: Request) -> Context:
    """Return the application's context."""
    context: Context = request.app.state.context
    return context


# Dependencies are async: the framework would run others in the common pool, for every request.
Ctx = Annotated[Context, Depends(get_context)]


@dataclass(frozen=True)
class Needs:
    """The door of a route: hands in who asks, if one of these scopes is held."""

    scopes: tuple[str, ...]

    async def __call__(self, request: Request) -> Principal:
        """Return the principal that the guard found.

        Raises:
            Forbidden: it holds none of the scopes.
        """
        principal: Principal = request.scope["state"]["principal"]
        if principal.scopes.isdisjoint(self.scopes):
            asked = " or ".join(self.scopes)
            held = ", ".join(sorted(principal.scopes)) or "none"
            raise Forbidden(f"this needs the scope {asked}; the key has: {held}")
        return principal


Caller = Annotated[Principal, Depends(Needs(tuple(Scope)))]
"""Any key of a project."""
Reader = Annotated[Principal, Depends(Needs((Scope.READ,)))]
Submitter = Annotated[Principal, Depends(Needs((Scope.SUBMIT,)))]
Admin = Annotated[Principal, Depends(Needs((Scope.ADMIN,)))]
Scraper = Annotated[Principal, Depends(Needs((METRICS, Scope.ADMIN)))]
"""STILL_METRICS_KEY, or an admin."""


def scopes_of(route: Any) -> tuple[str, ...]:
    """Return the scopes of which a route asks for one; none where it is open to all."""
    dependant = getattr(route, "dependant", None)
    for dependency in dependant.dependencies if dependant is not None else ():
        if isinstance(dependency.call, Needs):
            return dependency.call.scopes
    return ()


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
