"""Every table, on one page."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    ForeignKey,
    Index,
    MetaData,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import Integer

BigId = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself only for INTEGER."""


class Instant(TypeDecorator[datetime]):
    """An aware datetime in UTC; SQLite forgets the zone, so it is put back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store in UTC."""
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Read as UTC."""
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: Instant(), dict[str, Any]: JSON(), int: BigInteger()}  # noqa: RUF012


class Job(Base):
    """A spec with a life."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str | None]
    spec: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, Any]]
    priority: Mapped[int]
    state: Mapped[str]
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "created_at", "id"), Index(None, "state", "created_at"))


class JobInput(Base):
    """What a spec field names: an artifact, or an output that another job has yet to make."""

    __tablename__ = "job_inputs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    field: Mapped[str] = mapped_column(primary_key=True)
    upstream_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    upstream_output: Mapped[str | None]
    sha256: Mapped[str | None] = mapped_column(ForeignKey("artifacts.sha256"), index=True)


class Chunk(Base):
    """One piece of a job that a worker runs at a time. ``attempt`` is the fencing token."""

    __tablename__ = "chunks"

    id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    stage: Mapped[str]
    stage_index: Mapped[int]
    index: Mapped[int]
    chained: Mapped[bool]
    state: Mapped[str]
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    progress: Mapped[float] = mapped_column(default=0.0)
    seconds: Mapped[float] = mapped_column(default=0.0)
    """Device time of all attempts."""
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    __table_args__ = (UniqueConstraint("job_id", "stage_index", "index"), Index(None, "state"))


class Artifact(Base):
    """A stored file under the hash of its bytes; ``meta`` is a function of those bytes."""

    __tablename__ = "artifacts"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    size_bytes: Mapped[int]
    format: Mapped[str]
    media_type: Mapped[str]
    file_name: Mapped[str]
    meta: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class Output(Base):
    """Who made an artifact: the lineage. ``role`` is artifact or checkpoint."""

    __tablename__ = "outputs"

    chunk_id: Mapped[int] = mapped_column(BigId, ForeignKey("chunks.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    role: Mapped[str]
    sha256: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"), index=True)
    file_name: Mapped[str]
    cached: Mapped[bool]
    """Found under its cache key, not computed."""
    created_at: Mapped[datetime]


class CacheEntry(Base):
    """The same work in any job finds these bytes again."""

    __tablename__ = "cache_entries"

    key: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"), index=True)
    created_at: Mapped[datetime]


class Event(Base):
    """What happened to a job, in order; ids only rise."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    type: Mapped[str]
    data: Mapped[dict[str, Any]]
    at: Mapped[datetime]
    __table_args__ = (Index(None, "job_id", "id"), {"sqlite_autoincrement": True})


class MetricPoint(Base):
    """One point of a curve; written with the chunk that measured it, once."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[float]


class Upload(Base):
    """A file on its way in."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(primary_key=True)
    file_name: Mapped[str]
    size_bytes: Mapped[int]
    sha256: Mapped[str]
    state: Mapped[str]
    artifact: Mapped[str | None] = mapped_column(ForeignKey("artifacts.sha256"), index=True)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    notes: Mapped[list[str]] = mapped_column(JSON(), default=list)
    """What the import left out or mended, in words."""
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class IdempotencyKey(Base):
    """A POST that was answered, so that sending it again answers the same."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime]


class ServiceFact(Base):
    """What must not change under a running service: ``store_id`` names the blobs' folder."""

    __tablename__ = "service_facts"

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class Worker(Base):
    """A process that runs chunks, and when it was last heard of."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str]
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
