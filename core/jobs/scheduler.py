"""Which ready chunk a worker runs next: priority, then the fair share, then age.

Each project's best job stands at the head of its queue; the heads are compared. A job that cannot
run here, for want of a device, of memory or of room under its project's limit, stands in nobody's
way. Claims are taken one after another, so shares and limits hold exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, literal_column, or_, select
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job, Project, ServiceFact
from core.db.session import insert_new
from core.jobs import pool, shares
from core.jobs.pool import Place
from core.jobs.shares import Fairness
from core.jobs.states import READY_CHUNK

ORDER = (Job.rank, Job.created_at, Job.id)
"""Of the jobs of one project; the place in its queue is counted by the same order."""
IN_QUEUE = Job.state.in_((literal_column("'queued'"), literal_column("'running'")))
"""Word for word the condition of the index that serves it."""
TURN = "claim_turn"
OTHERS_FIRST = timedelta(minutes=10)
"""So long a chunk is left to other nodes than the one where it failed."""


@dataclass(frozen=True)
class Candidate:
    """A ready chunk that the scheduler proposes."""

    chunk_id: int
    job_id: str


def pick(
    session: Session, place: Place, *, now: datetime, fairness: Fairness, lock: bool = False
) -> Candidate | None:
    """Return the best ready chunk for a worker at ``place``, or None where nothing fits.

    ``lock`` waits for the turn of claims, held to the end of the transaction.
    """
    if lock:
        _take_turn(session)
    if pool.node_state(session, place.node) != pool.ACTIVE:
        return None
    fits = _fits(place, now=now, elsewhere=_elsewhere(session, place, now=now))
    heads = _heads(session, fits)
    if not heads:
        return None
    levels = shares.levels(session, now=now, fairness=fairness)
    allowed = [head for head in heads if levels[head.project_id][1] > 0]
    if not allowed:
        return None
    best = min(
        allowed,
        key=lambda job: (job.rank, levels[job.project_id][0], job.created_at, job.id),
    )
    chunk = select(Chunk.id).where(Chunk.job_id == best.id, *fits)
    chunk_id = session.scalar(chunk.order_by(Chunk.stage_index, Chunk.index).limit(1))
    return None if chunk_id is None else Candidate(chunk_id, best.id)


def _take_turn(session: Session) -> None:
    # A lock that only claims take: a worker never decides on figures that another is changing.
    turn = select(ServiceFact.key).where(ServiceFact.key == TURN).with_for_update()
    if session.scalar(turn) is None:
        insert_new(session, ServiceFact, {"key": TURN, "value": ""})
        session.scalar(turn)


def _elsewhere(session: Session, place: Place, *, now: datetime) -> int:
    """Return the most memory that a usable worker of this kind on another node has; -1: none."""
    others = [
        worker.memory_bytes
        for worker in pool.usable(session, now=now)
        if worker.kind == place.kind and worker.node_id != place.node
    ]
    return max(others, default=-1)


def _fits(place: Place, *, now: datetime, elsewhere: int) -> tuple[ColumnElement[bool], ...]:
    """Return what a chunk must be to run here now.

    What failed here is left to other nodes for a while, where one could take it: else a node on
    which everything fails at once would use up every chunk's tries while the others are busy.
    """
    alone = Chunk.memory_bytes > elsewhere
    again = or_(and_(alone, Chunk.retry_at <= now), Chunk.retry_at <= now - OTHERS_FIRST)
    return (
        Chunk.state == READY_CHUNK,
        or_(Chunk.device.is_(None), Chunk.device == place.kind),
        Chunk.memory_bytes <= place.memory_bytes,
        or_(Chunk.failed_on.is_(None), Chunk.failed_on != place.node, again),
    )


def _heads(session: Session, fits: tuple[ColumnElement[bool], ...]) -> Sequence[Any]:
    """Return each project's best job that has a chunk which fits."""
    some = select(Chunk.id).where(Chunk.job_id == Job.id, *fits).exists()
    best: Select[str] = (
        select(Job.id).where(Job.project_id == Project.id, IN_QUEUE, some).order_by(*ORDER).limit(1)
    )
    ids = select(best.correlate(Project).scalar_subquery()).select_from(Project)
    found = [job_id for job_id in session.scalars(ids) if job_id is not None]
    if not found:
        return ()
    columns = (Job.id, Job.project_id, Job.rank, Job.created_at)
    return session.execute(select(*columns).where(Job.id.in_(found))).all()
