"""What a finished chunk changes: its files get rows, and what waited for it becomes ready.

Every function works in the transaction that finishes the chunk, under the lock of its job.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from core.db.models import Artifact, CacheEntry, Chunk, Job, Output
from core.db.session import insert_new, insert_or_touch
from core.jobs import events, planning, retention
from core.jobs.states import OPEN_CHUNKS, OVER_CHUNKS, ChunkState, JobState, move


@dataclass(frozen=True)
class Stored:
    """A produced file that is in the store, waiting for its rows."""

    name: str
    role: str
    sha256: str
    size_bytes: int
    format: str
    media_type: str
    file_name: str
    meta: dict[str, Any]
    cache_key: str | None
    cached: bool
    """Found under its cache key, not computed."""
    pinned: bool = False
    """A checkpoint that retention leaves alone."""


def adopt(
    session: Session, job: Job, chunk: Chunk, stored: Sequence[Stored], *, now: datetime
) -> None:
    """Write the rows of a chunk's files, and drop the checkpoints that they make needless."""
    for file in stored:
        _adopt_one(session, chunk, file, now=now)
    job.cache_hits += sum(file.cached for file in stored)
    left = any(file.role == "checkpoint" for file in stored)
    if chunk.chained and left and job.spec.get("keep_checkpoints") != "all":
        retention.drop_earlier(session, chunk)


def _adopt_one(session: Session, chunk: Chunk, file: Stored, *, now: datetime) -> None:
    artifact = {
        "sha256": file.sha256,
        "size_bytes": file.size_bytes,
        "format": file.format,
        "media_type": file.media_type,
        "file_name": file.file_name,
        "meta": file.meta,
        "created_at": now,
    }
    # Touched, so that a sweep which found the row unnamed a moment ago leaves it.
    insert_or_touch(session, Artifact, artifact, touch="created_at")
    output = {
        "chunk_id": chunk.id,
        "name": file.name,
        "job_id": chunk.job_id,
        "role": file.role,
        "sha256": file.sha256,
        "file_name": file.file_name,
        "cached": file.cached,
        "pinned": file.pinned,
        "created_at": now,
    }
    insert_new(session, Output, output)
    if file.cache_key is not None:
        _share(session, file.cache_key, file.sha256, now=now)


def _share(session: Session, key: str, sha256: str, *, now: datetime) -> None:
    """Let any job find these bytes under the key; the first that came stay in force.

    Others (of another device, say) are kept under a key of their own: a list may name them, and
    what has a key outlives its job.
    """
    if insert_new(session, CacheEntry, {"key": key, "sha256": sha256, "created_at": now}):
        return
    if session.get_one(CacheEntry, key).sha256 != sha256:
        own = {"key": f"{key}:{sha256}", "sha256": sha256, "created_at": now}
        insert_new(session, CacheEntry, own)


def advance(session: Session, job: Job, chunk: Chunk, *, stage_done: bool, now: datetime) -> bool:
    """Make ready the chunks that only waited for this one; end the job after the last.

    Returns:
        Whether other workers may have something to do now.
    """
    job.chunks_over += 1
    stage = (Chunk.job_id == job.id, Chunk.stage_index == chunk.stage_index)
    if stage_done:
        job.chunks_over += _change(
            session, *stage, Chunk.state.in_(OPEN_CHUNKS), state=ChunkState.SKIPPED, finished_at=now
        )
    elif chunk.chained:
        make_ready(session, *stage, Chunk.index == chunk.index + 1)
    left = select(Chunk.id).where(*stage, Chunk.state.not_in(OVER_CHUNKS)).limit(1)
    if session.scalar(left) is not None:
        return False
    if ready := open_stage(session, job, chunk.stage_index + 1):
        return ready > 1
    job.stage = None
    if job.spec.get("keep_checkpoints") != "all":
        retention.drop_intermediate(session, job)
    move(session, job, JobState.SUCCEEDED, now=now)
    events.record(session, job.id, "job.succeeded", now=now)
    return planning.on_succeeded(session, job, now=now)


def open_stage(session: Session, job: Job, stage_index: int) -> int:
    """Make a stage's first chunks ready; return how many, 0 where there is no such stage."""
    stage = (Chunk.job_id == job.id, Chunk.stage_index == stage_index)
    ready = make_ready(session, *stage, or_(Chunk.chained.is_(False), Chunk.index == 0))
    if ready:
        job.stage = session.scalars(select(Chunk.stage).where(*stage).limit(1)).one()
    return ready


def make_ready(session: Session, *where: Any) -> int:
    """Make blocked chunks ready and return how many."""
    return _change(session, *where, Chunk.state == ChunkState.BLOCKED, state=ChunkState.READY)


def _change(session: Session, *where: Any, **values: Any) -> int:
    changed = update(Chunk).where(*where).values(**values).returning(Chunk.id)
    # Not looked for among the loaded rows: with thousands of them that is slow.
    return len(session.execute(changed.execution_options(synchronize_session=False)).all())
