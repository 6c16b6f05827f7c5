"""Who owns a running chunk, and until when. Every write is guarded by the attempt number."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from core.db.models import Artifact, CacheEntry, Chunk, Job, MetricPoint, Output
from core.db.session import insert_new, reading
from core.errors import LeaseLost, StillroomError, WorkerLost
from core.jobs import events, planning
from core.jobs.states import OPEN_CHUNKS, TERMINAL, ChunkState, JobState, move
from core.kinds._base import Metric


@dataclass(frozen=True)
class Rules:
    """How long a lease lasts, how often a chunk is tried, and when one counts as stuck."""

    lease: timedelta = timedelta(seconds=30)
    max_failures: int = 3
    stall_limit: timedelta = timedelta(minutes=15)
    stop_limit: timedelta = timedelta(seconds=30)


@dataclass(frozen=True)
class Claim:
    """One attempt at one chunk: the token that every write must show."""

    chunk_id: int
    job_id: str
    attempt: int
    stage: str
    stage_index: int
    index: int
    chunks: int
    """Of the stage."""


@dataclass(frozen=True)
class Candidate:
    """A ready chunk that the scheduler proposes."""

    chunk_id: int
    job_id: str


@dataclass(frozen=True)
class Stored:
    """A produced file that is in the store, waiting for its rows."""

    name: str
    role: str
    sha256: str
    size_bytes: int
    format: str
    media_type: str
    file_name: str
    meta: dict[str, Any]
    cache_key: str | None
    cached: bool
    """Found under its cache key, not computed."""


def claim(
    session: Session, best: Candidate, *, owner: str, now: datetime, lease: timedelta
) -> Claim | None:
    """Take the chunk ``best`` for ``owner``; None where it is gone.

    The attempt and the failure count rise before any work starts: a chunk that kills its worker
    is counted too, and a success takes the count back.
    """
    # Every writer locks the job first, then its chunks: the one order, so no deadlock.
    job = session.get_one(Job, best.job_id, with_for_update=True)
    chunk = session.scalar(
        update(Chunk)
        .where(Chunk.id == best.chunk_id, Chunk.state == ChunkState.READY)
        .values(
            state=ChunkState.RUNNING,
            attempt=Chunk.attempt + 1,
            failures=Chunk.failures + 1,
            owner=owner,
            lease_until=now + lease,
            started_at=now,
            finished_at=None,
            progress=0.0,
        )
        .returning(Chunk)
    )
    if chunk is None:
        return None
    if job.state == JobState.QUEUED:
        move(session, job, JobState.RUNNING, now=now)
        events.record(session, job.id, "job.started", now=now)
    count = select(func.count()).where(
        Chunk.job_id == chunk.job_id, Chunk.stage_index == chunk.stage_index
    )
    return Claim(
        chunk_id=chunk.id,
        job_id=chunk.job_id,
        attempt=chunk.attempt,
        stage=chunk.stage,
        stage_index=chunk.stage_index,
        index=chunk.index,
        chunks=session.scalar(count) or 0,
    )


def renew(session: Session, claim: Claim, *, until: datetime, progress: float) -> bool:
    """Extend the lease and show the progress; return whether the job is being cancelled.

    Raises:
        LeaseLost: another attempt owns the chunk.
    """
    _guarded(session, claim, lease_until=until, progress=progress)
    state = session.scalar(select(Job.state).where(Job.id == claim.job_id))
    return state == JobState.CANCELLING


def _guarded(session: Session, claim: Claim, **values: Any) -> Chunk:
    """Change the chunk only while this attempt owns it; the one guard of all writes."""
    chunk = session.scalar(
        update(Chunk)
        .where(
            Chunk.id == claim.chunk_id,
            Chunk.attempt == claim.attempt,
            Chunk.state == ChunkState.RUNNING,
        )
        .values(**values)
        .returning(Chunk)
        .execution_options(populate_existing=True)
    )
    if chunk is None:
        raise LeaseLost(f"attempt {claim.attempt} of chunk {claim.chunk_id} was superseded")
    return chunk


def finish(
    session: Session,
    claim: Claim,
    *,
    stored: Sequence[Stored],
    metrics: Sequence[Metric],
    stage_done: bool,
    now: datetime,
) -> None:
    """Adopt what a chunk made and make ready what comes next, all in this transaction.

    Raises:
        LeaseLost: the attempt was superseded; nothing is written.
    """
    job = session.get_one(Job, claim.job_id, with_for_update=True)
    chunk = _guarded(
        session,
        claim,
        state=ChunkState.DONE,
        finished_at=now,
        lease_until=None,
        progress=1.0,
        failures=Chunk.failures - 1,
    )
    seconds = _count_seconds(chunk, now=now)
    if job.state == JobState.CANCELLING:
        _stop_if_idle(session, job, now=now)
        return
    for file in stored:
        _adopt(session, claim, file, now=now)
    points = [{"job_id": job.id, "name": m.name, "step": m.step, "value": m.value} for m in metrics]
    for point in points:
        insert_new(session, MetricPoint, point)
    facts = {"stage": claim.stage, "index": claim.index, "of": claim.chunks}
    events.record(session, job.id, "chunk.done", now=now, **facts, seconds=seconds)
    _advance(session, job, chunk, stage_done=stage_done, now=now)


def _count_seconds(chunk: Chunk, *, now: datetime) -> float:
    """Add this attempt's device time to the chunk's and return it."""
    seconds = (now - chunk.started_at).total_seconds() if chunk.started_at else 0.0
    chunk.seconds += seconds
    return seconds


def _adopt(session: Session, claim: Claim, file: Stored, *, now: datetime) -> None:
    insert_new(
        session,
        Artifact,
        {
            "sha256": file.sha256,
            "size_bytes": file.size_bytes,
            "format": file.format,
            "media_type": file.media_type,
            "file_name": file.file_name,
            "meta": file.meta,
            "created_at": now,
        },
    )
    insert_new(
        session,
        Output,
        {
            "chunk_id": claim.chunk_id,
            "name": file.name,
            "job_id": claim.job_id,
            "role": file.role,
            "sha256": file.sha256,
            "file_name": file.file_name,
            "cached": file.cached,
            "created_at": now,
        },
    )
    if file.cache_key is not None:
        values = {"key": file.cache_key, "sha256": file.sha256, "created_at": now}
        insert_new(session, CacheEntry, values)


def _advance(session: Session, job: Job, chunk: Chunk, *, stage_done: bool, now: datetime) -> None:
    """Make ready the chunks that only waited for this one; end the job after the last."""
    stage = (Chunk.job_id == job.id, Chunk.stage_index == chunk.stage_index)
    if stage_done:
        session.execute(
            update(Chunk)
            .where(*stage, Chunk.state.in_(OPEN_CHUNKS))
            .values(state=ChunkState.SKIPPED, finished_at=now)
        )
    elif chunk.chained:
        _make_ready(session, *stage, Chunk.index == chunk.index + 1)
    left = select(func.count()).where(
        *stage, Chunk.state.not_in((ChunkState.DONE, ChunkState.SKIPPED))
    )
    if session.scalar(left):
        return
    later = (Chunk.job_id == job.id, Chunk.stage_index == chunk.stage_index + 1)
    if _make_ready(session, *later, (Chunk.chained.is_(False)) | (Chunk.index == 0)):
        return
    move(session, job, JobState.SUCCEEDED, now=now)
    events.record(session, job.id, "job.succeeded", now=now)
    planning.on_succeeded(session, job, now=now)


def _make_ready(session: Session, *where: Any) -> int:
    changed = session.execute(
        update(Chunk)
        .where(*where, Chunk.state == ChunkState.BLOCKED)
        .values(state=ChunkState.READY)
        .returning(Chunk.id)
    )
    return len(changed.all())


def give_up(
    session: Session, claim: Claim, error: StillroomError, *, max_failures: int, now: datetime
) -> None:
    """End an attempt that raised: ready again where a retry may help, else the job fails.

    Raises:
        LeaseLost: the attempt was superseded.
    """
    job = session.get_one(Job, claim.job_id, with_for_update=True)
    chunk = _guarded(session, claim, lease_until=None, finished_at=now)
    _put_back(session, job, chunk, error, max_failures=max_failures, now=now)


def _put_back(
    session: Session,
    job: Job,
    chunk: Chunk,
    error: StillroomError,
    *,
    max_failures: int,
    now: datetime,
) -> None:
    again = error.retryable and chunk.failures < max_failures and job.state == JobState.RUNNING
    chunk.state = ChunkState.READY if again else ChunkState.FAILED
    _count_seconds(chunk, now=now)
    chunk.lease_until = None
    session.flush()
    facts = {"stage": chunk.stage, "index": chunk.index, "attempt": chunk.attempt}
    about = {"code": error.code(), "message": error.message, "retried": again}
    events.record(session, job.id, "chunk.failed", now=now, **facts, **about)
    if job.state == JobState.CANCELLING:
        _stop_if_idle(session, job, now=now)
    elif not again and job.state not in TERMINAL:
        planning.fail(session, job, error, now=now, chunk=chunk)


def stop(session: Session, claim: Claim, *, now: datetime) -> None:
    """End an attempt that noticed its job's cancellation."""
    job = session.get_one(Job, claim.job_id, with_for_update=True)
    chunk = _guarded(session, claim, state=ChunkState.CANCELLED, lease_until=None, finished_at=now)
    _count_seconds(chunk, now=now)
    _stop_if_idle(session, job, now=now)


def _stop_if_idle(session: Session, job: Job, *, now: datetime) -> None:
    running = select(func.count()).where(Chunk.job_id == job.id, Chunk.state == ChunkState.RUNNING)
    if not session.scalar(running):
        planning.end_cancelled(session, job, now=now)


def any_expired(engine: Engine, *, now: datetime) -> bool:
    """Return whether release_expired would find work; reads only."""
    with reading(engine) as session:
        query = select(Chunk.id).where(Chunk.state == ChunkState.RUNNING, Chunk.lease_until < now)
        return session.scalar(query.limit(1)) is not None


def release_expired(session: Session, *, now: datetime, max_failures: int) -> int:
    """Take back every chunk whose lease ran out: its worker is gone or cannot reach us."""
    expired = select(Chunk.id, Chunk.job_id).where(
        Chunk.state == ChunkState.RUNNING, Chunk.lease_until < now
    )
    released = 0
    for chunk_id, job_id in session.execute(expired.order_by(Chunk.job_id, Chunk.id)).all():
        job = session.get_one(Job, job_id, with_for_update=True)
        chunk = session.get_one(Chunk, chunk_id, with_for_update=True, populate_existing=True)
        if chunk.state != ChunkState.RUNNING or chunk.lease_until is None:
            continue
        if chunk.lease_until >= now:
            continue
        lost = WorkerLost(f"worker {chunk.owner} stopped renewing its lease")
        _put_back(session, job, chunk, lost, max_failures=max_failures, now=now)
        released += 1
    return released


def release_all(session: Session, *, owner_prefix: str, now: datetime) -> int:
    """Take back every running chunk of these owners: their server is known to be gone.

    The chunks are not to blame, so the failure counted at their claim is taken back.
    """
    owned = select(Chunk.id, Chunk.job_id).where(
        Chunk.state == ChunkState.RUNNING, Chunk.owner.startswith(owner_prefix, autoescape=True)
    )
    chunks = session.execute(owned.order_by(Chunk.job_id, Chunk.id)).all()
    for chunk_id, job_id in chunks:
        job = session.get_one(Job, job_id, with_for_update=True)
        chunk = session.get_one(Chunk, chunk_id, with_for_update=True)
        chunk.failures -= 1
        lost = WorkerLost("the server was restarted")
        _put_back(session, job, chunk, lost, max_failures=chunk.failures + 1, now=now)
    return len(chunks)
