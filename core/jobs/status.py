"""How a job stands, in words and numbers: a few queries for a whole page of jobs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Float,
    String,
    bindparam,
    cast,
    func,
    inspect,
    literal_column,
    null,
    select,
    union_all,
)
from sqlalchemy.orm import InstrumentedAttribute, Session

from core.db.models import Chunk, Event, Job, JobInput, Output
from core.jobs import waiting
from core.jobs.states import OVER_CHUNKS, RUNNING_CHUNK, TERMINAL, JobState
from core.jobs.waiting import Ahead

QUEUED_WORDS = "in the queue"
MAY_RUN = (JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING)
JobRow = Any
"""A row with all that a Job has; an object of a session would cost as much as the query."""
_NO_TEXT, _NO_NUMBER = cast(null(), String()), cast(null(), Float())


def _facts_of(these: Callable[[InstrumentedAttribute[str]], ColumnElement[bool]]) -> Any:
    """Ask what jobs read (made by no chunk), what they offer, how much of what runs is done."""
    reads: Any = select(
        JobInput.job_id.label("of_job"),
        literal_column("0").label("made_by"),
        JobInput.field.label("fact"),
        JobInput.sha256.label("sha256"),
        JobInput.upstream_id.label("upstream"),
        JobInput.upstream_output.label("output"),
        _NO_NUMBER.label("part"),
    ).where(these(JobInput.job_id))
    offers = select(
        Output.job_id,
        Output.chunk_id,
        Output.name,
        Output.sha256,
        _NO_TEXT,
        _NO_TEXT,
        _NO_NUMBER,
    ).where(these(Output.job_id), Output.role == "artifact")
    runs: Any = (
        select(
            Chunk.job_id,
            literal_column("-1"),
            _NO_TEXT,
            _NO_TEXT,
            _NO_TEXT,
            _NO_TEXT,
            func.sum(Chunk.progress),
        )
        # Through the job: of one of which nothing can run, however long, no chunk is read.
        .join(Job, Job.id == Chunk.job_id)
        .where(these(Job.id), Job.state.in_(MAY_RUN))
        .where(Chunk.state == RUNNING_CHUNK, Chunk.state.not_in(OVER_CHUNKS))
        .group_by(Chunk.job_id)
    )
    return union_all(reads, offers, runs)


# Built once: making a statement costs as much as running it, and every poll of a job runs one.
_MANY: Any = _facts_of(lambda job_id: job_id.in_(bindparam("ids", expanding=True))).order_by(
    "made_by"
)
"""For a page of jobs, the outputs that were made last at the end."""
_OF_SOME = _facts_of(lambda job_id: job_id.in_(bindparam("ids", expanding=True))).subquery()
_LAST_EVENT = select(func.max(Event.id)).where(Event.job_id == Job.id).scalar_subquery()
_SOME: Any = (
    select(
        *inspect(Job).columns,
        Job.priority.label("priority"),
        _LAST_EVENT.label("last_event"),
        *_OF_SOME.c,
    )
    .outerjoin(_OF_SOME, _OF_SOME.c.of_job == Job.id)
    .where(Job.id.in_(bindparam("ids", expanding=True)))
    .order_by(_OF_SOME.c.made_by)
)
"""Jobs with their facts, as rows; one with nothing but nulls where there are none.

The job comes with each, so this is for the handful of facts that the kinds have.
"""


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

    def take(self, fact: Any) -> None:
        """Take in one row."""
        if fact.part is not None:
            self.part = fact.part
        elif fact.made_by:
            self.artifacts[fact.fact] = fact.sha256
        else:
            read = {"sha256": fact.sha256, "job_id": fact.upstream, "output": fact.output}
            self.inputs[fact.fact] = read


def describe(session: Session, jobs: Sequence[Job], *, now: datetime) -> list[JobStatus]:
    """Return the status of each job, in order; why one waits only in short."""
    facts = _facts(session, jobs)
    upstream = waiting.upstream(session, jobs)
    return [_status(job, facts[job.id], upstream.get(job.id), now=now) for job in jobs]


def describe_one(
    session: Session, job: Job, *, now: datetime, ahead: Callable[[], Ahead]
) -> JobStatus:
    """Return a job's status; ``ahead`` tells what it has before it, where it may have to wait."""
    facts = _facts(session, [job])[job.id]
    told = _status(job, facts, None, now=now)
    if not _may_wait(job, facts):
        return told
    found = ahead()
    return replace(
        told,
        queue_position=found.place,
        waits_for=found.why,
        predicted_start_at=found.starts_at,
    )


@dataclass(frozen=True)
class Seen:
    """A job at a glance."""

    job: JobRow
    facts: _Facts = field(default_factory=_Facts)

    @property
    def last_event(self) -> int:
        """The number of the last event, 0 where nothing has happened to the job."""
        return self.job.last_event or 0

    def status(self, *, now: datetime) -> JobStatus | None:
        """Return how it stands; None where it may have to wait: that takes more to tell."""
        if _may_wait(self.job, self.facts):
            return None
        return _status(self.job, self.facts, None, now=now)


def glance(connection: Connection, job_ids: Sequence[str]) -> Sequence[Seen]:
    """Find jobs, of any project, by one statement; what is no job is left out."""
    found: dict[str, Seen] = {}
    for row in connection.execute(_SOME, {"ids": job_ids}):
        seen = found.setdefault(row.id, Seen(row))
        if row.of_job is not None:
            seen.facts.take(row)
    return list(found.values())


def _may_wait(job: Job | JobRow, facts: _Facts) -> bool:
    return job.state not in TERMINAL and facts.part is None


def _status(job: Job | JobRow, facts: _Facts, upstream: str | None, *, now: datetime) -> JobStatus:
    words = {JobState.QUEUED: QUEUED_WORDS, JobState.PAUSED: waiting.PAUSED_WORDS}
    return JobStatus(
        progress=_progress(job, facts.part or 0.0, now=now),
        queue_position=None,
        waits_for=upstream or words.get(JobState(job.state)),
        predicted_start_at=None,
        inputs=facts.inputs,
        artifacts=facts.artifacts,
    )


def _facts(session: Session, jobs: Sequence[Job]) -> dict[str, _Facts]:
    """Ask for what other rows say of each job."""
    session.flush()  # the connection below knows nothing of what is still to be written
    facts = {job.id: _Facts() for job in jobs}
    # Not through the session, whose care for objects these plain rows do not need.
    for row in session.connection().execute(_MANY, {"ids": list(facts)}):
        facts[row.of_job].take(row)
    return facts


def _progress(job: Job | JobRow, part: float, *, now: datetime) -> Progress:
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
