"""How a job stands, in words and numbers: a few queries for a whole page of jobs."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job, JobInput, Output
from core.jobs import pool
from core.jobs.scheduler import ORDER
from core.jobs.states import TERMINAL, ChunkState, JobState

_OVER = (ChunkState.DONE, ChunkState.SKIPPED)


@dataclass(frozen=True)
class Progress:
    """Done and total count chunks; a running chunk counts by its own fraction."""

    done: float
    total: int | None
    fraction: float
    stage: str | None
    rate: float | None
    """Chunks per second since the job started."""
    eta_s: float | None


@dataclass(frozen=True)
class JobStatus:
    """Everything about a job that its row does not say."""

    progress: Progress
    queue_position: int | None
    waits_for: str | None
    attempts: int
    device_seconds: float
    cache_hits: int
    inputs: dict[str, dict[str, str | None]] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Counts:
    total: int
    over: int
    part: float
    attempts: int
    seconds: float
    stage_index: int | None


def describe(session: Session, jobs: Sequence[Job], *, now: datetime) -> list[JobStatus]:
    """Return the status of each job, in order."""
    ids = [job.id for job in jobs]
    counts = _counts(session, ids)
    stages = _stages(session, counts)
    inputs = _inputs(session, ids)
    artifacts, hits = _artifacts(session, ids)
    places = _places(session) if any(job.state == JobState.QUEUED for job in jobs) else {}
    alive = sum(alive for _, alive in pool.workers(session, now=now))
    found = []
    for job in jobs:
        known = counts.get(job.id)
        place = places.get(job.id) if job.state == JobState.QUEUED else None
        found.append(
            JobStatus(
                progress=_progress(job, known, stages.get(job.id), now=now),
                queue_position=place,
                waits_for=_why(job, inputs[job.id], place, alive),
                attempts=known.attempts if known else 0,
                device_seconds=round(known.seconds, 3) if known else 0.0,
                cache_hits=hits[job.id],
                inputs=inputs[job.id],
                artifacts=artifacts[job.id],
            )
        )
    return found


def _counts(session: Session, ids: Iterable[str]) -> dict[str, _Counts]:
    over = case((Chunk.state.in_(_OVER), 1), else_=0)
    query = (
        select(
            Chunk.job_id,
            func.count(),
            func.sum(over),
            func.sum(case((Chunk.state == ChunkState.RUNNING, Chunk.progress), else_=0.0)),
            func.sum(Chunk.attempt),
            func.sum(Chunk.seconds),
            func.min(case((Chunk.state.not_in(_OVER), Chunk.stage_index), else_=None)),
        )
        .where(Chunk.job_id.in_(ids))
        .group_by(Chunk.job_id)
    )
    return {
        row[0]: _Counts(row[1], int(row[2]), float(row[3]), int(row[4]), float(row[5]), row[6])
        for row in session.execute(query)
    }


def _stages(session: Session, counts: dict[str, _Counts]) -> dict[str, str]:
    query = select(Chunk.job_id, Chunk.stage_index, Chunk.stage).where(
        Chunk.job_id.in_(counts), Chunk.index == 0
    )
    return {
        job_id: stage
        for job_id, index, stage in session.execute(query)
        if index == counts[job_id].stage_index
    }


def _inputs(session: Session, ids: Sequence[str]) -> dict[str, dict[str, dict[str, str | None]]]:
    found: dict[str, dict[str, dict[str, str | None]]] = {job_id: {} for job_id in ids}
    for row in session.scalars(select(JobInput).where(JobInput.job_id.in_(ids))):
        found[row.job_id][row.field] = {
            "sha256": row.sha256,
            "job_id": row.upstream_id,
            "output": row.upstream_output,
        }
    return found


def _artifacts(
    session: Session, ids: Sequence[str]
) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
    query = (
        select(Output.job_id, Output.name, Output.sha256, Output.role, Output.cached)
        .where(Output.job_id.in_(ids))
        .order_by(Output.chunk_id)
    )
    artifacts: dict[str, dict[str, str]] = {job_id: {} for job_id in ids}
    hits: dict[str, int] = defaultdict(int)
    for job_id, name, sha256, role, cached in session.execute(query):
        hits[job_id] += bool(cached)
        if role == "artifact":
            artifacts[job_id][name] = sha256
    return artifacts, hits


def _places(session: Session) -> dict[str, int]:
    query = select(Job.id).where(Job.state == JobState.QUEUED).order_by(*ORDER)
    return {job_id: place for place, job_id in enumerate(session.scalars(query), start=1)}


def _progress(job: Job, counts: _Counts | None, stage: str | None, *, now: datetime) -> Progress:
    if counts is None:
        return Progress(0.0, None, 0.0, None, None, None)
    done = counts.over + counts.part
    over = job.state in TERMINAL
    seconds = ((job.finished_at or now) - job.started_at).total_seconds() if job.started_at else 0
    rate = done / seconds if seconds > 0 and done > 0 else None
    eta_s = (counts.total - done) / rate if rate and not over else None
    return Progress(
        done=round(done, 3),
        total=counts.total,
        fraction=round(done / counts.total, 4),
        stage=None if over else stage,
        rate=rate,
        eta_s=eta_s,
    )


def _why(
    job: Job, inputs: dict[str, dict[str, str | None]], place: int | None, alive: int
) -> str | None:
    """Say in a sentence what a job that does not run is waiting for."""
    if job.state == JobState.WAITING:
        names = [f"{row['job_id']}/{row['output']}" for row in inputs.values() if not row["sha256"]]
        return f"waits for {' and '.join(sorted(names))}"
    if job.state != JobState.QUEUED:
        return None
    if not alive:
        return "no worker is alive"
    ahead = (place or 1) - 1
    return f"{ahead} queued job(s) before it" if ahead else "next in the queue; all workers busy"
