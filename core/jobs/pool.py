"""Who is there to run chunks."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from core.db.models import Worker
from core.db.session import insert_new

ALIVE_FOR = timedelta(seconds=30)
FORGOTTEN_AFTER = timedelta(days=1)


def hello(session: Session, worker_id: str, *, device: str, now: datetime) -> None:
    """Register a worker, and forget those not heard of for a day."""
    session.execute(delete(Worker).where(Worker.seen_at < now - FORGOTTEN_AFTER))
    values = {"id": worker_id, "device": device, "started_at": now, "seen_at": now}
    insert_new(session, Worker, values)


def seen(session: Session, worker_id: str, *, now: datetime) -> None:
    """Note that a worker is there."""
    worker = session.get(Worker, worker_id)
    if worker is not None:
        worker.seen_at = now


def goodbye(session: Session, worker_id: str) -> None:
    """Forget a worker that ends."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def forget_all(session: Session, *, owner_prefix: str) -> None:
    """Forget a server's workers: an embedded server starts with none."""
    session.execute(delete(Worker).where(Worker.id.startswith(owner_prefix, autoescape=True)))


def workers(session: Session, *, now: datetime) -> Sequence[tuple[Worker, bool]]:
    """Return each worker and whether it was heard of lately."""
    found = session.scalars(select(Worker).order_by(Worker.device, Worker.id)).all()
    return [(worker, worker.seen_at > now - ALIVE_FOR) for worker in found]
