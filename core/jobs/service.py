"""Take, find and list jobs. Every function works inside the caller's transaction."""

import base64
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import bindparam, delete, select, tuple_
from sqlalchemy.orm import Session, aliased

from core.db.models import IdempotencyKey, Job, JobInput, JobLabel
from core.db.session import insert_new
from core.errors import InFlight, NotFound, SpecInvalid
from core.jobs import events, planning, projects
from core.jobs.ids import new_id
from core.jobs.states import JobState
from core.specs.base import LABEL_KEY, JobSpec

REPLAY_FOR = timedelta(hours=24)
# Built once: every poll runs one of them.
_BY_ID = select(Job).where(Job.id == bindparam("id"))
_OF_PROJECT = _BY_ID.where(Job.project_id == bindparam("project"))
_ID = re.compile(r"job_[0-9a-z]{26}")


def submit(
    session: Session,
    spec: JobSpec,
    *,
    project: str,
    by: str,
    now: datetime,
    trace: str | None = None,
) -> Job:
    """Insert a job of a project and, where its inputs exist already, its chunks.

    ``by`` is the id of the key that asked, or ``local``; ``trace`` the request's W3C traceparent.

    Raises:
        SpecInvalid: a reference is wrong, or the inputs do not fit the spec.
        QuotaExceeded: the project is at its limit of open jobs, or of storage.
    """
    job = accept(session, spec, project=project, by=by, now=now, trace=trace)
    if job.state == JobState.QUEUED:
        planning.plan(session, job, spec, now=now)
    return job


def accept(
    session: Session,
    spec: JobSpec,
    *,
    project: str,
    by: str,
    now: datetime,
    trace: str | None = None,
) -> Job:
    """Insert a job that its project may have, not planned yet; raises as `submit` does."""
    inputs = planning.resolve(session, spec, project=project)
    projects.check_queue(session, project)
    projects.check_storage(session, project, now=now)
    return new_job(session, spec, inputs, project=project, by=by, now=now, trace=trace)


def new_job(
    session: Session,
    spec: JobSpec,
    inputs: Sequence[JobInput],
    *,
    project: str,
    by: str,
    now: datetime,
    trace: str | None = None,
    retry_of: str | None = None,
) -> Job:
    """Insert the row of a job and those of its inputs; chunks come with its plan."""
    whole = all(row.sha256 for row in inputs)
    limit = spec.deadline_s
    job = Job(
        id=new_id("job"),
        project_id=project,
        kind=spec.kind,
        name=spec.name,
        spec=spec.model_dump(mode="json"),
        labels=dict(spec.labels),
        rank=100 - spec.priority,
        state=JobState.QUEUED if whole else JobState.WAITING,
        submitted_by=by,
        retry_of=retry_of,
        trace=trace,
        created_at=now,
        deadline_at=now + timedelta(seconds=limit) if limit else None,
    )
    session.add(job)
    session.flush()
    about = {"job_id": job.id, "project_id": project, "created_at": now}
    session.add_all(JobLabel(key=k, value=v, **about) for k, v in spec.labels.items())
    for row in inputs:
        row.job_id = job.id
    session.add_all(inputs)
    session.flush()
    events.record(session, job.id, "job.submitted", now=now, job_kind=job.kind, by=by)
    return job


def submit_once(
    session: Session,
    spec: JobSpec,
    *,
    key: str,
    body_sha256: str,
    project: str,
    by: str,
    now: datetime,
    trace: str | None = None,
) -> tuple[Job, bool]:
    """Submit under a project's idempotency key; the second time: the first job and True.

    Raises:
        SpecInvalid: the key came with another body within the last 24 hours.
        InFlight: another request with this key is being answered.
    """
    known = session.get(IdempotencyKey, (project, key))
    if known is not None and known.created_at > now - REPLAY_FOR:
        if known.body_sha256 != body_sha256:
            raise SpecInvalid("this Idempotency-Key was used with another body; take a new key")
        return get(session, known.job_id), True
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at <= now - REPLAY_FOR))
    job = submit(session, spec, project=project, by=by, now=now, trace=trace)
    values = {
        "project_id": project,
        "key": key,
        "body_sha256": body_sha256,
        "job_id": job.id,
        "created_at": now,
    }
    if not insert_new(session, IdempotencyKey, values):
        raise InFlight("a request with this Idempotency-Key is being answered; send it again")
    return job, False


def get(session: Session, job_id: str, *, project: str | None = None, lock: bool = False) -> Job:
    """Return a job (of ``project``, where one is named) or raise NotFound; ``lock``: to change."""
    # In the query: nobody waits for, or holds, the lock of a foreign job.
    query = _BY_ID if project is None else _OF_PROJECT
    if lock:
        query = query.with_for_update().execution_options(populate_existing=True)
    job = session.scalar(query, {"id": job_id, "project": project})
    if job is None:
        raise NotFound(f"no job {job_id}")
    return job


def list_jobs(
    session: Session,
    *,
    project: str | None = None,
    limit: int,
    cursor: str | None = None,
    state: str | None = None,
    kind: str | None = None,
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> tuple[Sequence[Job], str | None]:
    """Return jobs, newest first, and the cursor of the next page.

    Raises:
        SpecInvalid: the cursor is not one that was given out.
    """
    query, created_at, id_ = select(Job), Job.created_at, Job.id
    asked = ((Job.project_id, project), (Job.state, state), (Job.kind, kind), (Job.name, name))
    for column, wanted in asked:
        if wanted is not None:
            query = query.where(column == wanted)
    for key, value in (labels or {}).items():
        if not LABEL_KEY.fullmatch(key):
            raise SpecInvalid(f"label: the key {key!r}; allowed: {LABEL_KEY.pattern}")
        label = aliased(JobLabel)
        query = query.join(label, label.job_id == Job.id)
        query = query.where(label.key == key, label.value == value)
        if project is not None:
            query = query.where(label.project_id == project)
        # The same values as the job's, in the order of the index that knows the label.
        created_at, id_ = label.created_at, label.job_id
    if cursor is not None:
        at, job_id = _read_cursor(cursor)
        query = query.where(tuple_(created_at, id_) < (at, job_id))
    query = query.order_by(created_at.desc(), id_.desc()).limit(limit + 1)
    found = session.scalars(query).all()
    more = len(found) > limit
    return found[:limit], _make_cursor(found[limit - 1]) if more else None


def _make_cursor(job: Job) -> str:
    return _cursor_at(job.created_at, job.id)


def _cursor_at(at: datetime, job_id: str) -> str:
    return base64.urlsafe_b64encode(f"{at.isoformat()} {job_id}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[datetime, str]:
    try:
        at, job_id = base64.urlsafe_b64decode(cursor.encode()).decode().split(" ")
        instant = datetime.fromisoformat(at).astimezone(UTC)
        if not _ID.fullmatch(job_id) or _cursor_at(instant, job_id) != cursor:
            raise ValueError("made up")
    except (ValueError, OverflowError) as error:
        raise SpecInvalid("cursor: not one that this list gave out", pointer="/cursor") from error
    return instant, job_id
