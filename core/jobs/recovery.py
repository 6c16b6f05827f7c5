"""What must happen though nobody asks: dead workers' chunks come back, deadlines pass.

Any number of processes may do this at once: each duty looks again under the job's lock.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from sqlalchemy import Engine, Select, func, or_, select
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job, Worker
from core.db.session import is_away, reading, transaction
from core.errors import DeadlinePassed, WorkerLost
from core.jobs import lease, planning, pool, shares
from core.jobs.lease import Rules
from core.jobs.scheduler import IN_QUEUE
from core.jobs.states import READY_CHUNK, RUNNING_CHUNK, TERMINAL, ChunkState, JobState

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Tally:
    """What one round of the reconciler did."""

    released: int
    """Chunks taken back from workers that stopped renewing."""
    overdue: int
    """Jobs whose deadline had passed."""
    readmitted: int
    """Nodes that may run chunks again."""


def tick(engine: Engine, *, now: datetime, rules: Rules) -> Tally:
    """Do every duty once."""
    return Tally(
        released=release_expired(engine, now=now, rules=rules),
        overdue=fail_overdue(engine, now=now, rules=rules),
        readmitted=readmit(engine, now=now),
    )


def _expired(now: datetime) -> Select[int]:
    return select(Chunk.id).where(Chunk.state == RUNNING_CHUNK, Chunk.lease_until < now)


def release_expired(engine: Engine, *, now: datetime, rules: Rules) -> int:
    """Take back every chunk whose lease ran out: its worker is gone or cannot reach us."""
    with reading(engine) as session:
        expired = session.scalars(_expired(now).order_by(Chunk.lease_until)).all()
    # Each in its own transaction: it ends with a lock on the project, which must be the last.
    return _each(engine, expired, lambda session, one: _release(session, one, now=now, rules=rules))


def _each(engine: Engine, ids: Sequence[T], work: Callable[[Session, T], bool]) -> int:
    """Do each in its own transaction; what nobody foresaw of one does not keep the others."""
    done = 0
    for one in ids:
        try:
            with transaction(engine) as session:
                done += work(session, one)
        except Exception as error:
            if is_away(error):
                raise  # so it will be for the others
            log.exception("the reconciler failed at %s", one)
    return done


def _release(session: Session, chunk_id: int, *, now: datetime, rules: Rules) -> bool:
    job, chunk = _lock(session, chunk_id)
    if chunk.state != ChunkState.RUNNING or chunk.lease_until is None or chunk.lease_until >= now:
        return False
    node = session.scalar(select(Worker.node_id).where(Worker.id == chunk.owner))
    lost = WorkerLost(f"worker {chunk.owner} stopped renewing its lease")
    lease.put_back(session, job, chunk, lost, node=node, now=now, rules=rules)
    return True


def _lock(session: Session, chunk_id: int) -> tuple[Job, Chunk]:
    """Lock a chunk's job, then the chunk, and read both anew: it may have ended meanwhile."""
    job_id = session.scalars(select(Chunk.job_id).where(Chunk.id == chunk_id)).one()
    job = planning.lock_chain(session, job_id)
    return job, session.get_one(Chunk, chunk_id, with_for_update=True)


def release_all(engine: Engine, *, owner_prefix: str, now: datetime, rules: Rules) -> int:
    """Take back every running chunk of these owners: their server is known to be gone.

    The chunks are not to blame, so no failure is counted.
    """
    owned = select(Chunk.id).where(
        Chunk.state == RUNNING_CHUNK, Chunk.owner.startswith(owner_prefix, autoescape=True)
    )
    with reading(engine) as session:
        chunks = session.scalars(owned.order_by(Chunk.id)).all()

    def give_back(session: Session, chunk_id: int) -> bool:
        job, chunk = _lock(session, chunk_id)
        mine = (chunk.owner or "").startswith(owner_prefix)
        if chunk.state != ChunkState.RUNNING or not mine:
            return False
        lease.end_attempt(session, job, chunk, ChunkState.READY, now=now, rules=rules)
        return True

    return _each(engine, chunks, give_back)


def fail_overdue(engine: Engine, *, now: datetime, rules: Rules) -> int:
    """Fail every job that is not done by its deadline; what runs of it loses its lease."""
    overdue = select(Job.id).where(
        Job.finished_at.is_(None), Job.deadline_at.is_not(None), Job.deadline_at < now
    )
    with reading(engine) as session:
        ids = session.scalars(overdue.order_by(Job.id)).all()

    def end(session: Session, job_id: str) -> bool:
        job = planning.lock_chain(session, job_id)
        if job.state in TERMINAL or job.state == JobState.CANCELLING:
            return False
        late = DeadlinePassed(f"not done by its deadline, {job.deadline_at:%F %T} UTC")
        seconds = planning.fail(session, job, late, now=now)
        shares.charge(session, job.project_id, seconds, now=now, fairness=rules.fairness)
        return True

    return _each(engine, ids, end)


def readmit(engine: Engine, *, now: datetime) -> int:
    """Give nodes that were excluded long ago another chance."""
    with reading(engine) as session:
        ids = pool.to_readmit(session, now=now)

    def again(session: Session, node_id: str) -> bool:
        return pool.readmit(session, node_id, now=now)

    return _each(engine, ids, again)


def ready_pools(session: Session, *, now: datetime) -> dict[str, int]:
    """Return for each pool how many of its live workers could take a ready chunk."""
    workers = Counter(worker.kind for worker in pool.usable(session, now=now))
    found = {}
    for kind, there in sorted(workers.items()):
        ready = (
            select(Chunk.id)
            .join(Job, Job.id == Chunk.job_id)
            .where(
                IN_QUEUE,
                Chunk.state == READY_CHUNK,
                or_(Chunk.device.is_(None), Chunk.device == kind),
            )
            .limit(there)
        )
        count = session.scalar(select(func.count()).select_from(ready.subquery())) or 0
        if count:
            found[kind] = count
    return found
