"""``--check``: is the worker of this machine well? For a container's health check."""

from datetime import UTC, datetime

from sqlalchemy.exc import SQLAlchemyError

from core.db.session import make_engine, reading
from core.jobs import pool
from core.settings import Settings


def check_worker(settings: Settings, device: str, *, now: datetime | None = None) -> str | None:
    """Return what is wrong with the worker of ``device`` here, or None."""
    at = now or datetime.now(UTC)  # noqa: TID251 - here the process's clock begins
    engine = make_engine(settings.url)
    try:
        with reading(engine) as session:
            found = [
                alive
                for worker, alive in pool.workers(session, now=at)
                if worker.id.startswith(settings.owner_prefix) and worker.device == device
            ]
    except SQLAlchemyError as error:
        return f"the database does not answer: {type(error).__name__}"
    finally:
        engine.dispose()
    if not found:
        return f"no worker on {device} has said hello from here"
    return None if any(found) else f"the worker on {device} was not heard of for a while"
