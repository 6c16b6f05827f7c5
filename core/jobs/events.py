"""What happened to a job, in order: written with the change itself, read by id."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.db.models import Event

TERMINAL_EVENTS = frozenset({"job.succeeded", "job.failed", "job.cancelled"})


def record(session: Session, job_id: str, kind: str, *, now: datetime, **data: Any) -> None:
    """Append an event in the caller's transaction."""
    session.add(Event(job_id=job_id, type=kind, data=data, at=now))


def last_id(session: Session, job_id: str) -> int:
    """Return the number of a job's last event, 0 where nothing has happened to it."""
    last = select(Event.id).where(Event.job_id == job_id).order_by(Event.id.desc()).limit(1)
    return session.scalar(last) or 0


def latest(session: Session, job_id: str, *, limit: int) -> Sequence[Event]:
    """Return the last ``limit`` events of a job, in order."""
    query = select(Event).where(Event.job_id == job_id).order_by(Event.id.desc()).limit(limit)
    return session.scalars(query).all()[::-1]


def list_events(session: Session, job_id: str, *, after: int, limit: int) -> Sequence[Event]:
    """Return up to ``limit`` events of a job whose id is greater than ``after``, in order."""
    query = (
        select(Event)
        .where(Event.job_id == job_id, Event.id > after)
        .order_by(Event.id)
        .limit(limit)
    )
    return session.scalars(query).all()
