"""Which checkpoints are kept: of a chain the best, the latest and the pinned ones.

Only rows go here; bytes that no row names any more are taken by the sweep. What the job offers its
user (role artifact) never expires by itself.
"""

from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session, aliased

from core.db.models import CacheEntry, Chunk, Job, Output


def drop_earlier(session: Session, chunk: Chunk) -> None:
    """Forget a chain's checkpoints before ``chunk``, but for the best and the pinned ones."""
    scored = aliased(Chunk)
    best = (
        select(scored.id)
        .where(
            scored.job_id == chunk.job_id,
            scored.stage_index == chunk.stage_index,
            scored.score.is_not(None),
        )
        .order_by(scored.score, scored.index)
        .limit(1)
        .scalar_subquery()
    )
    earlier = select(Chunk.id).where(
        Chunk.id == Output.chunk_id,
        Chunk.stage_index == chunk.stage_index,
        Chunk.index < chunk.index,
        Chunk.id.is_distinct_from(best),
    )
    _drop(session, Output.job_id == chunk.job_id, earlier.exists())


def drop_intermediate(session: Session, job: Job) -> None:
    """Forget what the fanned stages of a finished job left for later stages.

    What lies under a cache key stays: any other job may find it. With a retry, the jobs that it
    goes on with are over for good too.
    """
    fanned = select(Chunk.id).where(Chunk.id == Output.chunk_id, Chunk.chained.is_(False))
    shared = select(CacheEntry.key).where(CacheEntry.sha256 == Output.sha256)
    line = [job]
    while (before := line[-1].retry_of) is not None:
        line.append(session.get_one(Job, before))
    for one in line:
        if one is job or one.spec.get("keep_checkpoints") != "all":
            _drop(session, Output.job_id == one.id, fanned.exists(), ~shared.exists())


def _drop(session: Session, *where: Any) -> None:
    session.execute(
        delete(Output)
        .where(Output.role == "checkpoint", Output.pinned.is_(False), *where)
        .execution_options(synchronize_session=False)
    )
