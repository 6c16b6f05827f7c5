"""Take, find, show and cancel jobs. Every function works inside the caller's transaction."""

import base64
import binascii
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import String, and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from core.db.models import Chunk, IdempotencyKey, Job
from core.db.session import insert_new
from core.errors import InFlight, NotFound, SpecInvalid
from core.jobs import events, planning
from core.jobs.states import OPEN_CHUNKS, ChunkState, JobState, move
from core.specs.base import LABEL_KEY, JobSpec

REPLAY_FOR = timedelta(hours=24)
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def new_id(prefix: str) -> str:
    """Return ``prefix_`` and 26 random characters (130 bits, Crockford's base 32)."""
    return f"{prefix}_" + "".join(secrets.choice(_ALPHABET) for _ in range(26))


def submit(session: Session, spec: JobSpec, *, now: datetime) -> Job:
    """Insert a job and, where its inputs exist already, its chunks.

    Raises:
        SpecInvalid: a reference is wrong, or the inputs do not fit the spec.
    """
    inputs = planning.resolve(session, spec)
    whole = all(row.sha256 for row in inputs)
    job = Job(
        id=new_id("job"),
        kind=spec.kind,
        name=spec.name,
        spec=spec.model_dump(mode="json"),
        labels=dict(spec.labels),
        priority=spec.priority,
        state=JobState.QUEUED if whole else JobState.WAITING,
        created_at=now,
    )
    session.add(job)
    session.flush()
    for row in inputs:
        row.job_id = job.id
    session.add_all(inputs)
    session.flush()
    events.record(session, job.id, "job.submitted", now=now, job_kind=job.kind)
    if whole:
        planning.plan(session, job, spec, now=now)
    return job


def submit_once(
    session: Session, spec: JobSpec, *, key: str, body_sha256: str, now: datetime
) -> tuple[Job, bool]:
    """Submit under an idempotency key; the second time returns the first job and True.

    Raises:
        SpecInvalid: the key came with another body within the last 24 hours.
        InFlight: another request with this key is being answered.
    """
    known = session.get(IdempotencyKey, key)
    if known is not None and known.created_at > now - REPLAY_FOR:
        if known.body_sha256 != body_sha256:
            raise SpecInvalid("this Idempotency-Key was used with another body; take a new key")
        return get(session, known.job_id), True
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at <= now - REPLAY_FOR))
    job = submit(session, spec, now=now)
    values = {"key": key, "body_sha256": body_sha256, "job_id": job.id, "created_at": now}
    if not insert_new(session, IdempotencyKey, values):
        raise InFlight("a request with this Idempotency-Key is being answered; send it again")
    return job, False


def get(session: Session, job_id: str) -> Job:
    """Return a job or raise NotFound."""
    job = session.get(Job, job_id)
    if job is None:
        raise NotFound(f"no job {job_id}")
    return job


def list_jobs(
    session: Session,
    *,
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
    query = select(Job).order_by(Job.created_at.desc(), Job.id.desc()).limit(limit + 1)
    for column, wanted in ((Job.state, state), (Job.kind, kind), (Job.name, name)):
        if wanted is not None:
            query = query.where(column == wanted)
    for key, value in (labels or {}).items():
        if not LABEL_KEY.fullmatch(key):
            raise SpecInvalid(f"label: the key {key!r}; allowed: {LABEL_KEY.pattern}")
        query = query.where(Job.labels[key].as_string().cast(String) == value)
    if cursor is not None:
        at, job_id = _read_cursor(cursor)
        query = query.where(or_(Job.created_at < at, and_(Job.created_at == at, Job.id < job_id)))
    found = session.scalars(query).all()
    more = len(found) > limit
    return found[:limit], _make_cursor(found[limit - 1]) if more else None


def _make_cursor(job: Job) -> str:
    return base64.urlsafe_b64encode(f"{job.created_at.isoformat()} {job.id}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[datetime, str]:
    try:
        at, job_id = base64.urlsafe_b64decode(cursor.encode()).decode().split(" ")
        instant = datetime.fromisoformat(at).astimezone(UTC)
    except (ValueError, OverflowError, binascii.Error) as error:
        raise SpecInvalid("cursor: not one that this list gave out", pointer="/cursor") from error
    return instant, job_id


def cancel(session: Session, job_id: str, *, now: datetime) -> Job:
    """Stop a job: at once where nothing runs, else as soon as the running chunk notices.

    Raises:
        Conflict: the job is over.
    """
    job = session.get(Job, job_id, with_for_update=True)
    if job is None:
        raise NotFound(f"no job {job_id}")
    planning.check_open(job)
    if job.state == JobState.CANCELLING:
        return job
    running = select(func.count()).where(Chunk.job_id == job_id, Chunk.state == ChunkState.RUNNING)
    if not session.scalar(running):
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
