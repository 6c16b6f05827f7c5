"""How a job stands, in words and numbers: a few queries for a whole page of jobs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BindParameter,
    Float,
    String,
    bindparam,
    cast,
    func,
    literal_column,
    null,
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
# Built once: making a statement costs as much as running it, and every poll of a job runs this.
_IDS: BindParameter[str] = bindparam("ids", expanding=True)
_MAY_RUN: BindParameter[str] = bindparam("may_run", expanding=True)
_NO_TEXT, _NO_NUMBER = cast(null(), String()), cast(null(), Float())
_READS: Any = select(
    JobInput.job_id,
    literal_column("0").label("made_by"),
    JobInput.field,
    JobInput.sha256,
    JobInput.upstream_id,
    JobInput.upstream_output,
    _NO_NUMBER,
).where(JobInput.job_id.in_(_IDS))
_OFFERS: Any = select(
    Output.job_id,
    Output.chunk_id,
    Output.name,
    Output.sha256,
    _NO_TEXT,
    _NO_TEXT,
    _NO_NUMBER,
).where(Output.job_id.in_(_IDS), Output.role == "artifact")
_RUNS: Any = (
    select(
        Chunk.job_id,
        literal_column("-1"),
        _NO_TEXT,
        _NO_TEXT,
        _NO_TEXT,
        _NO_TEXT,
        func.sum(Chunk.progress),
    )
    .where(Chunk.job_id.in_(_MAY_RUN), Chunk.state == RUNNING_CHUNK)
    .group_by(Chunk.job_id)
)
_FACTS: Any = union_all(_READS, _OFFERS, _RUNS).order_by("made_by")
"""What jobs read (made by no chunk of theirs), what they offer, the latest last, and how much of
their running chunks is done: one query."""


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


@dataclass
class _Facts:
    """What other rows than a job's own say of it."""

    inputs: dict[str, dict[str, str | None]] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    part: float | None = None
    """How much of the running chunks is done, in chunks; None where none runs."""


def describe(session: Session, jobs: Sequence[Job], *, now: datetime) -> list[JobStatus]:
    """Return the status of each job, in order; why one waits only in short."""
    return _describe(session, jobs, _facts(session, jobs), now=now)


def _describe(
    session: Session, jobs: Sequence[Job], facts: Mapping[str, _Facts], *, now: datetime
) -> list[JobStatus]:
    upstream = waiting.upstream(session, jobs)
    words = {JobState.QUEUED: QUEUED_WORDS, JobState.PAUSED: waiting.PAUSED_WORDS}
    return [
        JobStatus(
            progress=_progress(job, facts[job.id].part or 0.0, now=now),
            queue_position=None,
            waits_for=upstream.get(job.id) or words.get(JobState(job.state)),
            predicted_start_at=None,
            inputs=facts[job.id].inputs,
            artifacts=facts[job.id].artifacts,
        )
        for job in jobs
    ]


def describe_one(session: Session, job: Job, *, now: datetime, fairness: Fairness) -> JobStatus:
    """Return a job's status with its place in the queue, why it waits and its probable start."""
    facts = _facts(session, [job])
    [status] = _describe(session, [job], facts, now=now)
    if job.state in TERMINAL or facts[job.id].part is not None:
        return status  # it runs, or is over: nothing to wait for
    ahead = waiting.ahead(session, job, now=now, fairness=fairness)
    return replace(
        status,
        queue_position=ahead.place,
        waits_for=ahead.why,
        predicted_start_at=ahead.starts_at,
    )


def _facts(session: Session, jobs: Sequence[Job]) -> dict[str, _Facts]:
    """Ask for what other rows say of each job."""
    session.flush()  # the connection below knows nothing of what is still to be written
    asked = {"ids": [job.id for job in jobs]}
    asked["may_run"] = [job.id for job in jobs if job.state in MAY_RUN]
    facts = {job.id: _Facts() for job in jobs}
    # Not through the session, whose care for objects these plain rows do not need.
    for job_id, made_by, name, sha256, upstream, output, part in session.connection().execute(
        _FACTS, asked
    ):
        if part is not None:
            facts[job_id].part = part
        elif made_by:
            facts[job_id].artifacts[name] = sha256
        else:
            read = {"sha256": sha256, "job_id": upstream, "output": output}
            facts[job_id].inputs[name] = read
    return facts


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
