"""Every table, on one page."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

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


def _only(condition: str) -> dict[str, Any]:
    """Return what makes an index hold only the rows of which this is true."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


_DUE = "finished_at IS NULL AND deadline_at IS NOT NULL"


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


class Project(Base):
    """Who shares the pool. ``usage`` is device time in seconds, decayed as of ``usage_at``."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    weight: Mapped[float] = mapped_column(default=1.0)
    running_limit: Mapped[int | None]
    """Of chunks at once; null: none."""
    queued_limit: Mapped[int | None]
    """Of jobs that are not over."""
    storage_limit_bytes: Mapped[int | None]
    usage: Mapped[float] = mapped_column(default=0.0)
    usage_at: Mapped[datetime]
    made_bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    """Of what it made or sent, as counted at ``made_at``; only where storage has a limit."""
    made_at: Mapped[datetime | None]
    created_at: Mapped[datetime]


class ApiKey(Base):
    """What proves who asks: only an HMAC of the secret is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    prefix: Mapped[str]
    """The first characters of the key, to know it by."""
    digest: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[str]] = mapped_column(JSON())
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class AuditEntry(Base):
    """Who changed what, and when; written with the change."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    at: Mapped[datetime]
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    actor: Mapped[str]
    """The id of the key, or ``local``."""
    action: Mapped[str]
    target: Mapped[str]
    data: Mapped[dict[str, Any]]
    __table_args__ = (Index(None, "project_id", "id"), {"sqlite_autoincrement": True})


class Job(Base):
    """A spec with a life. What sums up its chunks is kept here, under the lock of this row."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    kind: Mapped[str]
    name: Mapped[str | None]
    spec: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, Any]]
    rank: Mapped[int]
    """100 - priority: the queue's index runs one way only."""
    state: Mapped[str]
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    submitted_by: Mapped[str | None]
    """The id of a key, or ``local``."""
    retry_of: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    """The job that this one goes on with."""
    trace: Mapped[str | None]
    """W3C traceparent of the request that submitted it."""
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    deadline_at: Mapped[datetime | None]
    stage: Mapped[str | None]
    """The stage that runs or comes next."""
    chunks: Mapped[int | None]
    """Null until planned."""
    chunks_over: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    device_seconds: Mapped[float] = mapped_column(default=0.0)
    cache_hits: Mapped[int] = mapped_column(default=0)
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "project_id", "kind", "state", "created_at", "id"),
        Index(None, "project_id", "state", "created_at", "id"),
        Index(None, "project_id", "kind", "created_at", "id"),
        Index(None, "project_id", "name", "created_at", "id"),
        Index(
            "ix_jobs_queue",
            *("project_id", "rank", "created_at", "id"),
            **_only("state IN ('queued', 'running')"),
        ),
        Index("ix_jobs_deadline", "deadline_at", **_only(_DUE)),
        Index("ix_jobs_open", "state", "project_id", **_only("finished_at IS NULL")),
        # What the figures sum up lies in the index itself; a job enters it once, when it is over.
        Index(
            "ix_jobs_over",
            *("project_id", "kind", "state", "device_seconds", "attempts", "cache_hits"),
            **_only("finished_at IS NOT NULL"),
        ),
    )

    @hybrid_property
    def priority(self) -> int:
        """From 0 to 100, the highest first."""
        return 100 - self.rank


class JobLabel(Base):
    """A label of a job once more, where a list finds it; project and instant are the job's."""

    __tablename__ = "job_labels"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]
    project_id: Mapped[str]
    created_at: Mapped[datetime]
    __table_args__ = (
        Index("ix_job_labels_list", "project_id", "key", "value", "created_at", "job_id"),
    )


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
    device: Mapped[str | None]
    """The kind it asks for, cpu or gpu; null: any."""
    memory_bytes: Mapped[int] = mapped_column(default=0)
    """Of the device, at least."""
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[dict[str, Any]] = mapped_column(JSON(), default=dict)
    """Error code -> how many attempts it ended."""
    failed_on: Mapped[str | None]
    """The node of the last failure: another may try at once, the same one from ``retry_at``."""
    retry_at: Mapped[datetime | None]
    owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    score: Mapped[float | None]
    """How good its checkpoint is; the lowest of a stage is kept."""
    progress: Mapped[float] = mapped_column(default=0.0)
    seconds: Mapped[float] = mapped_column(default=0.0)
    """Device time of all attempts."""
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    __table_args__ = (
        UniqueConstraint("job_id", "stage_index", "index"),
        Index(
            "ix_chunks_ready",
            "job_id",
            "stage_index",
            "index",
            **_only("state = 'ready'"),
        ),
        Index("ix_chunks_running", "lease_until", **_only("state = 'running'")),
        Index(
            "ix_chunks_open",
            "job_id",
            "stage_index",
            "index",
            **_only("state NOT IN ('done', 'skipped')"),
        ),
    )


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
    __table_args__ = (Index("ix_artifacts_size", "sha256", "size_bytes"),)


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
    pinned: Mapped[bool] = mapped_column(default=False)
    """A checkpoint that retention leaves alone."""
    created_at: Mapped[datetime]
    __table_args__ = (Index("ix_outputs_checkpoints", "sha256", **_only("role = 'checkpoint'")),)


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
    __table_args__ = (
        Index(None, "job_id", "id"),
        Index("ix_events_failed", "id", **_only("type = 'chunk.failed'")),
        {"sqlite_autoincrement": True},
    )


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
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
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
    __table_args__ = (Index(None, "project_id", "created_at"),)


class IdempotencyKey(Base):
    """A POST that was answered, so that sending it again answers the same."""

    __tablename__ = "idempotency_keys"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime] = mapped_column(index=True)


class ServiceFact(Base):
    """What must not change under a running service: ``store_id`` names the blobs' folder."""

    __tablename__ = "service_facts"

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class Node(Base):
    """A place that workers start on again and again: what is known of it outlives them."""

    __tablename__ = "nodes"

    id: Mapped[str] = mapped_column(primary_key=True)
    """``host:device``."""
    state: Mapped[str] = mapped_column(default="active")
    """active; draining (finishes its chunk, takes no other); excluded (failed too often)."""
    note: Mapped[str | None]
    """Why it is not active."""
    blamed: Mapped[int] = mapped_column(default=0)
    """Chunks that failed here and succeeded elsewhere, since the last that succeeded here."""
    updated_at: Mapped[datetime]


class Worker(Base):
    """A process that runs chunks on one device, and when it was last heard of."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    node_id: Mapped[str] = mapped_column(ForeignKey("nodes.id"))
    device: Mapped[str]
    """``cpu`` or ``cuda:0``."""
    kind: Mapped[str]
    """``cpu`` or ``gpu``: its pool."""
    memory_bytes: Mapped[int]
    threads: Mapped[int]
    busy_seconds: Mapped[float] = mapped_column(default=0.0)
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
