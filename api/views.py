"""What the API shows. The docstrings and descriptions here are the API reference."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from api.specs import AnySpec as AnySpec
from core.db.models import Artifact, Event, Job, Output, Upload, Worker
from core.jobs.lineage import Seen
from core.jobs.states import JobState
from core.jobs.status import JobStatus
from core.kinds._base import Kind
from core.specs.base import inputs_of

Sha256 = Annotated[
    str,
    Field(
        description="SHA-256 of the bytes, 64 lower-case hexadecimal digits.",
        examples=["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"],
    ),
]
JobId = Annotated[str, Field(examples=["job_01j8z3k4m5n6p7q8r9s0t1v2wx"])]


class View(BaseModel):
    """Base of everything shown; built from rows and dataclasses by attribute."""

    model_config = ConfigDict(from_attributes=True, frozen=True)


class ProgressView(View):
    """How far a job is, counted in chunks."""

    done: float = Field(description="Chunks finished; a running chunk counts by its fraction.")
    total: int | None = Field(description="Null while the job waits for another job's output.")
    fraction: float = Field(description="From 0 to 1.")
    stage: str | None = Field(description="The stage that runs or comes next.")
    rate: float | None = Field(description="Chunks per second since the job started.")
    eta_s: float | None = Field(description="Seconds left at that rate.")


class ChunkView(View):
    """Which chunk."""

    stage: str
    index: int


class ErrorView(View):
    """Why a job failed."""

    code: str
    message: str
    retryable: bool = False
    chunk: ChunkView | None = None


class InputView(View):
    """An input: an artifact, or the output of another job that will be one."""

    sha256: str | None = Field(description="Null while the other job has not made it.")
    job_id: str | None = None
    output: str | None = None


class JobView(View):
    """A job: what was asked, how it stands, what it made."""

    id: JobId
    kind: str
    name: str | None
    state: JobState = Field(
        description="waiting (for another job's output), queued, running, pausing, paused, "
        "cancelling, succeeded, failed, cancelled. The last three are final."
    )
    priority: int
    labels: dict[str, str]
    spec: dict[str, Any] = Field(
        description="As submitted, defaults filled in; priority and name may have changed since."
    )
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    deadline_at: datetime | None = Field(description="It fails where it is not done by then.")
    retry_of: str | None = Field(description="The job that this one goes on with.")
    submitted_by: str | None = Field(description="The id of a key, `operator` or `local`.")
    progress: ProgressView
    queue_position: int | None = Field(
        description="In its project's queue; 1 runs next. Null in lists, and in the answer to a "
        "submission behind a long queue."
    )
    waits_for: str | None = Field(description="A sentence: why it is not running; short in lists.")
    predicted_start_at: datetime | None = Field(description="A guess; null in lists.")
    error: ErrorView | None
    attempts: int = Field(description="Chunk attempts so far, retries included.")
    device_seconds: float = Field(description="Time that chunks held a device.")
    cache_hits: int = Field(description="Outputs found in the cache instead of computed.")
    inputs: dict[str, InputView]
    artifacts: dict[str, str] = Field(description="Output name -> SHA-256.")

    @classmethod
    def of(cls, job: Job, status: JobStatus) -> "JobView":
        """Join a row with its status."""
        columns = {name: getattr(job, name) for name in _JOB_COLUMNS}
        rest = {name: getattr(status, name) for name in cls.model_fields.keys() - columns.keys()}
        return cls.model_validate({**columns, **rest})


_JOB_COLUMNS = (
    "id", "kind", "name", "state", "priority", "labels", "spec",
    "created_at", "started_at", "finished_at", "deadline_at", "retry_of", "submitted_by", "error",
    "attempts", "device_seconds", "cache_hits",
)  # fmt: skip


class JobPage(View):
    """Jobs, newest first."""

    items: list[JobView]
    next_cursor: str | None = Field(description="Give as ?cursor= for the next page; null: last.")


class EventView(View):
    """Something that happened to a job."""

    id: int = Field(description="Rises with time; give as ?after= or Last-Event-ID to go on.")
    job_id: str
    type: str = Field(examples=["job.submitted", "chunk.done", "job.succeeded"])
    at: datetime
    data: dict[str, Any]

    @classmethod
    def of(cls, event: Event) -> "EventView":
        """Show a row."""
        return cls.model_validate(event)


class EventPage(View):
    """Events in order."""

    items: list[EventView]
    next_after: int | None = Field(description="Give as ?after= for more; null: none yet.")


class MetricsView(View):
    """Curves: name -> [[step, value], ...]."""

    metrics: dict[str, list[tuple[int, float]]]


class OutputView(View):
    """A file that a job made, under the job's name for it."""

    name: str
    role: str = Field(description="artifact, or checkpoint (read by later chunks of the job).")
    sha256: Sha256
    format: str
    file_name: str
    media_type: str
    size_bytes: int
    meta: dict[str, Any]
    created_at: datetime

    @classmethod
    def of(cls, output: Output, artifact: Artifact) -> "OutputView":
        """Join what the job calls it with what it is."""
        return cls(
            name=output.name,
            role=output.role,
            sha256=output.sha256,
            format=artifact.format,
            file_name=output.file_name,
            media_type=artifact.media_type,
            size_bytes=artifact.size_bytes,
            meta=artifact.meta,
            created_at=output.created_at,
        )


class OutputPage(View):
    """Everything a job made in one role."""

    items: list[OutputView]


class ProducedView(View):
    """A chunk that made these bytes, and from what."""

    job_id: str
    kind: str
    output: str
    stage: str
    chunk: int
    inputs: dict[str, str | None] = Field(description="Spec field -> SHA-256 it was made from.")


class UploadedView(View):
    """An upload that became this artifact; its SHA-256 is that of the bytes as sent."""

    upload_id: str
    file_name: str
    sha256: str
    notes: list[str] = Field(description="What the import left out or mended, in words.")


class ArtifactView(View):
    """A stored file with its lineage."""

    sha256: Sha256
    format: str
    file_name: str
    media_type: str
    size_bytes: int
    meta: dict[str, Any] = Field(description="Facts such as rows, dim, clusters.")
    created_at: datetime
    produced_by: list[ProducedView]
    uploaded_as: list[UploadedView]

    @classmethod
    def of(
        cls,
        artifact: Seen,
        *,
        produced_by: Iterable[Mapping[str, Any]],
        uploaded_as: Iterable[Mapping[str, Any]],
    ) -> "ArtifactView":
        """Join what the project sees of it with its lineage."""
        names = cls.model_fields.keys() - {"produced_by", "uploaded_as"}
        own = {name: getattr(artifact, name) for name in names}
        lineage = {"produced_by": list(produced_by), "uploaded_as": list(uploaded_as)}
        return cls.model_validate({**own, **lineage})


class UploadAsked(BaseModel):
    """A file to come: its name, its size and the SHA-256 its bytes will have."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"file_name": "pairs.npz", "size_bytes": 1024, "sha256": "9f86" * 16}]
        },
    )

    file_name: str = Field(min_length=1, max_length=255, description="Shown only; never a path.")
    size_bytes: int = Field(ge=1, le=2**53)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class UploadView(View):
    """A file on its way in."""

    id: str
    state: str = Field(description="open, importing, complete or failed.")
    file_name: str
    size_bytes: int
    sha256: str
    created_at: datetime
    received_bytes: int = Field(description="Send the next part with this as Upload-Offset.")
    part_limit_bytes: int = Field(description="The largest part taken by one PATCH.")
    artifact: str | None = Field(description="The SHA-256 of what it became.")
    notes: list[str] = Field(description="What the import left out or mended, in words.")
    error: dict[str, Any] | None

    @classmethod
    def of(cls, upload: Upload, *, received_bytes: int, part_limit_bytes: int) -> "UploadView":
        """Join a row with what is on disk and the limit."""
        facts = {"received_bytes": received_bytes, "part_limit_bytes": part_limit_bytes}
        names = cls.model_fields.keys() - facts.keys()
        return cls.model_validate({**{name: getattr(upload, name) for name in names}, **facts})


class UploadPage(View):
    """Uploads, newest first."""

    items: list[UploadView]


class KindView(View):
    """A sort of job: what it asks for, what it reads, what it makes."""

    model_config = ConfigDict(serialize_by_alias=True, frozen=True)

    kind: str
    summary: str
    spec_schema: dict[str, Any] = Field(alias="schema", description="JSON Schema of the spec.")
    example: dict[str, Any] = Field(description="A spec that validates.")
    inputs: dict[str, list[str]] = Field(description="Spec field -> formats it takes.")
    outputs: dict[str, str] = Field(description="Output name -> format.")

    @classmethod
    def of(cls, name: str, kind: Kind) -> "KindView":
        """Show a kind."""
        return cls(
            kind=name,
            summary=kind.summary,
            schema=kind.spec.model_json_schema(),
            example=dict(kind.example),
            inputs={field: list(reads.formats) for field, reads in inputs_of(kind.spec).items()},
            outputs=dict(kind.outputs),
        )


class KindPage(View):
    """Every kind."""

    items: list[KindView]


class WorkerView(View):
    """A process that runs chunks."""

    id: str
    device: str
    seen_at: datetime
    alive: bool

    @classmethod
    def of(cls, worker: Worker, *, alive: bool) -> "WorkerView":
        """Show a row."""
        return cls(id=worker.id, device=worker.device, seen_at=worker.seen_at, alive=alive)


class Health(View):
    """The process answers."""

    status: str = "ok"


class Ready(View):
    """Whether jobs are taken and run: 200 where `status` is ok, else 503."""

    status: str = Field(
        description="ok; unavailable (database or store is not ok); or no_worker (this server runs "
        "workers of its own and none is alive: for a moment after each start)."
    )
    database: str = Field(description="ok, or what is wrong.")
    store: str = Field(description="ok, or what is wrong.")
    workers_alive: int = Field(description="Workers heard of lately; 0 without the database.")
    workers: list[WorkerView] | None = Field(
        description="Null where the service has a key and the request does not."
    )


class BlameView(View):
    """One wrong field."""

    pointer: str = Field(description="JSON pointer into the body; /query/name, /header/name.")
    detail: str


class Problem(View):
    """An error, as RFC 9457 has it."""

    type: str = Field(examples=["/docs#spec_invalid"])
    title: str
    status: int
    detail: str
    instance: str
    code: str = Field(description="Stable; for programs.", examples=["spec_invalid"])
    errors: list[BlameView]
    request_id: str | None
    retryable: bool = Field(description="Whether the same request may succeed later.")


def job_views(jobs: Sequence[Job], statuses: Sequence[JobStatus]) -> list[JobView]:
    """Show jobs with their statuses, in order."""
    return [JobView.of(job, status) for job, status in zip(jobs, statuses, strict=True)]
