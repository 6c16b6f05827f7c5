"""What is left of what chunks made for later chunks: retention takes the rest."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.db.models import Artifact, Chunk, Output


def kept(
    session: Session, job_id: str, *, stage: str | None = None, index: int | None = None
) -> Sequence[tuple[Output, Artifact, Chunk]]:
    """Return a job's checkpoints in the order of its chunks, all or those of one chunk."""
    query = (
        select(Output, Artifact, Chunk)
        .join(Artifact, Artifact.sha256 == Output.sha256)
        .join(Chunk, Chunk.id == Output.chunk_id)
        .where(Output.job_id == job_id, Output.role == "checkpoint")
        .order_by(Chunk.stage_index, Chunk.index, Output.name)
    )
    if stage is not None:
        query = query.where(Chunk.stage == stage)
    if index is not None:
        query = query.where(Chunk.index == index)
    return [(output, found, chunk) for output, found, chunk in session.execute(query)]
