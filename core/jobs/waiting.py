"""Why a job does not run, in one sentence; its place in the queue; when it will probably start."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job, JobInput, Worker
from core.jobs import forecast, pool, shares
from core.jobs.forecast import Device, Queued
from core.jobs.scheduler import IN_QUEUE, ORDER
from core.jobs.shares import Fairness, Standing
from core.jobs.states import OVER_CHUNKS, READY_CHUNK, RUNNING_CHUNK, JobState

UNKNOWN_SECONDS = 30.0
"""A chunk's, while nothing of its kind has ever run."""
LOOKED_AT = 5_000
"""Jobs of the queue that a forecast plays through at most."""
GIB = 2**30
PAUSED_WORDS = "paused; resume it to go on"


@dataclass(frozen=True)
class Ahead:
    """What a queued job has before it."""

    why: str | None
    place: int | None
    """In its project's queue, from 1."""
    starts_at: datetime | None


def ahead(session: Session, job: Job, *, now: datetime, fairness: Fairness) -> Ahead:
    """Return why a job does not run, its place in its project's queue and its probable start."""
    if job.state not in (JobState.QUEUED, JobState.RUNNING):
        return Ahead(_standing_still(session, job), None, None)
    if _counted(session, job, RUNNING_CHUNK):
        return Ahead(None, None, None)
    workers = pool.usable(session, now=now)
    needs = _needs(session, job)
    able = [w for w in workers if needs is None or _offers(w, needs)]
    standing = shares.standings(session, now=now, fairness=fairness)
    place = _place(session, job)
    if needs is None or not able:
        return Ahead(_nobody(workers, needs), place, None)
    why = _why(session, job, needs, able, place, standing, now=now)
    starts_in = _starts_in(session, job, workers, standing, now=now)
    return Ahead(why, place, None if starts_in is None else now + timedelta(seconds=starts_in))


def _standing_still(session: Session, job: Job) -> str | None:
    if job.state == JobState.PAUSED:
        return PAUSED_WORDS
    return upstream(session, [job]).get(job.id)


def upstream(session: Session, jobs: Sequence[Job]) -> dict[str, str]:
    """Return for each waiting job the outputs it waits for, in words."""
    ids = [job.id for job in jobs if job.state == JobState.WAITING]
    query = select(JobInput).where(JobInput.job_id.in_(ids), JobInput.sha256.is_(None))
    names: dict[str, list[str]] = {}
    for row in session.scalars(query):
        names.setdefault(row.job_id, []).append(f"{row.upstream_id}/{row.upstream_output}")
    return {job_id: f"waits for {' and '.join(sorted(found))}" for job_id, found in names.items()}


def _counted(session: Session, job: Job, state: Any) -> int:
    query = select(func.count()).where(Chunk.job_id == job.id, Chunk.state == state)
    return session.scalar(query) or 0


def _needs(session: Session, job: Job) -> Chunk | None:
    """Return the chunk that comes next."""
    query = select(Chunk).where(Chunk.job_id == job.id, Chunk.state == READY_CHUNK)
    return session.scalar(query.order_by(Chunk.stage_index, Chunk.index).limit(1))


def _offers(worker: Worker, needs: Chunk) -> bool:
    return needs.device in (None, worker.kind) and needs.memory_bytes <= worker.memory_bytes


def _nobody(workers: Sequence[Worker], needs: Chunk | None) -> str:
    if not workers:
        return "no worker is alive"
    if needs is None:
        return "its next chunk is being made ready"
    same = [w.memory_bytes for w in workers if needs.device in (None, w.kind)]
    if not same:
        return f"needs a {needs.device}; no live worker has one"
    most, asked = max(same) / GIB, needs.memory_bytes / GIB
    return f"needs {asked:.2f} GiB of device memory; the largest live worker has {most:.2f} GiB"


def _why(
    session: Session,
    job: Job,
    needs: Chunk,
    able: Sequence[Worker],
    place: int,
    standing: dict[str, Standing],
    *,
    now: datetime,
) -> str:
    mine = standing[job.project_id]
    nodes = {worker.node_id for worker in able}
    if needs.retry_at is not None and needs.retry_at > now and nodes == {needs.failed_on}:
        return f"failed on {needs.failed_on}; tried there again at {needs.retry_at:%T} UTC"
    if mine.at_limit:
        return f"its project runs {mine.running} chunks at once, its limit"
    if place > 1:
        return f"{place - 1} job(s) of its project before it"
    urgent = select(func.count()).where(IN_QUEUE, Job.rank < job.rank, Job.id != job.id)
    if count := session.scalar(urgent):
        return f"{count} job(s) of higher priority go first"
    first = [
        s for s in standing.values() if s.level < mine.level and s.project_id in _open(session)
    ]
    if first:
        names = ", ".join(sorted(s.name for s in first)[:3])
        return f"next of its project, which has used more than its share; first: {names}"
    return "next in the queue; all workers that could run it are busy"


def _open(session: Session) -> set[str]:
    return set(session.scalars(select(Job.project_id).where(IN_QUEUE).distinct()))


def _place(session: Session, job: Job) -> int:
    """Return the place among the jobs of its project that have a chunk to start."""
    before = tuple_(*ORDER) < (job.rank, job.created_at, job.id)
    ready = select(Chunk.id).where(Chunk.job_id == Job.id, Chunk.state == READY_CHUNK).exists()
    query = select(func.count()).where(Job.project_id == job.project_id, IN_QUEUE, before, ready)
    return (session.scalar(query) or 0) + 1


def _starts_in(
    session: Session,
    job: Job,
    workers: Sequence[Worker],
    standing: dict[str, Standing],
    *,
    now: datetime,
) -> float | None:
    seconds = _Seconds(session)
    jobs = _queue(session, seconds)
    if all(one.job_id != job.id for one in jobs):
        return None
    busy = _busy(session, seconds, now=now)
    devices = [Device(w.kind, w.memory_bytes, busy.get(w.id, 0.0)) for w in workers]
    usage = {project_id: one.usage for project_id, one in standing.items()}
    weights = {project_id: one.weight for project_id, one in standing.items()}
    return forecast.starts_in(job.id, jobs, devices, usage, weights)


class _Seconds:
    """How long a chunk lasts: as those of its job did, else of the last job of its kind."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._by_kind: dict[str, float] = {}

    def of(self, kind: str, device_seconds: float, attempts: int) -> float:
        if device_seconds > 0 and attempts > 0:
            return device_seconds / attempts
        if kind not in self._by_kind:
            last = (
                select(Job.device_seconds, Job.attempts)
                .where(Job.kind == kind, Job.state == JobState.SUCCEEDED.value, Job.attempts > 0)
                .order_by(Job.created_at.desc())
                .limit(1)
            )
            row = self._session.execute(last).one_or_none()
            self._by_kind[kind] = row[0] / row[1] if row else UNKNOWN_SECONDS
        return self._by_kind[kind]


def _queue(session: Session, seconds: _Seconds) -> list[Queued]:
    """Return the jobs with chunks to start, as the forecast sees them."""
    first = (
        select(Chunk.id)
        .where(Chunk.job_id == Job.id, Chunk.state.not_in(OVER_CHUNKS))
        .order_by(Chunk.stage_index, Chunk.index)
        .limit(1)
        .correlate(Job)
        .scalar_subquery()
    )
    query = (
        select(Job, Chunk)
        .join(Chunk, Chunk.id == first)
        .where(IN_QUEUE)
        .order_by(Job.rank, Job.created_at)
        .limit(LOOKED_AT)
    )
    rows = session.execute(query).all()
    ages = {job.id: age for age, (job, _) in enumerate(sorted(rows, key=lambda r: r[0].created_at))}
    return [
        Queued(
            job_id=job.id,
            project_id=job.project_id,
            rank=job.rank,
            age=ages[job.id],
            chunks=(job.chunks or 1) - job.chunks_over,
            seconds=max(seconds.of(job.kind, job.device_seconds, job.attempts), 1e-3),
            device=chunk.device,
            memory_bytes=chunk.memory_bytes,
            chained=chunk.chained,
        )
        for job, chunk in rows
    ]


def _busy(session: Session, seconds: _Seconds, *, now: datetime) -> dict[str, float]:
    """Return for each worker that runs a chunk the seconds until that probably ends."""
    query = select(Chunk, Job).join(Job, Job.id == Chunk.job_id).where(Chunk.state == RUNNING_CHUNK)
    found = {}
    for chunk, job in session.execute(query):
        if chunk.owner is None or chunk.started_at is None:
            continue
        gone = (now - chunk.started_at).total_seconds()
        whole = seconds.of(job.kind, job.device_seconds, job.attempts - 1)
        if chunk.progress > 0:
            whole = gone / chunk.progress
        found[chunk.owner] = max(whole - gone, 0.0)
    return found
