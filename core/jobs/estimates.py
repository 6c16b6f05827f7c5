"""What a job would cost and when it would start: it is submitted on trial, looked at, taken back.

So an estimate passes the very checks of a submission, and leaves nothing behind. Of its chunks only
the first of each stage are ever written: a job of 200,000 is looked at as soon as a job of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.db.models import CacheEntry, Chunk, Job, JobInput, Output, Worker
from core.jobs import planning, pool, service, waiting
from core.jobs.shares import Fairness
from core.jobs.states import ChunkState, JobState
from core.kinds._base import Cost, Stage
from core.specs.base import JobSpec, inputs_of

HISTORY = 5
"""Finished jobs of the project and kind, the latest, whose chunks are timed."""
TWINS = 50
"""Finished jobs of a kind, the latest, among which the same work is sought."""
ABOUT_THE_JOB = frozenset(
    {"name", "priority", "labels", "deadline_s", "keep_checkpoints", "stall_limit_s"}
)
"""Fields of a spec that change nothing about what is computed."""
GIB = 2**30


@dataclass(frozen=True)
class StageEstimate:
    """Chunks that run alike."""

    name: str
    chunks: int
    chained: bool
    device: str | None
    """``cpu`` or ``gpu``; null: either."""
    memory_bytes: int
    seconds_per_chunk: float | None = None
    """Of the project's finished jobs of the kind; null: none of them timed such a stage."""


@dataclass(frozen=True)
class Estimate:
    """What is known of a job before it is submitted; null where nothing is."""

    stages: Sequence[StageEstimate] | None
    chunks: int | None
    memory_bytes: int | None
    """The most that any chunk asks of its device."""
    device_seconds: float | None
    device_seconds_from: str
    """What that rests on, or why there is none."""
    cache_hits: int | None
    cache_hits_from: str
    can_run: bool
    """Whether live workers could run every stage."""
    why_not: str | None
    waits_for: str | None
    queue_position: int | None
    predicted_start_at: datetime | None
    cost: Cost | None = None
    """By counting, where the kind can; device_seconds are by what was run before."""


def estimate(
    session: Session, spec: JobSpec, *, project: str, by: str, now: datetime, fairness: Fairness
) -> Estimate:
    """Return what a job would cost and when it would start.

    Raises:
        SpecInvalid, QuotaExceeded: as `service.submit` does.
    """
    with session.begin_nested() as trial:
        job = service.accept(session, spec, project=project, by=by, now=now)
        stages: Sequence[Stage] = ()
        if job.state == JobState.QUEUED:
            stages = planning.plan(session, job, spec, now=now, trial=True)
        found = _look(session, job, spec, stages, now=now, fairness=fairness)
        trial.rollback()
    return found


def _look(
    session: Session,
    job: Job,
    spec: JobSpec,
    planned: Sequence[Stage],
    *,
    now: datetime,
    fairness: Fairness,
) -> Estimate:
    ahead = waiting.Outlook(session, now=now, fairness=fairness).ahead(job)
    hits, hits_from = _cache_hits(session, job)
    facts: dict[str, Any] = {
        "cache_hits": hits,
        "cache_hits_from": hits_from,
        "waits_for": ahead.why,
        "queue_position": ahead.place,
        "predicted_start_at": ahead.starts_at,
    }
    if job.chunks is None:
        device = None if job.spec["device"] == "any" else job.spec["device"]
        some = StageEstimate("", 1, chained=False, device=device, memory_bytes=0)
        why_not = _why_not(session, [some], now=now)
        unplanned = "its chunks are known once the jobs it waits for are done"
        return Estimate(
            stages=None,
            chunks=None,
            memory_bytes=None,
            device_seconds=None,
            device_seconds_from=unplanned,
            can_run=why_not is None,
            why_not=why_not,
            **facts,
        )
    stages, jobs = _timed(session, job, planned)
    seconds = _device_seconds(stages)
    count = planning.kind_of(job).cost
    why_not = _why_not(session, stages, now=now)
    return Estimate(
        stages=stages,
        chunks=job.chunks,
        memory_bytes=max(stage.memory_bytes for stage in stages),
        device_seconds=seconds,
        device_seconds_from=_told(job.kind, jobs, known=seconds is not None),
        can_run=why_not is None,
        why_not=why_not,
        cost=count and count(spec, planning.job_inputs(session, job.id)),
        **facts,
    )


def _timed(session: Session, job: Job, planned: Sequence[Stage]) -> tuple[list[StageEstimate], int]:
    """Return the stages with their times, and how many finished jobs these come from."""
    latest = (
        select(Job.id)
        .where(Job.project_id == job.project_id, Job.kind == job.kind)
        .where(Job.state == JobState.SUCCEEDED.value)
        .order_by(Job.created_at.desc())
        .limit(HISTORY)
    )
    before = session.scalars(latest).all()
    # What a retry took over was not run: no attempt, no time.
    timed = (
        select(Chunk.stage, func.avg(Chunk.seconds))
        .where(Chunk.job_id.in_(before), Chunk.state == ChunkState.DONE, Chunk.attempt > 0)
        .group_by(Chunk.stage)
    )
    seconds = {stage: float(mean) for stage, mean in session.execute(timed)}
    return [
        StageEstimate(
            name=stage.name,
            chunks=stage.chunks,
            chained=stage.mode == "chained",
            device=stage.device,
            memory_bytes=stage.memory_bytes,
            seconds_per_chunk=seconds.get(stage.name),
        )
        for stage in planned
    ], len(before)


def _device_seconds(stages: Sequence[StageEstimate]) -> float | None:
    """Return the device time of all chunks; None where one stage was never timed."""
    total = 0.0
    for stage in stages:
        if stage.seconds_per_chunk is None:
            return None
        total += stage.chunks * stage.seconds_per_chunk
    return total


def _told(kind: str, jobs: int, *, known: bool) -> str:
    if known:
        return f"chunks are taken to last as in the project's latest {jobs} {kind} job(s)"
    if jobs:
        return f"not every stage was timed in the project's latest {jobs} {kind} job(s)"
    return f"no {kind} job of the project has succeeded yet"


def _why_not(session: Session, stages: Sequence[StageEstimate], *, now: datetime) -> str | None:
    """Return why live workers could never run one of the stages; None where they could."""
    usable = pool.usable(session, now=now)
    live = [worker for worker, alive in pool.workers(session, now=now) if alive]
    for stage in stages:
        if any(_fits(worker, stage) for worker in usable):
            continue
        if not live:
            return "no worker is alive"
        told = f"stage {stage.name} " if stage.name else ""
        if any(_fits(worker, stage) for worker in live):
            return f"{told}has only workers on nodes that drain or are excluded"
        same = [w.memory_bytes for w in live if stage.device in (None, w.kind)]
        if not same:
            return f"{told}needs a {stage.device}; no live worker has one"
        asked, most = stage.memory_bytes / GIB, max(same) / GIB
        return (
            f"{told}needs {asked:.2f} GiB of device memory; "
            f"the largest live worker has {most:.2f} GiB"
        )
    return None


def _fits(worker: Worker, stage: StageEstimate) -> bool:
    return stage.device in (None, worker.kind) and stage.memory_bytes <= worker.memory_bytes


def _cache_hits(session: Session, job: Job) -> tuple[int | None, str]:
    """Return how many files the cache still holds of the same work done before in this project.

    The keys themselves are made of the bytes that a chunk reads, so they are known only when it
    runs.
    """
    if job.chunks is None:
        return None, "known once the jobs it waits for are done"
    twins = (
        select(Job)
        .where(
            Job.project_id == job.project_id,
            Job.kind == job.kind,
            Job.state == JobState.SUCCEEDED.value,
        )
        .order_by(Job.created_at.desc())
        .limit(TWINS)
    )
    inputs = _inputs(session, job)
    for twin in session.scalars(twins):
        if _work(twin) == _work(job) and _inputs(session, twin) == inputs:
            kept = select(CacheEntry.key).where(CacheEntry.sha256 == Output.sha256).exists()
            query = select(func.count()).select_from(Output).where(Output.job_id == twin.id, kept)
            return session.scalar(query) or 0, f"{twin.id} did the same work"
    return None, "no earlier job did exactly this; what parts of it are cached shows when it runs"


def _work(job: Job) -> dict[str, Any]:
    """Return what a spec asks to be computed, without what it reads: that is compared by hash."""
    left_out = ABOUT_THE_JOB | inputs_of(planning.kind_of(job).spec).keys()
    return {field: value for field, value in job.spec.items() if field not in left_out}


def _inputs(session: Session, job: Job) -> dict[str, str | None]:
    query = select(JobInput.field, JobInput.sha256).where(JobInput.job_id == job.id)
    return dict(session.execute(query).all())
