"""What is left after a storm of echo jobs, against what was asked: rows, sums and stored bytes."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from bench._feeder import Sent
from core.artifacts.store import LocalStore
from core.db.models import (
    Artifact,
    Chunk,
    Event,
    IdempotencyKey,
    Job,
    MetricPoint,
    Output,
    Project,
)
from core.db.session import reading
from core.errors import NotFound
from core.jobs import housekeeping
from core.jobs.shares import Fairness
from core.jobs.states import ChunkState, JobState
from workers.start import utc_now

LATER = timedelta(hours=2)
"""The sweep leaves alone what is younger than an hour; for it, so much time has passed."""
ENDS = ("chunk.done", "chunk.failed", "chunk.handed_back")


@dataclass(frozen=True)
class Findings:
    """What the audit found."""

    chunks: int
    attempts: int
    ends: Counter[str]
    """How attempts ended, by the events."""
    lost: int
    """Jobs that were taken and did not end with exactly the bytes they should."""
    twice: int
    """Ends of chunks and jobs recorded more than once, and jobs under a key beyond the first."""
    wrong: Sequence[str]
    """Every disagreement, the lost and the doubled ones included, in words."""


def audit(engine: Engine, data_dir: Path, sent: Sequence[Sent]) -> Findings:
    """Compare everything; the service is idle."""
    store = LocalStore(data_dir)
    wrong: list[str] = []
    with reading(engine) as session:
        lost = _lost(session, store, sent)
        twice = _twice(session)
        wrong += lost + twice + _sums(session) + _ledger(session) + _rows(session, sent)
        chunks, attempts = session.execute(
            select(func.count(), func.coalesce(func.sum(Chunk.attempt), 0)).select_from(Chunk)
        ).one()
        ends = Counter(_ends(session))
    wrong += _leftovers(engine, store, data_dir)
    return Findings(chunks, int(attempts), ends, len(lost), len(twice), wrong)


def _lost(session: Session, store: LocalStore, sent: Sequence[Sent]) -> list[str]:
    """Name the jobs that the service took and did not do."""
    jobs = {job.id: job for job in session.scalars(select(Job))}
    outputs = select(Output.job_id, Output.sha256).where(Output.name == "text")
    texts = dict(session.execute(outputs.where(Output.role == "artifact")).all())
    lost = []
    for one in sent:
        job = jobs.get(one.job_id)
        text = (one.wanted.text + "\n") * one.wanted.times
        if job is None or job.name != one.wanted.key:
            lost.append(f"{one.job_id} for {one.wanted.key}: no such job")
        elif job.state != JobState.SUCCEEDED:
            lost.append(f"{job.id}: {job.state} {job.error}")
        elif texts.get(job.id) != hashlib.sha256(text.encode()).hexdigest():
            lost.append(f"{job.id}: its text is {texts.get(job.id)}")
        elif _read(store, texts[job.id]) != text:
            lost.append(f"{job.id}: the stored text has other bytes than its name says")
    return lost


def _read(store: LocalStore, sha256: str) -> str | None:
    try:
        return store.path(sha256).read_text()
    except NotFound:
        return None


def _twice(session: Session) -> list[str]:
    """Name what happened more than once."""
    ends = (
        select(Event.job_id, Event.type, func.count())
        .where(Event.type.in_(("job.succeeded", "job.started", "job.planned")))
        .group_by(Event.job_id, Event.type)
        .having(func.count() > 1)
    )
    found = [f"{job_id}: {count} events {kind}" for job_id, kind, count in session.execute(ends)]
    done: Counter[tuple[str, int]] = Counter()
    for job_id, data in session.execute(
        select(Event.job_id, Event.data).where(Event.type == "chunk.done")
    ):
        done[job_id, data["index"]] += 1
    found += [f"{job_id}: chunk {i} done {n} times" for (job_id, i), n in done.items() if n > 1]
    names = select(Job.name, func.count()).group_by(Job.name).having(func.count() > 1)
    return found + [f"{count} jobs for key {name}" for name, count in session.execute(names)]


def _sums(session: Session) -> list[str]:
    """Name the jobs whose row says other than their chunks."""
    query = select(
        Chunk.job_id,
        func.count(),
        func.count().filter(Chunk.state == ChunkState.DONE),
        func.sum(Chunk.attempt),
        func.sum(Chunk.seconds),
    ).group_by(Chunk.job_id)
    sums = {row[0]: row[1:] for row in session.execute(query)}
    wrong = []
    for job in session.scalars(select(Job)):
        count, done, attempts, seconds = sums.get(job.id, (0, 0, 0, 0.0))
        said = (job.chunks, job.chunks_over, job.attempts)
        if said != (count, done, attempts) or abs(job.device_seconds - seconds) > 1e-6:
            wrong.append(
                f"{job.id}: says {said} and {job.device_seconds} s, "
                f"its chunks {(count, done, attempts)} and {seconds} s"
            )
    return wrong


def _ledger(session: Session) -> list[str]:
    """Compare what projects are charged with what their chunks took; use decays, if slowly."""
    used = dict(
        session.execute(
            select(Job.project_id, func.sum(Job.device_seconds)).group_by(Job.project_id)
        ).all()
    )
    first = session.scalar(select(func.min(Job.created_at)))
    wrong = []
    for project in session.scalars(select(Project)):
        most = used.get(project.id, 0.0)
        span = project.usage_at - first if first is not None else timedelta(0)
        least = Fairness().decayed(most, max(span, timedelta(0)))
        if not least - 1e-6 <= project.usage <= most + 1e-6:
            wrong.append(f"{project.id}: charged {project.usage} s of {least} to {most} s")
    return wrong


def _rows(session: Session, sent: Sequence[Sent]) -> list[str]:
    """Compare how many rows of each sort there are with how many there must be."""
    chunks = sum(one.wanted.times for one in sent)
    counts = {
        "jobs": (Job.id, [], len(sent)),
        "idempotency keys": (IdempotencyKey.key, [], len(sent)),
        "chunks done": (Chunk.id, [Chunk.state == ChunkState.DONE], chunks),
        "chunks": (Chunk.id, [], chunks),
        "chunk.done events": (Event.id, [Event.type == "chunk.done"], chunks),
        "points of curves": (MetricPoint.step, [MetricPoint.name == "lines"], chunks),
        "outputs": (Output.name, [Output.role == "artifact"], len(sent)),
    }
    wrong = []
    for what, (column, where, right) in counts.items():
        found = session.scalar(select(func.count(column)).where(*where))
        if found != right:
            wrong.append(f"{found} {what} instead of {right}")
    kept = select(Output.job_id, func.count()).where(Output.role == "checkpoint")
    several = kept.group_by(Output.job_id).having(func.count() > 1)
    return wrong + [
        f"{job_id}: {count} checkpoints kept" for job_id, count in session.execute(several)
    ]


def _ends(session: Session) -> dict[str, int]:
    query = select(Event.type, func.count()).where(Event.type.in_(ENDS)).group_by(Event.type)
    return dict(session.execute(query).all())


def _leftovers(engine: Engine, store: LocalStore, data_dir: Path) -> list[str]:
    """Sweep as the service does in time; then files and rows must name the same bytes."""
    scratch = data_dir / "scratch"
    housekeeping.tidy(engine, store, scratch, now=utc_now() + LATER)
    with reading(engine) as session:
        rows = set(session.scalars(select(Artifact.sha256)))
        named = set(session.scalars(select(Output.sha256)))
    files = {path.parent.name + path.name for path in (data_dir / "blobs").glob("*/*")}
    wrong = [f"a file without a row: {sha256}" for sha256 in sorted(files - rows)]
    wrong += [f"a row without a file: {sha256}" for sha256 in sorted(rows - files)]
    wrong += [f"a row that no job names: {sha256}" for sha256 in sorted(rows - named)]
    wrong += [f"left in scratch: {path.name}" for path in sorted(scratch.glob("*"))]
    return wrong + [f"left in tmp: {path.name}" for path in sorted((data_dir / "tmp").glob("*"))]
