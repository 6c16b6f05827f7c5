"""What the server shows, as it comes over the wire. Instants are ISO 8601 UTC strings."""

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

State = Literal[
    "waiting",
    "queued",
    "running",
    "pausing",
    "paused",
    "cancelling",
    "succeeded",
    "failed",
    "cancelled",
]
TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
STANDING_STILL = frozenset({"waiting", "queued", "paused"})
"""Not over, and nothing of it runs."""

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
    deadline_at: str | None
    retry_of: str | None
    submitted_by: str | None
    progress: Progress
    queue_position: int | None
    waits_for: str | None
    predicted_start_at: str | None
    error: JobError | None
    attempts: int
    device_seconds: float
    cache_hits: int
    inputs: dict[str, InputView]
    artifacts: dict[str, str]


class AlsoRetried(TypedDict):
    """A job that was retried because another was."""

    id: str
    retry_of: str
    kind: str
    name: str | None


class Retried(Job):
    """The new job that goes on with an old one, and what was retried with it."""

    retried_with: list[AlsoRetried]


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


class Checkpoint(Output):
    """What a chunk left for later chunks."""

    stage: str
    index: int
    score: float | None
    pinned: bool


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


class StageEstimate(TypedDict):
    name: str
    chunks: int
    chained: bool
    device: str | None
    memory_bytes: int
    seconds_per_chunk: float | None


class StageCost(TypedDict):
    """Of all chunks of a stage together."""

    stage: str
    operations: float
    read_bytes: float
    written_bytes: float
    seconds: float


class Cost(TypedDict):
    """What a job would take by counting."""

    stages: list[StageCost]
    passes: dict[str, int]
    assumes: dict[str, str]


class Estimate(TypedDict):
    """What a job would take; None where that is not known."""

    stages: list[StageEstimate] | None
    chunks: int | None
    memory_bytes: int | None
    device_seconds: float | None
    device_seconds_from: str
    cache_hits: int | None
    cache_hits_from: str
    can_run: bool
    why_not: str | None
    waits_for: str | None
    queue_position: int | None
    predicted_start_at: str | None
    cost: Cost | None


class Running(TypedDict):
    """The chunk that a worker runs; all None where it is another project's."""

    job_id: str | None
    kind: str | None
    stage: str | None
    index: int | None
    since: str | None
    progress: float | None


class PoolWorker(TypedDict):
    id: str
    node: str
    device: str
    kind: str
    memory_bytes: int
    threads: int
    alive: bool
    seen_at: str
    started_at: str
    utilisation: float
    running: Running | None


class Node(TypedDict):
    """A place that workers start on again and again."""

    id: str
    state: str
    note: str | None
    updated_at: str


class Queue(TypedDict):
    """A project's part of the pool; ``project_id`` None: all others together."""

    project_id: str | None
    name: str
    weight: float
    share: float
    usage: float
    debt: float
    running_chunks: int
    running_limit: int | None
    queued_limit: int | None
    jobs: dict[str, int]
    chunks_left: int


class Pool(TypedDict):
    """Who runs chunks, what runs, and who waits for how much."""

    workers: list[PoolWorker]
    nodes: list[Node]
    projects: list[Queue]


class Swept(TypedDict):
    dry_run: bool
    removed: list[str]


class Use(TypedDict):
    """What a project holds at this moment."""

    running_chunks: int
    queued_jobs: int
    storage_bytes: int


class Project(TypedDict):
    """Who shares the pool; a limit of None is none."""

    id: str
    name: str
    weight: float
    running_limit: int | None
    queued_limit: int | None
    storage_limit_bytes: int | None
    created_at: str
    use: Use


class Key(TypedDict):
    """A key as it is stored: without its secret."""

    id: str
    project_id: str
    name: str
    prefix: str
    scopes: list[str]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    last_used_at: str | None


class NewKey(Key):
    """A key, and the only sight of it."""

    key: str


class Me(TypedDict):
    """Whom the key in use stands for."""

    actor: str
    scopes: list[str]
    project: Project
    key: Key | None
