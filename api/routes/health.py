"""Whether the process lives, and whether it can run jobs. Open to all: tells no secrets."""

import tempfile

from fastapi import APIRouter, Request, Response
from sqlalchemy.exc import SQLAlchemyError

from api.deps import Context, Ctx
from api.principals import Proof
from api.views import Health, Ready, WorkerView
from core.errors import Unauthorized
from core.jobs import pool
from core.jobs.keys import Scope

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Alive")
async def healthz() -> Health:
    """Answer as long as the process does."""
    return Health()  # async: waits for no thread, however busy they are


@router.get("/readyz", summary="Ready", responses={503: {"model": Ready}})
def readyz(request: Request, ctx: Ctx, response: Response) -> Ready:
    """Ask the database, write to the store, and count the workers.

    200 where database and store are ok and, if this server runs workers of its own, at least one
    of them is alive; else 503. Names the workers only to who has the key, where one is set.
    """
    database, workers = _ask_database(ctx)
    store = _try_store(ctx)
    alive = sum(worker.alive for worker in workers)
    status = "unavailable"
    if database == store == "ok":
        status = "ok" if alive or not ctx.embedded else "no_worker"
    response.status_code = 200 if status == "ok" else 503
    return Ready(
        status=status,
        database=database,
        store=store,
        workers_alive=alive,
        workers=workers if _known(request, ctx) else None,
    )


def _known(request: Request, ctx: Context) -> bool:
    """Whether a key came along; without the database no project's key can be told."""
    try:
        found = ctx.principals.find(Proof.of(request.headers))
    except (Unauthorized, SQLAlchemyError):
        return False
    return not found.scopes.isdisjoint(Scope)


def _ask_database(ctx: Context) -> tuple[str, list[WorkerView]]:
    try:
        with ctx.reading() as session:
            found = pool.workers(session, now=ctx.clock())
            return "ok", [WorkerView.of(worker, alive=alive) for worker, alive in found]
    except SQLAlchemyError as error:
        return f"does not answer ({type(error).__name__})", []


def _try_store(ctx: Context) -> str:
    try:
        with tempfile.TemporaryFile(dir=ctx.settings.data_dir) as file:
            file.write(b"ready")
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return "ok"
