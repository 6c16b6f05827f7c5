"""Why a job does not run, in one sentence; its place in the queue; when it will probably start."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, func, or_, select, tuple_
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job, JobInput, Worker
from core.jobs import forecast, pool, shares
from core.jobs.forecast import Device, Queued
from core.jobs.scheduler import IN_QUEUE, ORDER
from core.jobs.shares import Fairness, Standing
from core.jobs.states import OVER_CHUNKS, READY_CHUNK, RUNNING_CHUNK, JobState

UNKNOWN_SECONDS = 30.0
"""A chunk's, while nothing of its kind has ever run."""
TIMED = (JobState.RUNNING.value, JobState.SUCCEEDED.value)
"""States of jobs whose chunks tell how long others of the kind will last."""
LOOKED_AT = 5_000
"""Jobs of the queue that a forecast plays through at most."""
GIB = 2**30
PAUSED_WORDS = "paused; resume it to go on"
# Built once: every poll of a queued job runs them, and making them costs more.
_NEXT = (
    select(Chunk.device, Chunk.memory_bytes, Chunk.failed_on, Chunk.retry_at)
    .where(Chunk.job_id == bindparam("job_id"), Chunk.state == READY_CHUNK)
    .order_by(Chunk.stage_index, Chunk.index)
    .limit(1)
)
"""The chunk of a job that comes next."""
_BEFORE_IT = select(func.count(Job.id)).where(
    Job.project_id == bindparam("project"),
    IN_QUEUE,
    tuple_(*ORDER)
    < tuple_(
        bindparam("rank", type_=Job.rank.type),
        bindparam("at", type_=Job.created_at.type),
        bindparam("id", type_=Job.id.type),
    ),
    select(Chunk.id).where(Chunk.job_id == Job.id, Chunk.state == READY_CHUNK).exists(),
)
"""How many jobs of its project with a chunk to start are before one."""


@dataclass(frozen=True)
class Ahead:
    """What a queued job has before it."""

    why: str | None
    place: int | None
    """In its project's queue, from 1."""
    starts_at: datetime | None


class Outlook:
    """What jobs have before them, on the snapshot of one session.

    The pool and what runs on it are read when first needed, and once for all jobs looked at.
    """

    def __init__(self, session: Session, *, now: datetime, fairness: Fairness) -> None:
        self._session = session
        self._now = now
        self._fairness = fairness

    def ahead(self, job: Job) -> Ahead:
        """Return why a job of which no chunk runs waits, its place and its probable start."""
        if job.state not in (JobState.QUEUED, JobState.RUNNING):
            return Ahead(_standing_still(self._session, job), None, None)
        self._session.flush()  # the connection below knows nothing of what is still to be written
        needs = self._session.connection().execute(_NEXT, {"job_id": job.id}).first()
        able = [w for w in self._workers if needs is None or _offers(w, needs)]
        place = _place(self._session, job)
        if needs is None or not able:
            return Ahead(self._nobody(needs), place, None)
        why = self._why(job, needs, able)
        starts_in = self._starts_in(job)
        if starts_in is None:
            return Ahead(why, place, None)
        starts_at = self._now + timedelta(seconds=starts_in)
        again = _again_at(needs, able, now=self._now)
        return Ahead(why, place, starts_at if again is None else max(starts_at, again))

    @cached_property
    def _workers(self) -> Sequence[Worker]:
        return pool.usable(self._session, now=self._now)

    @cached_property
    def _live(self) -> Sequence[Worker]:
        found = pool.workers(self._session, now=self._now)
        return [worker for worker, alive in found if alive]

    @cached_property
    def _running(self) -> Sequence[Any]:
        """What runs: each chunk with the figures of its job."""
        of_chunk = (Chunk.job_id, Chunk.owner, Chunk.started_at, Chunk.progress)
        of_job = (Job.project_id, Job.kind, Job.device_seconds, Job.attempts)
        query = select(*of_chunk, *of_job).join(Job, Job.id == Chunk.job_id)
        return self._session.execute(query.where(Chunk.state == RUNNING_CHUNK)).all()

    @cached_property
    def _standing(self) -> Mapping[str, Standing]:
        return shares.standings(self._session, now=self._now, fairness=self._fairness)

    def _nobody(self, needs: Any | None) -> str:
        if needs is None:
            return "its next chunk is being made ready"
        live = self._live
        if any(_offers(worker, needs) for worker in live):
            return "every worker that could run it is on a node that drains or is excluded"
        if not live:
            return "no worker is alive"
        same = [w.memory_bytes for w in live if needs.device in (None, w.kind)]
        if not same:
            return f"needs a {needs.device}; no live worker has one"
        most, asked = max(same) / GIB, needs.memory_bytes / GIB
        return f"needs {asked:.2f} GiB of device memory; the largest live worker has {most:.2f} GiB"

    def _why(self, job: Job, needs: Any, able: Sequence[Worker]) -> str:
        mine = self._standing[job.project_id]
        again = _again_at(needs, able, now=self._now)
        if again is not None:
            return f"failed on {needs.failed_on}; tried there again at {again:%T} UTC"
        if mine.at_limit:
            return f"its project runs {mine.running} chunks at once, its limit"
        busy = {chunk.owner for chunk in self._running}
        free = any(worker.id not in busy for worker in able)
        return _first(self._session, job, able, self._standing) or (
            "next in the queue; a worker is free to take it"
            if free
            else "next in the queue; all workers that could run it are busy"
        )

    def _starts_in(self, job: Job) -> float | None:
        running = self._running
        seconds = _Seconds(self._session, running, project=job.project_id)
        left = {chunk.owner: seconds.left(chunk, now=self._now) for chunk in running}
        busy_s = {chunk.job_id: left[chunk.owner] for chunk in running}
        jobs = _queue(self._session, seconds, busy_s)
        if all(one.job_id != job.id for one in jobs):
            return None
        whose = {chunk.owner: chunk.project_id for chunk in running}
        devices = [
            Device(w.kind, w.memory_bytes, left.get(w.id, 0.0), whose.get(w.id))
            for w in self._workers
        ]
        projects = self._standing.values()
        return forecast.starts_in(
            job.id,
            jobs,
            devices,
            usage={one.project_id: one.usage for one in projects},
            weights={one.project_id: one.weight for one in projects},
            limits={p.project_id: p.running_limit for p in projects if p.running_limit is not None},
        )


def _standing_still(session: Session, job: Job) -> str | None:
    if job.state == JobState.PAUSED:
        return PAUSED_WORDS
    return upstream(session, [job]).get(job.id)


def upstream(session: Session, jobs: Sequence[Job]) -> dict[str, str]:
    """Return for each waiting job the outputs it waits for, in words."""
    ids = [job.id for job in jobs if job.state == JobState.WAITING]
    if not ids:
        return {}
    query = select(JobInput).where(JobInput.job_id.in_(ids), JobInput.sha256.is_(None))
    names: dict[str, list[str]] = {}
    for row in session.scalars(query):
        names.setdefault(row.job_id, []).append(f"{row.upstream_id}/{row.upstream_output}")
    return {job_id: f"waits for {' and '.join(sorted(found))}" for job_id, found in names.items()}


def _offers(worker: Worker, needs: Any) -> bool:
    return needs.device in (None, worker.kind) and needs.memory_bytes <= worker.memory_bytes


def _again_at(needs: Any, able: Sequence[Worker], *, now: datetime) -> datetime | None:
    """Return when a chunk may run again where it failed, if it can run nowhere else."""
    nodes = {worker.node_id for worker in able}
    if needs.retry_at is None or needs.retry_at <= now or nodes != {needs.failed_on}:
        return None
    again: datetime = needs.retry_at
    return again


def _first(
    session: Session, job: Job, able: Sequence[Worker], standing: Mapping[str, Standing]
) -> str | None:
    """Return who goes before a job, in words; None where nobody does."""
    mine, rivals = standing[job.project_id], _rivals(able, standing)
    if count := _count(session, *rivals, Job.project_id == job.project_id, _before(job)):
        return f"{count} job(s) of its project before it"
    if count := _count(session, *rivals, Job.rank < job.rank):
        return f"{count} job(s) of higher priority go first"
    asking = select(Job.project_id).where(*rivals, Job.rank == job.rank).distinct()
    first = sum(standing[other].level < mine.level for other in session.scalars(asking))
    if not first:
        return None
    # Counted, never named: a project learns nothing of another but that it is there.
    others = "1 other project" if first == 1 else f"{first} other projects"
    return f"next of its project, which has used more than its share; first: {others}"


def _rivals(able: Sequence[Worker], standing: Mapping[str, Standing]) -> list[ColumnElement[bool]]:
    """Return what makes a job one that these workers may start, or go on with, instead."""
    full = [one.project_id for one in standing.values() if one.at_limit]
    offers: dict[str, int] = {}
    for worker in able:
        offers[worker.kind] = max(worker.memory_bytes, offers.get(worker.kind, 0))
    to_come = select(Chunk.id).where(
        Chunk.job_id == Job.id,
        Chunk.state.not_in((*OVER_CHUNKS, RUNNING_CHUNK)),
        or_(
            *(
                and_(
                    or_(Chunk.device.is_(None), Chunk.device == kind),
                    Chunk.memory_bytes <= memory_bytes,
                )
                for kind, memory_bytes in sorted(offers.items())
            )
        ),
    )
    return [IN_QUEUE, Job.project_id.not_in(full), to_come.exists()]


def _before(job: Job) -> ColumnElement[bool]:
    return tuple_(*ORDER) < (job.rank, job.created_at, job.id)


def _count(session: Session, *where: ColumnElement[bool]) -> int:
    return session.scalar(select(func.count(Job.id)).where(*where)) or 0


def _place(session: Session, job: Job) -> int:
    """Return the place among the jobs of its project that have a chunk to start."""
    mine = {"project": job.project_id, "rank": job.rank, "at": job.created_at, "id": job.id}
    return 1 + (session.connection().scalar(_BEFORE_IT, mine) or 0)


class _Seconds:
    """How long a chunk lasts: as those of its job did, else of the last job of its kind that ran.

    That job is one of the project that asks: how long others' took is not for it to learn. One that
    still runs tells what its ended chunks took.
    """

    def __init__(self, session: Session, running: Sequence[Any], *, project: str) -> None:
        self._session = session
        self._project = project
        self._by_kind: dict[str, float] = {}
        self.running = Counter(chunk.job_id for chunk in running)
        """Chunks that run of each job: attempts whose seconds are not counted yet."""

    def of(self, job_id: str, kind: str, device_seconds: float, attempts: int) -> float:
        ended = attempts - self.running[job_id]
        if device_seconds > 0 and ended > 0:
            return device_seconds / ended
        if kind not in self._by_kind:
            last = (
                select(Job.id, Job.device_seconds, Job.attempts)
                .where(Job.project_id == self._project, Job.kind == kind)
                .where(Job.state.in_(TIMED), Job.device_seconds > 0)
                .order_by(Job.created_at.desc())
                .limit(1)
            )
            row = self._session.execute(last).one_or_none()
            self._by_kind[kind] = UNKNOWN_SECONDS
            if row is not None:
                self._by_kind[kind] = row[1] / max(1, row[2] - self.running[row[0]])
        return self._by_kind[kind]

    def left(self, chunk: Any, *, now: datetime) -> float:
        """Return the seconds until a running chunk probably ends."""
        gone: float = (now - chunk.started_at).total_seconds()
        whole = self.of(chunk.job_id, chunk.kind, chunk.device_seconds, chunk.attempts)
        if chunk.progress > 0:
            whole = gone / chunk.progress
        return max(whole - gone, 0.0)


def _queue(session: Session, seconds: _Seconds, left: Mapping[str, float]) -> list[Queued]:
    """Return the jobs with chunks to start; ``left``: seconds until the running ones end."""
    first = (
        select(Chunk.id)
        .where(Chunk.job_id == Job.id, Chunk.state.not_in(OVER_CHUNKS))
        .order_by(Chunk.stage_index, Chunk.index)
        .limit(1)
        .correlate(Job)
        .scalar_subquery()
    )
    of_job = (Job.id, Job.project_id, Job.kind, Job.rank, Job.created_at, Job.chunks)
    figures = (Job.chunks_over, Job.device_seconds, Job.attempts)
    query = (
        select(*of_job, *figures, Chunk.device, Chunk.memory_bytes, Chunk.chained)
        .join(Chunk, Chunk.id == first)
        .where(IN_QUEUE)
        .order_by(*ORDER)
        .limit(LOOKED_AT)
    )
    rows = session.execute(query).all()
    oldest_first = sorted(rows, key=lambda row: (row.created_at, row.id))
    found = []
    for age, row in enumerate(oldest_first):
        chunks = row.chunks - row.chunks_over - seconds.running[row.id]
        lasts = seconds.of(row.id, row.kind, row.device_seconds, row.attempts)
        if chunks > 0:
            found.append(
                Queued(
                    job_id=row.id,
                    project_id=row.project_id,
                    rank=row.rank,
                    age=age,
                    chunks=chunks,
                    seconds=max(lasts, 1e-3),
                    device=row.device,
                    memory_bytes=row.memory_bytes,
                    chained=row.chained,
                    busy_s=left.get(row.id, 0.0) if row.chained else 0.0,
                )
            )
    return found
