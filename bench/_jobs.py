"""Runs a kind's chunks one after another in this process: files in a folder, no database."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from core.artifacts.store import LocalStore
from core.kinds._base import ChunkResult, Input, Metric, Produced, kinds
from core.specs.base import JobSpec


@dataclass
class Desk:
    """A store and the cache over it."""

    folder: Path
    found: dict[str, Produced] = field(default_factory=dict)
    """By cache key."""
    device: str = "cpu"
    model_roots: Sequence[Path] = ()
    watch: Callable[[], None] = lambda: None
    """Called at every report of progress."""

    def __post_init__(self) -> None:
        """Make the store."""
        self.store = LocalStore(self.folder / "store")

    def keep(self, made: Produced) -> Produced:
        """Store a file; what comes back is read from the store."""
        blob = self.store.put(made.path)
        kept = replace(made, path=self.store.path(blob.sha256))
        if made.cache_key is not None:
            self.found.setdefault(made.cache_key, kept)
        return kept

    def as_input(self, made: Produced) -> Input:
        """Return what a later job sees of a stored file."""
        sha256 = made.path.parent.name + made.path.name
        return Input(sha256, made.format, made.meta)


@dataclass
class DeskChunk:
    """The Chunk that a kind sees."""

    desk: Desk
    inputs: Mapping[str, Input]
    made: Mapping[str, Sequence[Mapping[str, Produced]]]
    job_id: str
    stage: str
    index: int
    chunks: int
    workdir: Path
    device: str
    model_roots: Sequence[Path]

    def progress(self, done: float, total: float) -> None:
        """See Chunk.progress."""
        self.desk.watch()

    def input(self, field_name: str) -> Input:
        """See Chunk.input."""
        return self.inputs[field_name]

    def fetch(self, sha256: str) -> Path:
        """See Chunk.fetch."""
        return self.desk.store.path(sha256)

    def outputs(self, stage: str) -> Sequence[Mapping[str, Produced]]:
        """See Chunk.outputs."""
        return self.made[stage]

    def latest(self, stage: str) -> Mapping[str, Produced]:
        """See Chunk.latest."""
        return self.made[stage][-1] if self.made[stage] else {}

    def cached(self, key: str) -> Produced | None:
        """See Chunk.cached."""
        return self.desk.found.get(key)


@dataclass(frozen=True)
class Done:
    """What a job made."""

    outputs: Mapping[str, Produced]
    checkpoints: Mapping[str, Sequence[Mapping[str, Produced]]]
    """By stage, in the order of its chunks."""
    metrics: Sequence[Metric]


def run_job(desk: Desk, spec: JobSpec, inputs: Mapping[str, Input]) -> Done:
    """Run every chunk of a job, each in an empty folder."""
    kind = kinds()[spec.kind]
    outputs: dict[str, Produced] = {}
    made: dict[str, list[Mapping[str, Produced]]] = {}
    metrics: list[Metric] = []
    for stage in kind.stages(spec, inputs):
        made[stage.name] = []
        for index in range(stage.chunks):
            workdir = desk.folder / "work"
            workdir.mkdir()
            chunk = DeskChunk(
                desk,
                inputs,
                made,
                "job",
                stage.name,
                index,
                stage.chunks,
                workdir,
                desk.device,
                desk.model_roots,
            )
            try:
                result: ChunkResult = kind.run_chunk(spec, chunk)
                made[stage.name].append(_kept(desk, result.checkpoints))
                outputs.update(_kept(desk, result.outputs))
            finally:
                shutil.rmtree(workdir)
            metrics += result.metrics
    return Done(outputs, made, metrics)


def _kept(desk: Desk, made: Mapping[str, Produced]) -> dict[str, Produced]:
    return {name: desk.keep(file) for name, file in made.items()}
