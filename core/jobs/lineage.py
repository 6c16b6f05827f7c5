"""What was made, by which chunk of which job, from what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import literal, select, union_all
from sqlalchemy.orm import Session

from core.artifacts.sandbox import canonical_name
from core.db.models import Artifact, Chunk, Job, JobInput, MetricPoint, Output, Upload
from core.errors import NotFound


@dataclass(frozen=True)
class Seen:
    """An artifact as one project knows it: name and time are those of its own first row."""

    sha256: str
    format: str
    file_name: str
    media_type: str
    size_bytes: int
    meta: Mapping[str, Any]
    created_at: datetime


def artifact(session: Session, sha256: str, *, project: str) -> Seen:
    """Return what a project made or uploaded, or raise NotFound."""
    made = (
        select(Output.file_name, Output.created_at.label("at"), literal("made").label("how"))
        .join(Job, Job.id == Output.job_id)
        .where(Output.sha256 == sha256, Job.project_id == project)
    )
    sent = select(Upload.file_name, Upload.updated_at.label("at"), literal("sent").label("how"))
    own = union_all(made, sent.where(Upload.artifact == sha256, Upload.project_id == project))
    # Asked before the shared row, so that what another project has takes as long as what is not
    # there; that row's own name and time are of whoever was first of all.
    first = session.execute(own.order_by("at", "how").limit(1)).one_or_none()
    if first is None:
        raise NotFound(f"no artifact {sha256}")
    row = session.get_one(Artifact, sha256)
    return Seen(
        sha256=sha256,
        format=row.format,
        file_name=first.file_name if first.how == "made" else canonical_name(first.file_name),
        media_type=row.media_type,
        size_bytes=row.size_bytes,
        meta=row.meta,
        created_at=first.at,
    )


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
