"""Builds the application: settings in, FastAPI out. What outlives a request starts here."""

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer
from sqlalchemy import Engine
from starlette.staticfiles import StaticFiles

from api import pages, problems
from api.access import Access
from api.bodies import StrictRoute
from api.deps import Context, known_query, scopes_of
from api.embedded import Embedded
from api.guard import Guard
from api.lanes import Lane
from api.lock import only_server
from api.looks import PLACES, WAIT_S, Looks
from api.principals import Principals
from api.problems import leaves
from api.rates import make_rates
from api.routes import (
    artifacts,
    audit,
    checkpoints,
    estimates,
    events,
    health,
    jobs,
    keys,
    kinds,
    metrics,
    projects,
    uploads,
)
from api.routes import pool as pool_routes
from api.views import Problem
from core.artifacts.limits import Limits
from core.artifacts.store import LocalStore
from core.db.session import make_engine, transaction, upgrade
from core.jobs import housekeeping, pool, recovery
from core.jobs.hints import CeleryHints, Hints, NoHints, make_celery
from core.jobs.keys import load_secret
from core.jobs.lease import Rules
from core.jobs.uploads import Uploads
from core.settings import Settings

ABOUT = """Expensive teachers in, small fast students out.

Submit a **spec**, get a **job**, follow it, download **artifacts** by the SHA-256 of their bytes.
Errors are RFC 9457 problems: `code` is stable, `errors[].pointer` names the field, `retryable`
says whether the same request may succeed later.

A key belongs to a project and has scopes: `read`, `submit`, `admin`. What another project owns is
a 404, as if it were not there.
"""
BEARER = "STILL_API_KEY, or a key of a project with the scope that the call names"


class DoorOpen(RuntimeError):
    """Team mode was asked for without the operator's key."""


def check_door(settings: Settings) -> None:
    """Refuse to serve a team without a key."""
    if settings.team and settings.api_key is None:
        raise DoorOpen("team mode needs STILL_API_KEY, of at least 16 characters")


def utc_now() -> datetime:
    """Return the present instant."""
    return datetime.now(UTC)  # noqa: TID251 - the edge where the clock comes from


def create_app(
    settings: Settings, *, clock: Callable[[], datetime] = utc_now, workers: bool = True
) -> FastAPI:
    """Build the API; ``workers``: run the embedded worker processes too, unless it is a team's.

    Raises:
        DoorOpen: team mode without the operator's key.
    """
    check_door(settings)
    workers = workers and not settings.team

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if not settings.team:  # of a team's API there may be several
                stack.enter_context(only_server(settings.data_dir))
            context = await run_in_threadpool(_open, settings, clock, embedded=workers)
            stack.callback(context.engine.dispose)
            if isinstance(context.hints, CeleryHints):
                stack.push_async_callback(run_in_threadpool, context.hints.close)
            app.state.context = context
            if workers:
                crew = Embedded.of(settings)
                stack.push_async_callback(run_in_threadpool, crew.stop)
                crew.start()
            yield
            context.stopping.set()

    app = FastAPI(
        title="Stillroom",
        version="1",
        description=ABOUT,
        lifespan=lifespan,
        docs_url=None,  # the framework's pages load scripts from elsewhere; ours is api/pages
        redoc_url=None,
        redirect_slashes=False,  # it would answer with the Host header's word for where we are
        openapi_url=None,  # api/pages serves it too, by the same rules as every route
        # The framework's own would export messages and addresses; core/tracing says what we tell.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        dependencies=[
            Depends(HTTPBearer(auto_error=False, description=BEARER)),
            Depends(known_query),
        ],
    )
    app.router.route_class = StrictRoute
    for module in (
        *(estimates, jobs, events, checkpoints, artifacts, uploads, kinds),
        *(pool_routes, projects, keys, audit, health, metrics, pages),
    ):
        app.include_router(module.router)
    app.mount("/static", StaticFiles(directory=Path(pages.__file__).parent / "static"))
    problems.install(app)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(Access)
    _describe(app)
    return app


def open_data(settings: Settings) -> tuple[Engine, LocalStore]:
    """Open the database, brought up to date, and the store that belongs to it.

    Raises:
        Conflict: the database belongs to another store.
    """
    engine = make_engine(settings.url)
    upgrade(engine)
    store = LocalStore(settings.data_dir)
    with transaction(engine) as session:
        housekeeping.bind_store(session, store.identity())
    return engine, store


def _open(settings: Settings, clock: Callable[[], datetime], *, embedded: bool) -> Context:
    """Bring the data folder into order and open what the routes use."""
    engine, store = open_data(settings)
    if embedded:
        _release(settings, engine, now=clock())
    limits = Limits(
        memory_bytes=settings.import_memory_bytes,
        wall_seconds=settings.import_timeout.total_seconds(),
    )
    arrivals = Uploads(
        engine=engine,
        store=store,
        folder=settings.uploads,
        scratch=settings.scratch,
        clock=clock,
        limits=limits,
        upload_limit_bytes=settings.upload_limit_bytes,
        open_limit=settings.uploads_open_limit,
    )
    arrivals.recover()
    principals = Principals(
        engine=engine,
        settings=settings,
        secret=load_secret(settings.key_secret, folder=settings.data_dir),
        clock=clock,
    )
    return Context(
        settings=settings,
        engine=engine,
        store=store,
        uploads=arrivals,
        clock=clock,
        embedded=embedded,
        parts=Lane("parts", settings.parts_at_once, wait_s=settings.body_idle.total_seconds()),
        imports=Lane(
            "imports", settings.imports_at_once, wait_s=settings.import_timeout.total_seconds()
        ),
        principals=principals,
        rates=make_rates(settings),
        hints=_hints(settings),
        looks=Looks(
            engine=engine,
            clock=clock,
            fairness=Rules.of(settings).fairness,
            places=Lane("looks at jobs", PLACES, wait_s=WAIT_S),
        ),
    )


def _hints(settings: Settings) -> Hints:
    return CeleryHints(make_celery(settings)) if settings.team else NoHints()


def _release(settings: Settings, engine: Engine, *, now: datetime) -> None:
    """Take back what the workers of a dead server held: we hold the lock, so none is alive."""
    prefix, rules = settings.owner_prefix, Rules.of(settings)
    recovery.release_all(engine, owner_prefix=prefix, now=now, rules=rules)
    with transaction(engine) as session:
        pool.forget_all(session, owner_prefix=prefix)
    shutil.rmtree(settings.scratch, ignore_errors=True)
    settings.scratch.mkdir(parents=True, exist_ok=True)


def _describe(app: FastAPI) -> None:
    """Complete the OpenAPI document: the Problem schema, and the scope that each call needs."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        whole = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(whole.pop("$defs", {}))
        schemas["Problem"] = whole
        for route in leaves(app.routes):
            for method in getattr(route, "methods", None) or ():
                call = document["paths"].get(route.path, {}).get(method.lower())
                if call is not None:
                    _tell_scopes(call, scopes_of(route))
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _tell_scopes(call: dict[str, Any], scopes: tuple[str, ...]) -> None:
    """OpenAPI 3.1 lets a bearer key name the roles it needs; several entries: one is enough."""
    if not scopes:
        call.pop("security", None)
        return
    call["security"] = [{"HTTPBearer": [scope]} for scope in scopes]
