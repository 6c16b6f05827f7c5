"""What a kind is: a spec, a plan of stages, and how to run one chunk. Torch-free."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from core.registry import scan
from core.specs.base import JobSpec


@dataclass(frozen=True)
class Stage:
    """Chunks that run alike.

    *fanned*: independent of each other. *chained*: chunk i starts from what chunk i-1 made.
    A stage starts when the one before it is complete.
    """

    name: str
    chunks: int
    mode: Literal["fanned", "chained"] = "fanned"
    device: Literal["cpu", "gpu"] | None = None
    """The only kind of device its chunks run on; None: any."""
    memory_bytes: int = 0
    """What a chunk needs of its device at least: it waits for a worker that has so much."""


@dataclass(frozen=True)
class Produced:
    """One file a chunk made, inside its working folder, or a stored blob it found again."""

    path: Path
    format: str
    """What the bytes are: ``pairs``, ``federated_model``, ``targets``, ``student`` ..."""
    file_name: str
    """The name a person gets when downloading."""
    media_type: str = "application/octet-stream"
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Small facts a later plan needs (rows, dim, clusters); a function of the bytes alone."""
    cache_key: str | None = None
    """Where set, the same work in any other job finds these bytes under this key."""


@dataclass(frozen=True)
class Metric:
    """One point of a curve."""

    name: str
    step: int
    value: float


@dataclass(frozen=True)
class ChunkResult:
    """What a chunk hands over; the runner stores it and writes the rows, once."""

    outputs: Mapping[str, Produced] = field(default_factory=dict)
    """Shown to the user as the job's artifacts, by name."""
    checkpoints: Mapping[str, Produced] = field(default_factory=dict)
    """Read by later chunks of the job; listed under checkpoints."""
    metrics: Sequence[Metric] = ()
    score: float | None = None
    """How good the checkpoint is, the lower the better: of a chain the best is kept too."""
    keep: bool = False
    """Whether its checkpoints are pinned: kept whatever retention says, until somebody unpins."""
    stage_done: bool = False
    """A chained stage may end early: the chunks left in it are skipped."""


@dataclass(frozen=True)
class Input:
    """An input artifact as a kind sees it when planning."""

    sha256: str
    format: str
    meta: Mapping[str, Any]


class Chunk(Protocol):
    """All a kind sees of the world while it runs one chunk."""

    job_id: str
    stage: str
    index: int
    """Within the stage, from 0."""
    chunks: int
    """Of the stage."""
    workdir: Path
    """Empty, private to this attempt, removed afterwards."""
    device: str
    """``cpu`` or ``cuda:0``."""
    model_roots: Sequence[Path]
    """The operator's folders of language models on this worker; nothing else on it is read."""

    def progress(self, done: float, total: float) -> None:
        """Tell how far the chunk is. Call it every few seconds at least.

        Raises:
            LeaseLost: another attempt owns the chunk.
            Cancelled: the job was cancelled.
            HandedBack: the job is paused, or the worker stops.
        """

    def input(self, field_name: str) -> Input:
        """Return the artifact a spec field names."""

    def fetch(self, sha256: str) -> Path:
        """Return a read-only local path of a stored blob."""

    def outputs(self, stage: str) -> Sequence[Mapping[str, Produced]]:
        """Return what each chunk of an earlier, fanned stage made, in order, by name, readable."""

    def latest(self, stage: str) -> Mapping[str, Produced]:
        """Return what the last finished chunk of a chained stage made; empty before the first."""

    def cached(self, key: str) -> Produced | None:
        """Return what any earlier chunk stored under this cache key."""


@dataclass(frozen=True)
class StageCost:
    """Of all chunks of a stage together, counted before any of them runs."""

    stage: str
    operations: float
    """Multiplications and additions of floating-point numbers."""
    read_bytes: float
    """From the store."""
    written_bytes: float
    """To the store."""
    seconds: float
    """On one device, at the rates that ``Cost.assumes`` tells."""


@dataclass(frozen=True)
class Cost:
    """What a job would take by its inputs' sizes alone, whatever was run before."""

    stages: Sequence[StageCost]
    passes: Mapping[str, int]
    """Forward passes by model, in tokens."""
    assumes: Mapping[str, str]
    """What the seconds rest on, in words."""


@dataclass(frozen=True)
class Kind:
    """One sort of job. ``stages`` runs in the API: torch-free, from the inputs' meta alone."""

    spec: type[JobSpec]
    stages: Callable[[Any, Mapping[str, Input]], Sequence[Stage]]
    """May raise SpecInvalid where the inputs do not fit the spec (dimensions, missing columns)."""
    run_chunk: Callable[[Any, Chunk], ChunkResult]
    summary: str
    example: Mapping[str, Any]
    """A spec that validates, shown in the docs."""
    outputs: Mapping[str, str] = field(default_factory=dict)
    """Name -> format of what a finished job may offer: a chain is checked when it is posted."""
    cost: Callable[[Any, Mapping[str, Input]], Cost] | None = None
    """Counts what a job would take; torch-free. None: only what was run before can tell."""
    timed: bool = False
    """Whether its files tell how long things took, so that no two runs make the same bytes."""


def kinds() -> Mapping[str, Kind]:
    """Return every kind by name."""
    return scan("core.kinds", "KIND", Kind)
