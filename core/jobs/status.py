"""How a job stands, in words and numbers: a few queries for a whole page of jobs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BindParameter,
    String,
    bindparam,
    func,
    literal_column,
    select,
    union_all,
)
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job, JobInput, Output
from core.jobs import waiting
from core.jobs.shares import Fairness
from core.jobs.states import RUNNING_CHUNK, TERMINAL, JobState

QUEUED_WORDS = "in the queue"
MAY_RUN = frozenset({JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING})
# Built once: making a statement costs as much as running it, and every poll of a job runs these.
_IDS: BindParameter[str] = bindparam("ids", expanding=True)
_PARTS = (
    select(Chunk.job_id, func.sum(Chunk.progress))
    .where(Chunk.job_id.in_(_IDS), Chunk.state == RUNNING_CHUNK)
    .group_by(Chunk.job_id)
)
_NOTHING = literal_column("NULL", String())
_NAMED: Any = union_all(
    select(
        JobInput.job_id,
        literal_column("0").label("made_by"),
        JobInput.field,
        JobInput.sha256,
        JobInput.upstream_id,
        JobInput.upstream_output,
    ).where(JobInput.job_id.in_(_IDS)),
    select(Output.job_id, Output.chunk_id, Output.name, Output.sha256, _NOTHING, _NOTHING).where(
        Output.job_id.in_(_IDS), Output.role == "artifact"
    ),
).order_by("made_by")
"""What jobs read (made by no chunk of theirs) and what they offer, the latest last: one query."""


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
    predicted_start_at: datetime | None
    inputs: dict[str, dict[str, str | None]] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)


def describe(session: Session, jobs: Sequence[Job], *, now: datetime) -> list[JobStatus]:
    """Return the status of each job, in order; why one waits only in short."""
    parts = _parts(session, jobs)
    return _describe(session, jobs, parts, now=now)


def _describe(
    session: Session, jobs: Sequence[Job], parts: Mapping[str, float], *, now: datetime
) -> list[JobStatus]:
    inputs, artifacts = _named(session, [job.id for job in jobs])
    upstream = waiting.upstream(session, jobs)
    words = {JobState.QUEUED: QUEUED_WORDS, JobState.PAUSED: waiting.PAUSED_WORDS}
    return [
        JobStatus(
            progress=_progress(job, parts.get(job.id, 0.0), now=now),
            queue_position=None,
            waits_for=upstream.get(job.id) or words.get(JobState(job.state)),
            predicted_start_at=None,
            inputs=inputs[job.id],
            artifacts=artifacts[job.id],
        )
        for job in jobs
    ]


def describe_one(session: Session, job: Job, *, now: datetime, fairness: Fairness) -> JobStatus:
    """Return a job's status with its place in the queue, why it waits and its probable start."""
    parts = _parts(session, [job])
    [status] = _describe(session, [job], parts, now=now)
    if job.state in TERMINAL or job.id in parts:
        return status  # it runs, or is over: nothing to wait for
    ahead = waiting.ahead(session, job, now=now, fairness=fairness)
    return replace(
        status,
        queue_position=ahead.place,
        waits_for=ahead.why,
        predicted_start_at=ahead.starts_at,
    )


def _parts(session: Session, jobs: Sequence[Job]) -> dict[str, float]:
    """Return how much of the running chunks is done, in chunks, of each job that has one."""
    ids = [job.id for job in jobs if job.state in MAY_RUN]
    if not ids:
        return {}
    return {job_id: float(part) for job_id, part in session.execute(_PARTS, {"ids": ids})}


def _named(
    session: Session, ids: Sequence[str]
) -> tuple[dict[str, dict[str, dict[str, str | None]]], dict[str, dict[str, str]]]:
    """Return what each job reads, by field, and what it offers, by name."""
    inputs: dict[str, dict[str, dict[str, str | None]]] = {job_id: {} for job_id in ids}
    artifacts: dict[str, dict[str, str]] = {job_id: {} for job_id in ids}
    for job_id, made_by, name, sha256, upstream, output in session.execute(_NAMED, {"ids": ids}):
        if made_by:
            artifacts[job_id][name] = sha256
        else:
            inputs[job_id][name] = {"sha256": sha256, "job_id": upstream, "output": output}
    return inputs, artifacts


def _progress(job: Job, part: float, *, now: datetime) -> Progress:
    if job.chunks is None:
        return Progress(0.0, None, 0.0, None, None, None)
    done = job.chunks_over + part
    over = job.state in TERMINAL
    seconds = ((job.finished_at or now) - job.started_at).total_seconds() if job.started_at else 0
    rate = done / seconds if seconds > 0 and done > 0 else None
    return Progress(
        done=round(done, 3),
        total=job.chunks,
        fraction=round(done / job.chunks, 4),
        stage=None if over else job.stage,
        rate=rate,
        eta_s=(job.chunks - done) / rate if rate and not over else None,
    )
