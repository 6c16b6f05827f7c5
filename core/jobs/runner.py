"""Runs one chunk: claim, fetch, compute, store, one guarded write. No transaction stays open."""

import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from core import logs, tracing
from core.artifacts.store import Blob, Store
from core.db.models import Artifact, CacheEntry, Chunk, Job, Output
from core.db.session import deadlocked, is_away, reading, transaction
from core.errors import (
    Cancelled,
    ChunkCrashed,
    HandedBack,
    LeaseLost,
    NotFound,
    OutOfMemory,
    StillroomError,
)
from core.jobs import lease, planning, recovery, scheduler
from core.jobs.adoption import Stored
from core.jobs.heartbeat import Heartbeat
from core.jobs.hints import Hints, NoHints
from core.jobs.lease import Claim, Rules
from core.jobs.pool import Place
from core.jobs.scheduler import Candidate
from core.jobs.states import ChunkState
from core.kinds._base import ChunkResult, Input, Produced
from core.specs.base import JobSpec

log = logging.getLogger(__name__)
NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|RESOURCE_EXHAUSTED|std::bad_alloc",
    re.IGNORECASE,
)
"""What torch, CUDA's libraries and XLA say, by a plain RuntimeError, where there is none left."""
T = TypeVar("T")


class RunningChunk:
    """The Chunk that a kind sees: its job's inputs and earlier outputs, and how to report."""

    def __init__(
        self,
        runner: "Runner",
        claim: Claim,
        inputs: Mapping[str, Input],
        workdir: Path,
        heartbeat: Heartbeat,
    ) -> None:
        self.job_id = claim.job_id
        self.stage = claim.stage
        self.index = claim.index
        self.chunks = claim.chunks
        self.workdir = workdir
        self.device = runner.place.device
        self.model_roots: Sequence[Path] = runner.model_roots
        self._runner = runner
        self._inputs = inputs
        self._heartbeat = heartbeat
        self.found: dict[str, Blob] = {}

    def progress(self, done: float, total: float) -> None:
        """See Chunk.progress."""
        self._heartbeat.report(min(1.0, done / total) if total > 0 else 1.0)

    def input(self, field_name: str) -> Input:
        """See Chunk.input."""
        return self._inputs[field_name]

    def fetch(self, sha256: str) -> Path:
        """See Chunk.fetch."""
        return self._runner.store.path(sha256)

    def outputs(self, stage: str) -> Sequence[Mapping[str, Produced]]:
        """See Chunk.outputs."""
        with reading(self._runner.engine) as session:
            rows = _outputs_of_stage(session, self.job_id, stage)
        by_index: dict[int, dict[str, Produced]] = {}
        for index, output, artifact in rows:
            made = self._produced(artifact, file_name=output.file_name)
            by_index.setdefault(index, {})[output.name] = made
        return [by_index[index] for index in sorted(by_index)]

    def latest(self, stage: str) -> Mapping[str, Produced]:
        """See Chunk.latest."""
        with reading(self._runner.engine) as session:
            rows = _outputs_of_stage(session, self.job_id, stage, latest=True)
        return {
            output.name: self._produced(artifact, file_name=output.file_name)
            for _, output, artifact in rows
        }

    def cached(self, key: str) -> Produced | None:
        """See Chunk.cached."""
        with reading(self._runner.engine) as session:
            entry = session.get(CacheEntry, key)
            artifact = session.get_one(Artifact, entry.sha256) if entry else None
        if artifact is None:
            return None
        try:
            found = self._produced(artifact, file_name=artifact.file_name, cache_key=key)
        except NotFound:
            # The blob was swept or lost on disk: computing it again mends the cache.
            return None
        self.found[key] = Blob(artifact.sha256, artifact.size_bytes)
        return found

    def _produced(
        self, artifact: Artifact, *, file_name: str, cache_key: str | None = None
    ) -> Produced:
        return Produced(
            path=self.fetch(artifact.sha256),
            format=artifact.format,
            file_name=file_name,
            media_type=artifact.media_type,
            meta=artifact.meta,
            cache_key=cache_key,
        )


def _outputs_of_stage(
    session: Session, job_id: str, stage: str, *, latest: bool = False
) -> Sequence[tuple[int, Output, Artifact]]:
    last = (
        select(func.max(Chunk.index))
        .where(Chunk.job_id == job_id, Chunk.stage == stage, Chunk.state == ChunkState.DONE)
        .scalar_subquery()
    )
    query = (
        select(Chunk.index, Output, Artifact)
        .join(Output, Output.chunk_id == Chunk.id)
        .join(Artifact, Artifact.sha256 == Output.sha256)
        .where(Chunk.job_id == job_id, Chunk.stage == stage)
        .order_by(Chunk.index, Output.name)
    )
    if latest:
        query = query.where(Chunk.index == last)
    return [(index, output, artifact) for index, output, artifact in session.execute(query)]


@dataclass(kw_only=True)
class Runner:
    """Claims chunks for one device and runs them, one at a time."""

    engine: Engine
    store: Store
    scratch: Path
    owner: str
    place: Place
    clock: Callable[[], datetime]
    rules: Rules
    on_stuck: Callable[[], None]
    """Called from the heartbeat when a chunk neither moves nor stops; ends the process."""
    hints: Hints = field(default_factory=NoHints)
    model_roots: Sequence[Path] = ()
    """What a chunk may read beside the store."""
    _running: Heartbeat | None = field(default=None, init=False)
    _busy: bool = field(default=False, init=False)

    def interrupt(self) -> None:
        """Make the running chunk go back to the queue at its next report; for another thread."""
        running = self._running
        if running is not None:
            running.tell(HandedBack("its worker stops"))

    def run_one(self) -> bool:
        """Claim and run the best ready chunk; return whether there was one."""
        claim = self._claim()
        if claim is None:
            return False
        facts: dict[str, Any] = {"job": claim.job_id, "chunk": claim.chunk_id}
        with (
            logs.about(**facts, attempt=claim.attempt),
            tracing.chunk_span(
                claim.trace,
                kind=claim.kind,
                job=claim.job_id,
                stage=claim.stage,
                index=claim.index,
                attempt=claim.attempt,
                worker=self.owner,
            ) as mark,
        ):
            began = time.monotonic()
            outcome = self._attempt(claim)
            mark.ended(outcome)
            seconds = time.monotonic() - began
            log.info("chunk %s/%s: %s, %.2f s", claim.stage, claim.index, outcome, seconds)
        return True

    def _attempt(self, claim: Claim) -> str:
        """Run a claimed chunk in a folder of its own; return how it ended, in a word."""
        workdir = self.scratch / f"{claim.chunk_id}.{claim.attempt}"
        heartbeat = Heartbeat(
            self.engine, claim, clock=self.clock, rules=self.rules, on_stuck=self.on_stuck
        )
        self._running = heartbeat
        try:
            with heartbeat:
                return self._run(claim, workdir, heartbeat)
        except LeaseLost as lost:
            log.warning("discarded: %s", lost)
            return lost.code()
        finally:
            self._running = None
            shutil.rmtree(workdir, ignore_errors=True)

    def _claim(self) -> Claim | None:
        """Take the best ready chunk; None where nothing is ready for this place."""
        while True:
            if not self._busy:  # right after a chunk there mostly is another: look but once
                with reading(self.engine) as session:
                    if self._pick(session) is None:
                        return None
            with transaction(self.engine) as session:
                best = self._pick(session, lock=True)
                self._busy = best is not None
                if best is None:
                    return None
                claim = lease.claim(
                    session,
                    best,
                    owner=self.owner,
                    place=self.place,
                    now=self.clock(),
                    rules=self.rules,
                )
            if claim is not None:
                return claim

    def _pick(self, session: Session, *, lock: bool = False) -> Candidate | None:
        fairness = self.rules.fairness
        return scheduler.pick(session, self.place, now=self.clock(), fairness=fairness, lock=lock)

    def _run(self, claim: Claim, workdir: Path, heartbeat: Heartbeat) -> str:
        """Compute, store and write; every failure becomes one guarded write."""
        try:
            workdir.mkdir(parents=True, exist_ok=False)
            stored, result = self._compute(claim, workdir, heartbeat)
            with tracing.step("write"):
                self._finish(claim, stored, result)
        except LeaseLost:
            raise
        except (Cancelled, HandedBack) as told:
            log.info("chunk stopped: %s", told)
            self._let_go(claim, lease.stop if isinstance(told, Cancelled) else lease.hand_back)
            return told.code()
        except StillroomError as error:
            return self._give_up(claim, error)
        except Exception as error:
            if is_away(error):  # while the chunk read from it: nobody's fault, so not counted
                log.warning("chunk handed back, the database was away: %s", error)
                self._let_go(claim, lease.hand_back)
                return HandedBack.code()
            log.exception("chunk crashed")
            return self._give_up(claim, classify(error))
        return "done"

    def _let_go(self, claim: Claim, end: Callable[..., None]) -> None:
        self._write(lambda session: end(session, claim, now=self.clock(), rules=self.rules))

    def _finish(self, claim: Claim, stored: Sequence[Stored], result: ChunkResult) -> None:
        more = self._write(
            lambda session: lease.finish(
                session,
                claim,
                stored=stored,
                metrics=result.metrics,
                score=result.score,
                stage_done=result.stage_done,
                now=self.clock(),
                rules=self.rules,
            )
        )
        if more:
            with reading(self.engine) as session:
                ready = recovery.ready_pools(session, now=self.clock())
            self.hints.wake(ready)

    def _compute(
        self, claim: Claim, workdir: Path, heartbeat: Heartbeat
    ) -> tuple[list[Stored], ChunkResult]:
        with tracing.step("fetch"):
            spec, inputs, run_chunk = self._prepare(claim)
        chunk = RunningChunk(self, claim, inputs, workdir, heartbeat)
        with tracing.step("compute"):
            result = run_chunk(spec, chunk)
        heartbeat.report(1.0)
        for metric in result.metrics:
            if not math.isfinite(metric.value):
                raise ChunkCrashed(f"metric {metric.name} is {metric.value} at step {metric.step}")
        with tracing.step("store"):
            stored = [
                replace(
                    self._store(name, role, made, found=chunk.found.get(made.cache_key or "")),
                    pinned=pinned,
                )
                for role, files, pinned in (
                    ("artifact", result.outputs, False),
                    ("checkpoint", result.checkpoints, result.keep),
                )
                for name, made in files.items()
            ]
        return stored, result

    def _prepare(
        self, claim: Claim
    ) -> tuple[JobSpec, Mapping[str, Input], Callable[[Any, Any], ChunkResult]]:
        with reading(self.engine) as session:
            job = session.get_one(Job, claim.job_id)
            inputs = planning.job_inputs(session, claim.job_id)
            return planning.parse_spec(job), inputs, planning.kind_of(job).run_chunk

    def _store(self, name: str, role: str, produced: Produced, *, found: Blob | None) -> Stored:
        blob = found or self.store.put(produced.path)
        return Stored(
            name=name,
            role=role,
            sha256=blob.sha256,
            size_bytes=blob.size_bytes,
            format=produced.format,
            media_type=produced.media_type,
            file_name=produced.file_name,
            meta=dict(produced.meta),
            cache_key=produced.cache_key,
            cached=found is not None,
        )

    def _give_up(self, claim: Claim, error: StillroomError) -> str:
        log.warning("chunk %s/%s: %s", claim.stage, claim.index, error)
        self._write(
            lambda session: lease.give_up(
                session,
                claim,
                error,
                now=self.clock(),
                rules=self.rules,
            )
        )
        return error.code()

    def _write(self, change: Callable[[Session], T]) -> T:
        """Write in one transaction; while the database is away, wait: an outage fails no job."""
        pause = 0.1
        while True:
            try:
                with transaction(self.engine) as session:
                    return change(session)
            except DBAPIError as error:
                if not (is_away(error) or deadlocked(error)):
                    raise
                log.warning("not written, trying again in %.1f s: %s", pause, error.orig)
                if self._running is not None:
                    self._running.moved()
                time.sleep(pause)
                pause = min(pause * 2, 5.0)


def classify(error: Exception) -> StillroomError:
    """Turn what nobody foresaw into an error with a code; the class says if a retry helps."""
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)))
    ):
        return OutOfMemory(f"out of memory: {error}")
    if isinstance(error, DBAPIError):
        return ChunkCrashed(f"database: {error.orig}")
    return ChunkCrashed(f"{type(error).__name__}: {error}")
