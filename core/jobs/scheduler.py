"""Which ready chunk runs next: priority first, then age."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job
from core.jobs.lease import Candidate
from core.jobs.states import ChunkState, JobState

ORDER = (Job.priority.desc(), Job.created_at, Job.id)
"""Of jobs in the queue; the place in it is counted by the same order."""


def pick(session: Session, *, lock: bool = False) -> Candidate | None:
    """Return the best ready chunk, or None where nothing is ready.

    ``lock`` takes its job's row and passes over those that others hold (PostgreSQL; SQLite has
    one writer anyway).
    """
    query = (
        select(Chunk.id, Chunk.job_id)
        .join(Job, Job.id == Chunk.job_id)
        .where(
            Chunk.state == ChunkState.READY,
            Job.state.in_((JobState.QUEUED, JobState.RUNNING)),
        )
        .order_by(*ORDER, Chunk.stage_index, Chunk.index)
        .limit(1)
    )
    if lock:
        query = query.with_for_update(of=Job, skip_locked=True, key_share=True)
    row = session.execute(query).one_or_none()
    return Candidate(row[0], row[1]) if row else None
