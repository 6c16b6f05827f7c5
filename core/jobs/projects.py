"""Projects: who shares the pool, up to which limits, and how much of them is in use."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select, union
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.db.models import Artifact, Chunk, Job, Output, Project, Upload
from core.db.session import insert_new
from core.errors import Conflict, NotFound, QuotaExceeded, SpecInvalid, StorageFull
from core.jobs.ids import new_id
from core.jobs.states import ChunkState

PREFIX = "prj"
FIRST_PROJECT = "prj_default"
"""Made with the database; the operator's key and whoever needs none work in it."""
LIMITS = ("running_limit", "queued_limit", "storage_limit_bytes")
RECOUNTED_AFTER = timedelta(seconds=30)
UNFINISHED = ("open", "importing")


@dataclass(frozen=True)
class Use:
    """What a project holds at this moment."""

    running_chunks: int
    queued_jobs: int
    """Not over yet, the running ones included."""
    storage_bytes: int
    """Of its artifacts, each counted once, and of what is being uploaded."""


def create(
    session: Session,
    *,
    name: str,
    weight: float = 1.0,
    running_limit: int | None = None,
    queued_limit: int | None = None,
    storage_limit_bytes: int | None = None,
    now: datetime,
) -> Project:
    """Make a project.

    Raises:
        Conflict: the name is taken.
        SpecInvalid: the weight or a limit is out of range.
    """
    values = {
        "name": name,
        "weight": weight,
        "running_limit": running_limit,
        "queued_limit": queued_limit,
        "storage_limit_bytes": storage_limit_bytes,
    }
    _check(values)
    project_id = new_id(PREFIX)
    row = {"id": project_id, "usage": 0.0, "usage_at": now, "created_at": now, **values}
    if not insert_new(session, Project, row):
        raise _taken(name)
    return session.get_one(Project, project_id)


def change(session: Session, project_id: str, *, values: Mapping[str, Any]) -> Project:
    """Set some of name, weight and the limits; a limit of None means none.

    Raises:
        NotFound, Conflict (the name is taken), SpecInvalid (a value is out of range).
    """
    _check(values)
    project = session.get(Project, project_id, with_for_update={"key_share": True})
    if project is None:
        raise NotFound(f"no project {project_id}")
    try:
        with session.begin_nested():
            for field, value in values.items():
                setattr(project, field, value)
            session.flush()
    except IntegrityError:
        raise _taken(str(values.get("name"))) from None
    return project


def _taken(name: str) -> Conflict:
    return Conflict(f"a project named {name!r} exists; take another name", pointer="/name")


def _check(values: Mapping[str, Any]) -> None:
    weight = values.get("weight", 1.0)
    if not (math.isfinite(weight) and weight > 0):
        raise SpecInvalid(f"weight: {weight}; allowed: any number above 0", pointer="/weight")
    name = values.get("name") or ""
    if name.startswith(f"{PREFIX}_"):
        told = f"name: {name!r} looks like an id; allowed: what does not begin with '{PREFIX}_'"
        raise SpecInvalid(told, pointer="/name")
    for field in LIMITS:
        limit = values.get(field)
        if limit is not None and limit < 0:
            raise SpecInvalid(f"{field}: {limit}; allowed: 0 or more, or null", pointer=f"/{field}")


def get(session: Session, project_id: str) -> Project:
    """Return a project or raise NotFound."""
    project = session.get(Project, project_id)
    if project is None:
        raise NotFound(f"no project {project_id}")
    return project


def list_projects(session: Session) -> Sequence[Project]:
    """Return every project, by name."""
    return session.scalars(select(Project).order_by(Project.name)).all()


def use_of(session: Session, project_id: str) -> Use:
    """Return what a project holds at this moment."""
    running = (
        select(func.count())
        .select_from(Chunk)
        .join(Job, Job.id == Chunk.job_id)
        .where(Chunk.state == ChunkState.RUNNING, Job.project_id == project_id)
    )
    return Use(
        running_chunks=session.scalar(running) or 0,
        queued_jobs=_queued(session, project_id),
        storage_bytes=storage_bytes(session, project_id),
    )


def _queued(session: Session, project_id: str) -> int:
    query = select(func.count()).where(Job.project_id == project_id, Job.finished_at.is_(None))
    return session.scalar(query) or 0


def storage_bytes(session: Session, project_id: str) -> int:
    """Return the bytes of what a project made or sent, each artifact once, and of open uploads."""
    return _made_bytes(session, project_id) + _coming_bytes(session, project_id)


def _made_bytes(session: Session, project_id: str) -> int:
    made = select(Output.sha256).join(Job, Job.id == Output.job_id)
    sent = select(Upload.artifact).where(Upload.artifact.is_not(None))
    held: Any = union(
        made.where(Job.project_id == project_id), sent.where(Upload.project_id == project_id)
    )
    stored = select(func.sum(Artifact.size_bytes)).where(Artifact.sha256.in_(held))
    return int(session.scalar(stored) or 0)  # SUM of BIGINT is a Decimal in PostgreSQL


def _coming_bytes(session: Session, project_id: str) -> int:
    coming = select(func.sum(Upload.size_bytes)).where(
        Upload.project_id == project_id, Upload.state.in_(UNFINISHED)
    )
    return int(session.scalar(coming) or 0)


def check_queue(session: Session, project_id: str) -> None:
    """Refuse one job more where the project is at its limit of jobs that are not over.

    Where there is a limit, locks the project until the transaction ends, so that two requests
    cannot both take the last place: call it after the locks on jobs, as `shares.charge` is.

    Raises:
        QuotaExceeded: names the limit, what is in use and what to do.
    """
    project = _limited(session, project_id, "queued_limit")
    if project is None or project.queued_limit is None:
        return
    found = _queued(session, project_id)
    if found >= project.queued_limit:
        raise QuotaExceeded(
            f"queued_limit: project {project.name!r} has {found} jobs that are not over, of "
            f"{project.queued_limit} allowed; wait for one, cancel one, or have the limit raised"
        )


def check_storage(
    session: Session, project_id: str, *, now: datetime, adding_bytes: int = 0
) -> None:
    """Refuse more where the project would pass its limit of stored bytes, or is at it.

    Locks as `check_queue` does. What the project holds is counted anew where bytes are added, else
    twice a minute at most: counting walks through all that it ever made.

    Raises:
        StorageFull: names the limit, what is in use and what to do.
    """
    project = _limited(session, project_id, "storage_limit_bytes")
    if project is None or project.storage_limit_bytes is None:
        return
    counted = project.made_at
    if adding_bytes or counted is None or not timedelta(0) <= now - counted < RECOUNTED_AFTER:
        project.made_bytes, project.made_at = _made_bytes(session, project_id), now
    found = project.made_bytes + _coming_bytes(session, project_id)
    if found + max(adding_bytes, 1) > project.storage_limit_bytes:
        more = f" and this would add {adding_bytes}" if adding_bytes else ""
        raise StorageFull(
            f"storage_limit_bytes: project {project.name!r} holds {found} bytes, of "
            f"{project.storage_limit_bytes} allowed{more}; discard uploads that are not finished, "
            "or have the limit raised"
        )


def _limited(session: Session, project_id: str, limit: str) -> Project | None:
    """Return the project, locked, where it has that limit."""
    if getattr(get(session, project_id), limit) is None:
        return None
    return session.get_one(
        Project, project_id, with_for_update={"key_share": True}, populate_existing=True
    )
