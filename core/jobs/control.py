"""What people do to a job's life: cancel, pause, resume, retry, change, pin a checkpoint.

Every function works inside the caller's transaction; ``project`` names whose job it must be.
"""

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from graphlib import TopologicalSorter
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job, JobInput, MetricPoint, Output
from core.errors import Conflict, NotFound, SpecInvalid, UpstreamFailed
from core.jobs import adoption, events, planning, projects, service
from core.jobs.states import (
    OPEN_CHUNKS,
    OVER_CHUNKS,
    RUNNING_CHUNK,
    ChunkState,
    JobState,
    move,
)
from core.specs.base import JobSpec, references_of, with_references


def cancel(session: Session, job_id: str, *, project: str | None, now: datetime) -> Job:
    """Stop a job: at once where nothing runs, else as soon as the running chunk notices.

    Raises:
        Conflict: the job is over.
    """
    service.get(session, job_id, project=project)
    job = planning.lock_chain(session, job_id)
    planning.check_open(job)
    if job.state == JobState.CANCELLING:
        return job
    if not _runs(session, job):
        planning.end_cancelled(session, job, now=now)
        return job
    move(session, job, JobState.CANCELLING, now=now)
    session.execute(
        update(Chunk)
        .where(Chunk.job_id == job_id, Chunk.state.in_(OPEN_CHUNKS))
        .values(state=ChunkState.CANCELLED, finished_at=now)
    )
    events.record(session, job.id, "job.cancelling", now=now)
    return job


def _runs(session: Session, job: Job) -> bool:
    running = select(Chunk.id).where(Chunk.job_id == job.id, Chunk.state == RUNNING_CHUNK)
    return session.scalar(running.limit(1)) is not None


def pause(session: Session, job_id: str, *, project: str | None, now: datetime) -> Job:
    """Start no chunk more; the running one is given back and runs again after the pause.

    Raises:
        Conflict: the job is over, or being cancelled.
    """
    job = service.get(session, job_id, project=project, lock=True)
    if job.state in (JobState.PAUSED, JobState.PAUSING):
        return job
    new = JobState.PAUSING if _runs(session, job) else JobState.PAUSED
    move(session, job, new, now=now)
    events.record(session, job.id, f"job.{new}", now=now)
    return job


def resume(session: Session, job_id: str, *, project: str | None, now: datetime) -> Job:
    """Let a paused job go on where it stopped.

    Raises:
        Conflict: the job is not paused.
    """
    job = service.get(session, job_id, project=project, lock=True)
    if job.state == JobState.PAUSING:
        move(session, job, JobState.RUNNING, now=now)
    elif job.state != JobState.PAUSED:
        raise Conflict(f"job {job_id} is {job.state}, not paused; allowed: paused, pausing")
    elif job.chunks is not None:
        move(session, job, JobState.QUEUED, now=now)
    else:
        move(session, job, JobState.WAITING, now=now)
        planning.plan_if_whole(session, job, now=now)
    events.record(session, job.id, "job.unpaused", now=now)
    return job


def change(
    session: Session,
    job_id: str,
    *,
    project: str | None,
    priority: int | None = None,
    name: str | None = None,
    now: datetime,
) -> Job:
    """Change a job's priority or name; what it computes stays as submitted.

    Raises:
        Conflict: a new priority for a job that is over.
    """
    job = service.get(session, job_id, project=project, lock=True)
    changed: dict[str, Any] = {}
    if priority is not None:
        planning.check_open(job)
        job.rank = 100 - priority
        changed["priority"] = priority
    if name is not None:
        job.name = changed["name"] = name
    if changed:
        events.record(session, job.id, "job.changed", now=now, **changed)
    return job


def pin(
    session: Session, job_id: str, *, stage: str, index: int, pinned: bool, project: str | None
) -> None:
    """Keep a chunk's checkpoints whatever retention says, or leave them to it again.

    Raises:
        NotFound: there is no such checkpoint, or it is gone already.
    """
    job = service.get(session, job_id, project=project, lock=True)
    chunk = select(Chunk.id).where(
        Chunk.job_id == job.id, Chunk.stage == stage, Chunk.index == index
    )
    found = session.execute(
        update(Output)
        .where(Output.chunk_id.in_(chunk), Output.role == "checkpoint")
        .values(pinned=pinned)
        .returning(Output.name)
        .execution_options(synchronize_session=False)
    ).all()
    if not found:
        raise NotFound(f"job {job_id} has no checkpoint of {stage} {index}")


def retry(
    session: Session,
    job_id: str,
    *,
    project: str | None,
    by: str,
    now: datetime,
    trace: str | None = None,
) -> list[Job]:
    """Go on with a job that failed or was cancelled, as a new job: terminal states are final.

    The new job takes over the chunks that were done. Jobs that failed only because they needed an
    output of it are retried too, bound to the new job.

    Returns:
        The new jobs; that of ``job_id`` first.

    Raises:
        Conflict: the job has not ended badly, or a retry of it is open or has succeeded.
    """
    job = service.get(session, job_id, project=project)
    below = _failed_with(session, job)
    ids = {job.id, *(old.id for old in below)}
    # Every lock on jobs at once and in order, for check_queue may lock the project after them.
    planning.lock(session, ids | _read_by(session, ids))
    if job.state not in (JobState.FAILED, JobState.CANCELLED):
        raise Conflict(f"job {job_id} is {job.state}; allowed: failed, cancelled")
    later = _goes_on_as(session, job)
    if later is not None:
        raise Conflict(f"job {job_id} goes on as job {later.id}, which is {later.state}")
    made: dict[str, Job] = {}

    def go_on(old: Job) -> None:
        projects.check_queue(session, old.project_id)
        projects.check_storage(session, old.project_id, now=now)
        made[old.id] = _again(session, old, made, by=by, now=now, trace=trace)

    go_on(job)
    for old in below:
        # Another of its inputs will not come either: it is retried with the job that makes that.
        with suppress(SpecInvalid), session.begin_nested():
            go_on(old)
    return list(made.values())


def _goes_on_as(session: Session, job: Job) -> Job | None:
    """Return the job of the same line of retries that is open or has succeeded."""
    while job.retry_of is not None:
        job = session.get_one(Job, job.retry_of)
    fresh = [job.id]
    while fresh:
        later = session.scalars(select(Job).where(Job.retry_of.in_(fresh))).all()
        for job in later:
            if job.state not in (JobState.FAILED, JobState.CANCELLED):
                return job
        fresh = [job.id for job in later]
    return None


def retried_as(session: Session, job_id: str) -> str | None:
    """Return the latest retry of a job; None where there is none."""
    query = select(Job.id).where(Job.retry_of == job_id).order_by(Job.created_at.desc())
    return session.scalar(query.limit(1))


def _failed_with(session: Session, job: Job) -> list[Job]:
    """Return the jobs that failed for want of an output of ``job``, upstream first."""
    ids = planning.downstream(session, job.id)
    query = select(Job).where(Job.id.in_(ids), Job.state == JobState.FAILED)
    found = {
        one.id: one
        for one in session.scalars(query.order_by(Job.created_at, Job.id))
        if (one.error or {}).get("code") == UpstreamFailed.code()
    }
    # Not by age: those that were retried together are equally old.
    needs: dict[str, set[str]] = {one: set() for one in found}
    for row in session.scalars(select(JobInput).where(JobInput.job_id.in_(found))):
        if row.upstream_id in found:
            needs[row.job_id].add(row.upstream_id)
    return [found[one] for one in TopologicalSorter(needs).static_order()]


def _read_by(session: Session, ids: set[str]) -> set[str]:
    """Return the jobs whose outputs the retries of these will read."""
    rows = select(JobInput.upstream_id).where(JobInput.job_id.in_(ids))
    return {_latest(session, one, {}) for one in session.scalars(rows) if one is not None}


def _again(
    session: Session,
    old: Job,
    made: Mapping[str, Job],
    *,
    by: str,
    now: datetime,
    trace: str | None,
) -> Job:
    spec = _rewired(session, planning.parse_spec(old), made)
    spec = spec.model_copy(update={"priority": old.priority, "name": old.name})
    inputs = planning.resolve(session, spec, project=old.project_id)
    job = service.new_job(
        session,
        spec,
        inputs,
        project=old.project_id,
        by=by,
        now=now,
        trace=trace,
        retry_of=old.id,
    )
    if job.state == JobState.QUEUED:
        planning.plan(session, job, spec, now=now)
        if _same_inputs(session, old, job):
            _take_over(session, old, job, now=now)
    events.record(session, old.id, "job.retried", now=now, retried_as=job.id)
    return job


def _rewired(session: Session, spec: JobSpec, made: Mapping[str, Job]) -> JobSpec:
    """Point references at the retries of the jobs they name."""
    changed: dict[str, str] = {}
    for field, reference in references_of(spec).items():
        upstream, slash, name = reference.partition("/")
        if slash:
            changed[field] = f"{_latest(session, upstream, made)}/{name}"
    return with_references(spec, changed)


def _latest(session: Session, job_id: str, made: Mapping[str, Job]) -> str:
    """Return the job that goes on with ``job_id``, or itself."""
    while True:
        later = made[job_id].id if job_id in made else retried_as(session, job_id)
        if later is None:
            return job_id
        job_id = later


def _same_inputs(session: Session, old: Job, new: Job) -> bool:
    def of(job: Job) -> dict[str, str | None]:
        rows = session.scalars(select(JobInput).where(JobInput.job_id == job.id))
        return {row.field: row.sha256 for row in rows}

    return old.chunks == new.chunks and of(old) == of(new)


def _take_over(session: Session, old: Job, new: Job, *, now: datetime) -> None:
    """Let the new job begin after the chunks that the old one had done."""
    over = session.scalars(
        select(Chunk).where(Chunk.job_id == old.id, Chunk.state.in_(OVER_CHUNKS))
    ).all()
    ids = _chunk_ids(session, new)
    rows = [
        {
            "id": ids[chunk.stage_index, chunk.index],
            "state": chunk.state,
            "progress": 1.0,
            "score": chunk.score,
            "finished_at": now,
        }
        for chunk in over
    ]
    if rows:
        session.execute(update(Chunk), rows)
    new.chunks_over = len(over)
    twins = {chunk.id: ids[chunk.stage_index, chunk.index] for chunk in over}
    made = select(Output).join(Chunk, Chunk.id == Output.chunk_id)
    outputs = session.scalars(
        made.where(Chunk.job_id == old.id, Chunk.state.in_(OVER_CHUNKS))
    ).all()
    _copy(session, Output, outputs, lambda o: {"chunk_id": twins[o.chunk_id], "job_id": new.id})
    points = session.scalars(select(MetricPoint).where(MetricPoint.job_id == old.id)).all()
    _copy(session, MetricPoint, points, lambda _: {"job_id": new.id})
    _open_rest(session, new)
    events.record(session, new.id, "job.took_over", now=now, chunks=len(over), of=old.id)


def _chunk_ids(session: Session, job: Job) -> dict[tuple[int, int], int]:
    query = select(Chunk.stage_index, Chunk.index, Chunk.id).where(Chunk.job_id == job.id)
    return {(stage, index): chunk_id for stage, index, chunk_id in session.execute(query)}


def _copy(session: Session, table: Any, rows: Any, changed: Any) -> None:
    names = [column.key for column in table.__table__.columns]
    copies = [{**{n: getattr(row, n) for n in names}, **changed(row)} for row in rows]
    if copies:
        session.execute(insert(table), copies)


def _open_rest(session: Session, job: Job) -> None:
    """Make ready what comes first of the chunks that are left."""
    session.expire_all()
    left = select(Chunk).where(Chunk.job_id == job.id, Chunk.state.not_in(OVER_CHUNKS))
    first = session.scalars(left.order_by(Chunk.stage_index, Chunk.index).limit(1)).first()
    if first is None:
        raise Conflict(f"job {job.retry_of} has nothing left to do")
    job.stage = first.stage
    stage = (Chunk.job_id == job.id, Chunk.stage_index == first.stage_index)
    adoption.make_ready(session, *stage, *((Chunk.index == first.index,) if first.chained else ()))
