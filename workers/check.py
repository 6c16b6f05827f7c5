"""``--check``: is the worker, or the beat, of this machine well? For a container's health check."""

import time
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from core.db.session import make_engine, reading
from core.jobs import pool
from core.settings import Settings

BEAT_LATE = timedelta(seconds=20)


def check_worker(settings: Settings, device: str, *, now: datetime) -> str | None:
    """Return what is wrong with the worker of ``device`` here, or None."""
    engine = make_engine(settings.url)
    try:
        with reading(engine) as session:
            found = [
                alive
                for worker, alive in pool.workers(session, now=now)
                if worker.id.startswith(settings.owner_prefix) and worker.device == device
            ]
    except SQLAlchemyError as error:
        return f"the database does not answer: {type(error).__name__}"
    finally:
        engine.dispose()
    if not found:
        return f"no worker on {device} has said hello from here"
    return None if any(found) else f"the worker on {device} was not heard of for a while"


def check_beat(alive: Path) -> str | None:
    """Return what is wrong with the beat, or None."""
    try:
        age = time.time() - alive.stat().st_mtime
    except OSError:
        return "no tick yet"
    return f"the last tick was {age:.0f} s ago" if age > BEAT_LATE.total_seconds() else None
