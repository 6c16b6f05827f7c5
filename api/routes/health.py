"""Whether the process lives, and whether it can take jobs. Open to all: tells no secrets."""

import tempfile

from fastapi import APIRouter, Response
from sqlalchemy.exc import SQLAlchemyError

from api.deps import Context, Ctx
from api.views import Health, Ready, WorkerView
from core.jobs import pool

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Alive")
def healthz() -> Health:
    """Answer as long as the process does."""
    return Health()


@router.get("/readyz", summary="Ready", responses={503: {"model": Ready}})
def readyz(ctx: Ctx, response: Response) -> Ready:
    """Ask the database, write to the store, and name the workers."""
    database, workers = _ask_database(ctx)
    store = _try_store(ctx)
    ok = database == store == "ok"
    response.status_code = 200 if ok else 503
    status = "ok" if ok else "unavailable"
    return Ready(status=status, database=database, store=store, workers=workers)


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
