"""What the server shows, as it comes over the wire. Instants are ISO 8601 UTC strings."""

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

State = Literal["waiting", "queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
TERMINAL = frozenset({"succeeded", "failed", "cancelled"})

Curve = Sequence[tuple[int, float | None]]


class Progress(TypedDict):
    """How far a job is: ``done`` and ``total`` in chunks, ``rate`` in chunks per second."""

    done: float
    total: int | None
    fraction: float
    stage: str | None
    rate: float | None
    eta_s: float | None


class BadChunk(TypedDict):
    stage: str
    index: int


class JobError(TypedDict):
    code: str
    message: str
    retryable: bool
    chunk: BadChunk | None


class InputView(TypedDict):
    sha256: str | None
    job_id: str | None
    output: str | None


class Job(TypedDict):
    """One job."""

    id: str
    kind: str
    name: str | None
    state: State
    priority: int
    labels: dict[str, str]
    spec: dict[str, Any]
    created_at: str
    started_at: str | None
    finished_at: str | None
    progress: Progress
    queue_position: int | None
    waits_for: str | None
    error: JobError | None
    attempts: int
    device_seconds: float
    cache_hits: int
    inputs: dict[str, InputView]
    artifacts: dict[str, str]


class Output(TypedDict):
    """An artifact as a job offers it."""

    name: str
    role: str
    sha256: str
    format: str
    file_name: str
    media_type: str
    size_bytes: int
    meta: dict[str, Any]
    created_at: str


class Artifact(TypedDict):
    """An artifact and where it came from."""

    sha256: str
    format: str
    file_name: str
    media_type: str
    size_bytes: int
    meta: dict[str, Any]
    created_at: str
    produced_by: NotRequired[list[dict[str, Any]]]
    uploaded_as: NotRequired[list[dict[str, Any]]]


class Upload(TypedDict):
    """A file on its way to the server."""

    id: str
    state: Literal["open", "importing", "complete", "failed"]
    file_name: str
    size_bytes: int
    sha256: str
    received_bytes: int
    part_limit_bytes: int
    artifact: str | None
    error: Any


class KindView(TypedDict):
    kind: str
    summary: str
    schema: dict[str, Any]
    example: dict[str, Any]
    inputs: dict[str, list[str]]
    outputs: dict[str, str]
