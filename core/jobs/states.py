"""Which states there are and which moves are allowed. Terminal is final."""

from datetime import datetime
from enum import StrEnum

from sqlalchemy import update
from sqlalchemy.orm import Session

from core.db.models import Job
from core.errors import Conflict


class JobState(StrEnum):
    WAITING = "waiting"
    """For another job's output; not planned yet."""
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    """A chunk still runs and was told to stop."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ChunkState(StrEnum):
    BLOCKED = "blocked"
    """Chunks before it are not done."""
    READY = "ready"
    RUNNING = "running"
    DONE = "done"
    SKIPPED = "skipped"
    """Its stage ended early."""
    FAILED = "failed"
    CANCELLED = "cancelled"


ALLOWED: dict[JobState, frozenset[JobState]] = {
    JobState.WAITING: frozenset({JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLING, JobState.CANCELLED}
    ),
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}
TERMINAL = frozenset(state for state, moves in ALLOWED.items() if not moves)
OPEN_CHUNKS = (ChunkState.BLOCKED, ChunkState.READY)


def move(
    session: Session,
    job: Job,
    new: JobState,
    *,
    now: datetime,
    error: dict[str, object] | None = None,
) -> None:
    """Change a job's state in one guarded statement.

    Raises:
        Conflict: the table forbids the move, or the job moved meanwhile.
    """
    old = JobState(job.state)
    if new not in ALLOWED[old]:
        allowed = ", ".join(sorted(ALLOWED[old])) or "nothing, the job is over"
        raise Conflict(f"a {old} job cannot become {new}; allowed: {allowed}")
    stamps: dict[str, object] = {}
    if new is JobState.RUNNING:
        stamps["started_at"] = now
    if new in TERMINAL:
        stamps["finished_at"] = now
    if error is not None:
        stamps["error"] = error
    changed = session.execute(
        update(Job)
        .where(Job.id == job.id, Job.state == old)
        .values(state=new, **stamps)
        .returning(Job.id)
    )
    if changed.scalar_one_or_none() is None:
        raise Conflict(f"job {job.id} was no longer {old}")
    session.refresh(job)
