"""Who owns a running chunk, and until when. Every write is guarded by the attempt number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job, MetricPoint
from core.db.session import insert_new
from core.errors import LeaseLost, Stalled, StillroomError
from core.jobs import adoption, events, planning, pool, shares
from core.jobs.adoption import Stored
from core.jobs.pool import Place
from core.jobs.scheduler import Candidate
from core.jobs.shares import Fairness
from core.jobs.states import RUNNING_CHUNK, TERMINAL, ChunkState, JobState, move
from core.kinds._base import Metric
from core.settings import Settings


@dataclass(frozen=True)
class Rules:
    """How long a lease lasts, how often a chunk is tried, and when one counts as stuck."""

    lease: timedelta = timedelta(seconds=20)
    attempts: Mapping[str, int] = field(default_factory=dict)
    """Error code -> tries in all, over what the error's class says."""
    stall_limit: timedelta = timedelta(minutes=15)
    stop_limit: timedelta = timedelta(seconds=30)
    retry_wait: timedelta = timedelta(seconds=5)
    """Before a chunk is tried again where it failed; doubles with each failure, up to 64 times."""
    fairness: Fairness = field(default_factory=Fairness)

    @classmethod
    def of(cls, settings: Settings) -> "Rules":
        """Take what the operator decided."""
        return cls(
            lease=settings.lease,
            attempts=settings.attempts,
            stall_limit=settings.stall_limit,
            stop_limit=settings.stop_limit,
            retry_wait=settings.retry_wait,
            fairness=Fairness(settings.usage_half_life, settings.entry_penalty),
        )

    def tries(self, error: StillroomError) -> int:
        """Return how often a chunk that ends in this error is tried in all."""
        return self.attempts.get(error.code(), error.attempts) if error.retryable else 1


@dataclass(frozen=True)
class Claim:
    """One attempt at one chunk: the token that every write must show."""

    chunk_id: int
    job_id: str
    kind: str
    attempt: int
    stage: str
    stage_index: int
    index: int
    chunks: int
    """Of the stage."""
    node: str
    stall_limit: timedelta
    trace: str | None


def claim(
    session: Session, best: Candidate, *, owner: str, place: Place, now: datetime, rules: Rules
) -> Claim | None:
    """Take the chunk ``best`` for ``owner``; None where it is gone.

    The attempt rises before any work starts, so that a chunk that kills its worker is counted too.
    """
    # Every writer locks the job first, then its chunks: the one order, so no deadlock.
    job = session.get_one(Job, best.job_id, with_for_update=True, populate_existing=True)
    if job.state not in (JobState.QUEUED, JobState.RUNNING):
        return None
    chunk = session.scalar(
        update(Chunk)
        .where(Chunk.id == best.chunk_id, Chunk.state == ChunkState.READY)
        .values(
            state=ChunkState.RUNNING,
            attempt=Chunk.attempt + 1,
            owner=owner,
            lease_until=now + rules.lease,
            started_at=now,
            finished_at=None,
            progress=0.0,
        )
        .returning(Chunk)
    )
    if chunk is None:
        return None
    job.attempts += 1
    if job.state == JobState.QUEUED:
        begun = "job.started" if job.started_at is None else "job.resumed"
        move(session, job, JobState.RUNNING, now=now)
        events.record(session, job.id, begun, now=now, worker=owner)
    last = select(func.max(Chunk.index)).where(
        Chunk.job_id == chunk.job_id, Chunk.stage_index == chunk.stage_index
    )
    own_limit = job.spec.get("stall_limit_s")
    return Claim(
        chunk_id=chunk.id,
        job_id=chunk.job_id,
        kind=job.kind,
        attempt=chunk.attempt,
        stage=chunk.stage,
        stage_index=chunk.stage_index,
        index=chunk.index,
        chunks=(session.scalar(last) or 0) + 1,
        node=place.node,
        stall_limit=timedelta(seconds=own_limit) if own_limit else rules.stall_limit,
        trace=job.trace,
    )


def renew(session: Session, claim: Claim, *, until: datetime, progress: float) -> JobState:
    """Extend the lease and show the progress; return how the job stands.

    Raises:
        LeaseLost: another attempt owns the chunk.
    """
    _guarded(session, claim, lease_until=until, progress=progress)
    return JobState(session.scalars(select(Job.state).where(Job.id == claim.job_id)).one())


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
    rules: Rules,
    score: float | None = None,
) -> bool:
    """Adopt what a chunk made and make ready what comes next, all in this transaction.

    Returns:
        Whether other workers may have something to do now.

    Raises:
        LeaseLost: the attempt was superseded; nothing is written.
    """
    job = _lock(session, claim.job_id, stage_done=stage_done)
    cancelled = job.state == JobState.CANCELLING
    chunk = _guarded(
        session,
        claim,
        state=ChunkState.CANCELLED if cancelled else ChunkState.DONE,
        finished_at=now,
        lease_until=None,
        progress=1.0,
        score=score,
    )
    seconds = shares.count_seconds(session, job, chunk, now=now)
    more = False
    if not cancelled:
        adoption.adopt(session, job, chunk, stored, now=now)
        for m in metrics:
            point = {"job_id": job.id, "name": m.name, "step": m.step, "value": m.value}
            insert_new(session, MetricPoint, point)
        facts = {"stage": claim.stage, "index": claim.index, "of": claim.chunks}
        about = {"seconds": seconds, "worker": chunk.owner, "attempt": claim.attempt}
        events.record(session, job.id, "chunk.done", now=now, **facts, **about)
        more = adoption.advance(session, job, chunk, stage_done=stage_done, now=now)
        _judge_nodes(session, chunk, claim.node, now=now)
    settle(session, job, now=now)
    shares.charge(session, job.project_id, seconds, now=now, fairness=rules.fairness)
    return more


def _lock(session: Session, job_id: str, *, stage_done: bool) -> Job:
    """Lock a job; where it may end now, with all that waits for it."""
    facts = select(Job.state, Job.chunks, Job.chunks_over).where(Job.id == job_id)
    state, chunks, over = session.execute(facts).one()
    if stage_done or (chunks or 0) - over <= 1 or state == JobState.CANCELLING:
        return planning.lock_chain(session, job_id)
    return session.get_one(Job, job_id, with_for_update=True, populate_existing=True)


def _judge_nodes(session: Session, chunk: Chunk, node: str, *, now: datetime) -> None:
    """A chunk that failed elsewhere and succeeded here speaks against that node."""
    failed_on = chunk.failed_on if chunk.failed_on != node else None
    for place in sorted({node, failed_on} - {None}, key=str):  # one order of locks
        if place == node:
            pool.absolve(session, node)
        elif place is not None and pool.blame(session, place, now=now):
            events.record(session, chunk.job_id, "node.excluded", now=now, node=place)


def give_up(
    session: Session, claim: Claim, error: StillroomError, *, now: datetime, rules: Rules
) -> None:
    """End an attempt that raised: ready again where a retry may help, else the job fails.

    Raises:
        LeaseLost: the attempt was superseded.
    """
    job = planning.lock_chain(session, claim.job_id)
    chunk = _guarded(session, claim, lease_until=None, finished_at=now)
    put_back(session, job, chunk, error, node=claim.node, now=now, rules=rules)


def put_back(
    session: Session,
    job: Job,
    chunk: Chunk,
    error: StillroomError,
    *,
    node: str | None,
    now: datetime,
    rules: Rules,
) -> None:
    """End a failed attempt whose chunk the caller has locked; its job may fail with it."""
    code = error.code()
    tries = chunk.failures.get(code, 0) + 1
    stopping = job.state == JobState.CANCELLING or job.state in TERMINAL
    again = not stopping and tries < rules.tries(error)
    chunk.failures = {**chunk.failures, code: tries}
    chunk.state = ChunkState.READY if again else ChunkState.FAILED
    if stopping:
        chunk.state = ChunkState.CANCELLED
    own_limit = isinstance(error, Stalled) and job.spec.get("stall_limit_s")
    if node is not None and not own_limit:  # whoever asks for too little blames no node
        chunk.failed_on = node
        chunk.retry_at = now + rules.retry_wait * 2 ** min(tries - 1, 6)
    chunk.lease_until = None
    chunk.finished_at = now
    seconds = shares.count_seconds(session, job, chunk, now=now)
    session.flush()
    facts = {"stage": chunk.stage, "index": chunk.index, "attempt": chunk.attempt}
    about = {"code": code, "message": error.message, "retried": again, "worker": chunk.owner}
    events.record(session, job.id, "chunk.failed", now=now, **facts, **about)
    if not again and not stopping:
        seconds += planning.fail(session, job, error, now=now, chunk=chunk)
    settle(session, job, now=now)
    shares.charge(session, job.project_id, seconds, now=now, fairness=rules.fairness)


def stop(session: Session, claim: Claim, *, now: datetime, rules: Rules) -> None:
    """End an attempt that noticed its job's cancellation."""
    _let_go(session, claim, ChunkState.CANCELLED, now=now, rules=rules)


def hand_back(session: Session, claim: Claim, *, now: datetime, rules: Rules) -> None:
    """End an attempt whose job is paused or whose worker stops: no failure, ready at once."""
    _let_go(session, claim, ChunkState.READY, now=now, rules=rules)


def _let_go(
    session: Session, claim: Claim, state: ChunkState, *, now: datetime, rules: Rules
) -> None:
    job = planning.lock_chain(session, claim.job_id)
    chunk = _guarded(session, claim, lease_until=None)
    end_attempt(session, job, chunk, state, now=now, rules=rules)


def end_attempt(
    session: Session, job: Job, chunk: Chunk, state: ChunkState, *, now: datetime, rules: Rules
) -> None:
    """End a running attempt of a locked job that nobody is to blame for: ready, or cancelled."""
    chunk.state = ChunkState.CANCELLED if job.state == JobState.CANCELLING else state
    chunk.lease_until, chunk.finished_at = None, now
    seconds = shares.count_seconds(session, job, chunk, now=now)
    session.flush()
    facts = {"stage": chunk.stage, "index": chunk.index, "attempt": chunk.attempt}
    said = "chunk.handed_back" if chunk.state == ChunkState.READY else "chunk.cancelled"
    events.record(session, job.id, said, now=now, **facts, worker=chunk.owner)
    settle(session, job, now=now)
    shares.charge(session, job.project_id, seconds, now=now, fairness=rules.fairness)


def settle(session: Session, job: Job, *, now: datetime) -> None:
    """Once nothing of it runs, a cancelling job is cancelled and a pausing one paused."""
    if job.state not in (JobState.CANCELLING, JobState.PAUSING):
        return
    running = select(Chunk.id).where(Chunk.job_id == job.id, Chunk.state == RUNNING_CHUNK)
    if session.scalar(running.limit(1)) is not None:
        return
    if job.state == JobState.CANCELLING:
        planning.end_cancelled(session, job, now=now)
    else:
        move(session, job, JobState.PAUSED, now=now)
        events.record(session, job.id, "job.paused", now=now)
