"""What was made, by which chunk of which job, from what."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.db.models import Artifact, Chunk, Job, JobInput, MetricPoint, Output, Upload
from core.errors import NotFound


def artifact(session: Session, sha256: str, *, project: str | None = None) -> Artifact:
    """Return an artifact or raise NotFound; a project sees only what it made or uploaded."""
    found = session.get(Artifact, sha256)
    if found is None or not (project is None or _sees(session, project, sha256)):
        raise NotFound(f"no artifact {sha256}")
    return found


def _sees(session: Session, project: str, sha256: str) -> bool:
    made = (
        select(Output.job_id)
        .join(Job, Job.id == Output.job_id)
        .where(Output.sha256 == sha256, Job.project_id == project)
    )
    sent = select(Upload.id).where(Upload.artifact == sha256, Upload.project_id == project)
    return any(session.scalar(query.limit(1)) is not None for query in (made, sent))


def outputs_of(session: Session, job_id: str, *, role: str) -> Sequence[tuple[Output, Artifact]]:
    """Return what a job made in a role (``artifact`` or ``checkpoint``), in order."""
    query = (
        select(Output, Artifact)
        .join(Artifact, Artifact.sha256 == Output.sha256)
        .where(Output.job_id == job_id, Output.role == role)
        .order_by(Output.chunk_id, Output.name)
    )
    return [(output, found) for output, found in session.execute(query)]


def produced_by(
    session: Session, sha256: str, *, project: str | None = None
) -> list[dict[str, Any]]:
    """Return every chunk (of a project) that made these bytes, with its job's inputs."""
    query = (
        select(Output, Chunk, Job.kind)
        .join(Chunk, Chunk.id == Output.chunk_id)
        .join(Job, Job.id == Output.job_id)
        .where(Output.sha256 == sha256)
        .order_by(Output.created_at, Output.chunk_id, Output.name)
    )
    if project is not None:
        query = query.where(Job.project_id == project)
    made = session.execute(query).all()
    inputs: dict[str, dict[str, str | None]] = {}
    ids = {output.job_id for output, _, _ in made}
    for row in session.scalars(select(JobInput).where(JobInput.job_id.in_(ids))):
        inputs.setdefault(row.job_id, {})[row.field] = row.sha256
    return [
        {
            "job_id": output.job_id,
            "kind": kind,
            "output": output.name,
            "stage": chunk.stage,
            "chunk": chunk.index,
            "inputs": inputs.get(output.job_id, {}),
        }
        for output, chunk, kind in made
    ]


def uploaded_as(
    session: Session, sha256: str, *, project: str | None = None
) -> list[dict[str, Any]]:
    """Return the uploads that became this artifact; their hashes are of the bytes as sent."""
    query = select(Upload).where(Upload.artifact == sha256).order_by(Upload.created_at)
    if project is not None:
        query = query.where(Upload.project_id == project)
    return [
        {
            "upload_id": row.id,
            "file_name": row.file_name,
            "sha256": row.sha256,
            "notes": row.notes,
        }
        for row in session.scalars(query)
    ]


def metrics_of(session: Session, job_id: str) -> dict[str, list[tuple[int, float]]]:
    """Return a job's curves: name -> [(step, value)], by step."""
    query = (
        select(MetricPoint)
        .where(MetricPoint.job_id == job_id)
        .order_by(MetricPoint.name, MetricPoint.step)
    )
    curves: dict[str, list[tuple[int, float]]] = {}
    for point in session.scalars(query):
        curves.setdefault(point.name, []).append((point.step, point.value))
    return curves
