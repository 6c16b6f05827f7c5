"""What tests do to jobs, through the product's own functions, each in its own transaction."""

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import Engine

from api.views import JobView
from core.artifacts.store import Blob
from core.db.models import Artifact, Upload
from core.db.session import glancing, insert_new, reading, transaction
from core.errors import StillroomError
from core.jobs import lease, recovery, scheduler, service, status
from core.jobs.adoption import Stored
from core.jobs.ids import new_id
from core.jobs.lease import Claim, Rules
from core.jobs.pool import Place
from core.jobs.scheduler import Candidate
from core.jobs.status import JobStatus
from core.jobs.waiting import Outlook
from core.kinds._base import kinds

Now = Callable[[], datetime]
PROJECT = "prj_default"
BY = "local"
RULES = Rules()
GIB = 2**30


def place(node: str = "host:w1", device: str = "cpu", memory_bytes: int = 1 << 40) -> Place:
    return Place(node=node, device=device, memory_bytes=memory_bytes)


def submit(engine: Engine, now: Now, *, project: str = PROJECT, **fields: Any) -> str:
    """Submit an echo job, or whatever ``kind`` says."""
    asked = {"kind": "echo", **fields}
    if asked["kind"] == "echo":
        asked.setdefault("text", "hi")
    spec = kinds()[asked["kind"]].spec.model_validate(asked)
    with transaction(engine) as session:
        return service.submit(session, spec, project=project, by=BY, now=now()).id


def uploaded(
    engine: Engine,
    blob: Blob,
    now: Now,
    *,
    format_name: str,
    meta: dict[str, Any],
    project: str = PROJECT,
) -> str:
    """Write the rows of a file that is in the store, as an upload's end does."""
    artifact = {
        "sha256": blob.sha256,
        "size_bytes": blob.size_bytes,
        "format": format_name,
        "media_type": "application/octet-stream",
        "file_name": "file.safetensors",
        "meta": meta,
        "created_at": now(),
    }
    with transaction(engine) as session:
        insert_new(session, Artifact, artifact)
        session.add(
            Upload(
                id=new_id("up"),
                project_id=project,
                file_name="file.npz",
                size_bytes=blob.size_bytes,
                sha256=blob.sha256,
                state="complete",
                artifact=blob.sha256,
                created_at=now(),
                updated_at=now(),
            )
        )
    return blob.sha256


def pick(engine: Engine, now: Now, *, at: Place | None = None) -> Candidate | None:
    with reading(engine) as session:
        return scheduler.pick(session, at or place(), now=now(), fairness=RULES.fairness)


def try_claim(
    engine: Engine, now: Now, owner: str = "w1", *, at: Place | None = None, rules: Rules = RULES
) -> Claim | None:
    at = at or place(node=f"host:{owner}")
    with transaction(engine) as session:
        best = scheduler.pick(session, at, now=now(), fairness=rules.fairness, lock=True)
        if best is None:
            return None
        return lease.claim(session, best, owner=owner, place=at, now=now(), rules=rules)


def claim(
    engine: Engine, now: Now, owner: str = "w1", *, at: Place | None = None, rules: Rules = RULES
) -> Claim:
    found = try_claim(engine, now, owner, at=at, rules=rules)
    assert found is not None
    return found


def finish(
    engine: Engine,
    claimed: Claim,
    now: Now,
    *stored: Stored,
    score: float | None = None,
    stage_done: bool = False,
) -> bool:
    with transaction(engine) as session:
        return lease.finish(
            session,
            claimed,
            stored=stored,
            metrics=(),
            stage_done=stage_done,
            score=score,
            now=now(),
            rules=RULES,
        )


def give_up(
    engine: Engine, claimed: Claim, error: StillroomError, now: Now, rules: Rules = RULES
) -> None:
    with transaction(engine) as session:
        lease.give_up(session, claimed, error, now=now(), rules=rules)


def release(engine: Engine, now: Now, rules: Rules = RULES) -> int:
    return recovery.release_expired(engine, now=now(), rules=rules)


def state(engine: Engine, job_id: str) -> str:
    with reading(engine) as session:
        return service.get(session, job_id).state


def shown(engine: Engine, job_id: str, now: Now) -> JobStatus:
    """The status as a look at this one job shows it; a glance at it says the same or nothing."""
    at = now()
    with reading(engine) as session:
        job = service.get(session, job_id)
        ahead = partial(Outlook(session, now=at, fairness=RULES.fairness).ahead, job)
        told = status.describe_one(session, job, now=at, ahead=ahead)
        view = JobView.of(job, told)
        [seen] = status.glance(session.connection(), [job_id])
        glanced = seen.status(now=at)
        assert glanced is None or JobView.of(seen.job, glanced) == view
    assert glance(engine, job_id, at) == glanced
    return told


def glance(engine: Engine, job_id: str, at: datetime) -> JobStatus | None:
    with glancing(engine) as connection:
        found = status.glance(connection, [job_id])
    return found[0].status(now=at) if found else None


def some_file(sha256: str = "a" * 64, *, name: str = "text", role: str = "artifact") -> Stored:
    return Stored(
        name=name,
        role=role,
        sha256=sha256,
        size_bytes=1,
        format="text",
        media_type="text/plain",
        file_name="echo.txt",
        meta={},
        cache_key=None,
        cached=False,
    )
