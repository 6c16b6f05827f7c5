"""Which states there are and which moves are allowed. Terminal is final."""

from datetime import datetime
from enum import StrEnum

from sqlalchemy import ColumnElement, literal_column, update
from sqlalchemy.orm import Session

from core.db.models import Job
from core.errors import Conflict


class JobState(StrEnum):
    WAITING = "waiting"
    """For another job's output; not planned yet."""
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    """A chunk still runs and was told to stop; it runs again after the pause."""
    PAUSED = "paused"
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


S = JobState
_ENDS = frozenset({S.FAILED, S.CANCELLED})
ALLOWED: dict[JobState, frozenset[JobState]] = {
    S.WAITING: _ENDS | {S.QUEUED, S.PAUSED},
    S.QUEUED: _ENDS | {S.RUNNING, S.PAUSED},
    S.RUNNING: _ENDS | {S.SUCCEEDED, S.PAUSING, S.PAUSED, S.CANCELLING},
    S.PAUSING: frozenset({S.FAILED, S.SUCCEEDED, S.RUNNING, S.PAUSED, S.CANCELLING}),
    S.PAUSED: _ENDS | {S.WAITING, S.QUEUED},
    S.CANCELLING: _ENDS,
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset(),
    S.CANCELLED: frozenset(),
}
"""From a state to those a job may move to: the one table of its life."""
TERMINAL = frozenset(state for state, moves in ALLOWED.items() if not moves)
# Written into statements, not bound: only then do the partial indexes of the tables serve them.
READY_CHUNK: ColumnElement[str] = literal_column(f"'{ChunkState.READY}'")
RUNNING_CHUNK: ColumnElement[str] = literal_column(f"'{ChunkState.RUNNING}'")
OVER_CHUNKS: tuple[ColumnElement[str], ...] = (
    literal_column(f"'{ChunkState.DONE}'"),
    literal_column(f"'{ChunkState.SKIPPED}'"),
)
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
    if new is JobState.RUNNING and job.started_at is None:
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
        .execution_options(synchronize_session=False)  # the row is read anew below
    )
    if changed.scalar_one_or_none() is None:
        raise Conflict(f"job {job.id} was no longer {old}")
    session.refresh(job)
