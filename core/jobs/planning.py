"""From a spec whose inputs exist to chunks: resolve references, ask the kind, insert rows."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from core.db.models import Artifact, Chunk, Job, JobInput, Output
from core.errors import (
    Conflict,
    NotFound,
    PlanFailed,
    SpecInvalid,
    StillroomError,
    UpstreamFailed,
)
from core.jobs import events, lineage, shares
from core.jobs.states import OPEN_CHUNKS, RUNNING_CHUNK, TERMINAL, ChunkState, JobState, move
from core.kinds._base import Input, Kind, Stage, kinds
from core.specs.base import SHA256, JobSpec, Reads, inputs_of, references_of

log = logging.getLogger(__name__)
CHUNKS_LIMIT = 200_000
IDS_AT_ONCE = 10_000


def resolve(session: Session, spec: JobSpec, *, project: str) -> list[JobInput]:
    """Check every reference of a project's spec and return its rows (``job_id`` still unset).

    Raises:
        SpecInvalid: a reference names nothing, a job that failed, or another format.
    """
    rows = []
    formats = inputs_of(type(spec))
    asked = [(reference, name) for name, reference in references_of(spec).items()]
    # In the order of their ids, as every transaction locks jobs: no deadlock.
    for reference, name in sorted(asked):
        reads = formats[name.partition(".")[0]]
        try:
            rows.append(_resolve_one(session, name, reference, reads, project=project))
        except StillroomError as error:
            pointer = f"/{name.replace('.', '/')}"
            raise SpecInvalid(error.message, pointer=pointer) from error
    return rows


def _resolve_one(
    session: Session, field: str, reference: str, reads: Reads, *, project: str
) -> JobInput:
    if SHA256.fullmatch(reference):
        try:
            artifact = lineage.artifact(session, reference, project=project)
        except NotFound:
            raise SpecInvalid(f"no artifact {reference}; upload it first") from None
        _check_format(f"artifact {reference[:12]}…", artifact.format, reads)
        return JobInput(field=field, sha256=reference)
    job_id, _, name = reference.partition("/")
    # Locked until the input row is written: else the job could end in between, unseen by us and
    # we by it, and ours would wait for ever.
    upstream = session.scalar(
        select(Job).where(Job.id == job_id, Job.project_id == project).with_for_update()
    )
    if upstream is None:
        raise SpecInvalid(f"no job {job_id}")
    offered = kind_of(upstream).outputs
    if name not in offered:
        allowed = ", ".join(sorted(offered))
        raise SpecInvalid(f"a {upstream.kind} job makes no {name!r}; it makes: {allowed}")
    _check_format(reference, offered[name], reads)
    if upstream.state in {JobState.FAILED, JobState.CANCELLED, JobState.CANCELLING}:
        raise SpecInvalid(f"job {job_id} is {upstream.state}: it will not make {name!r}")
    found = _made(session, job_id, name) if upstream.state == JobState.SUCCEEDED else None
    if found is None and upstream.state == JobState.SUCCEEDED:
        raise SpecInvalid(f"job {job_id} ended without making {name!r}")
    return JobInput(field=field, upstream_id=job_id, upstream_output=name, sha256=found)


def _check_format(what: str, found: str, reads: Reads) -> None:
    if found not in reads.formats:
        raise SpecInvalid(f"{what} is of format {found!r}; needed: {', '.join(reads.formats)}")


def _made(session: Session, job_id: str, name: str) -> str | None:
    query = select(Output.sha256).where(
        Output.job_id == job_id, Output.name == name, Output.role == "artifact"
    )
    return session.scalar(query.order_by(Output.chunk_id.desc()).limit(1))


def parse_spec(job: Job) -> JobSpec:
    """Return a stored spec as its kind's class.

    Raises:
        SpecInvalid: the product's rules changed since the job was submitted.
    """
    try:
        return kind_of(job).spec.model_validate(job.spec)
    except ValidationError as error:
        raise SpecInvalid(f"the stored spec is no longer valid: {error}") from error


def kind_of(job: Job) -> Kind:
    """Return the kind of a job; SpecInvalid where the product no longer has it."""
    try:
        return kinds()[job.kind]
    except KeyError:
        raise SpecInvalid(f"this version knows no kind {job.kind!r}") from None


def job_inputs(session: Session, job_id: str) -> dict[str, Input]:
    """Return a job's resolved inputs by name, which is the spec's field (see references_of)."""
    query = (
        select(JobInput, Artifact)
        .join(Artifact, Artifact.sha256 == JobInput.sha256)
        .where(JobInput.job_id == job_id)
    )
    return {
        row.field: Input(artifact.sha256, artifact.format, artifact.meta)
        for row, artifact in session.execute(query)
    }


def plan(
    session: Session, job: Job, spec: JobSpec, *, now: datetime, trial: bool = False
) -> list[Stage]:
    """Insert the chunks of a job whose inputs all exist, and queue it; return its stages.

    ``trial``: of each stage the first chunk alone, for a job that is looked at and taken back.
    """
    stages = _stages(job, spec, job_inputs(session, job.id))
    total = sum(stage.chunks for stage in stages)
    if not 1 <= total <= CHUNKS_LIMIT:
        raise SpecInvalid(f"the job would have {total} chunks; allowed: 1 to {CHUNKS_LIMIT}")
    rows = list(_chunk_rows(job.id, [replace(s, chunks=1) for s in stages] if trial else stages))
    session.execute(insert(Chunk), rows)
    job.chunks, job.stage = total, stages[0].name
    if job.state == JobState.WAITING:
        move(session, job, JobState.QUEUED, now=now)
    facts = [{"stage": s.name, "chunks": s.chunks, "mode": s.mode} for s in stages]
    events.record(session, job.id, "job.planned", now=now, stages=facts)
    return stages


def _on_device(spec: JobSpec, stage: Stage) -> Stage:
    """Return a stage that asks for the device that the job insists on, if it does.

    Raises:
        SpecInvalid: the stage can only run on the other kind.
    """
    if spec.device == "any":
        return stage
    if stage.device not in (None, spec.device):
        told = f"device: {spec.device!r}, but stage {stage.name} runs on a {stage.device} only"
        raise SpecInvalid(told, pointer="/device")
    return replace(stage, device=spec.device)


def _chunk_rows(job_id: str, stages: list[Stage]) -> Iterator[dict[str, Any]]:
    for stage_index, stage in enumerate(stages):
        for index in range(stage.chunks):
            chained = stage.mode == "chained"
            first = stage_index == 0 and (index == 0 or not chained)
            yield {
                "job_id": job_id,
                "stage": stage.name,
                "stage_index": stage_index,
                "index": index,
                "chained": chained,
                "state": ChunkState.READY if first else ChunkState.BLOCKED,
                "device": stage.device,
                "memory_bytes": stage.memory_bytes,
                "attempt": 0,
                "failures": {},
                "progress": 0.0,
                "seconds": 0.0,
            }


def on_succeeded(session: Session, job: Job, *, now: datetime) -> bool:
    """Hand a finished job's outputs to the jobs that wait for them, and plan those now whole.

    Returns:
        Whether any job waited.
    """
    waiting = session.scalars(select(JobInput).where(JobInput.upstream_id == job.id)).all()
    for row in waiting:
        row.sha256 = _made(session, job.id, row.upstream_output or "")
    session.flush()
    for waiter in lock(session, {row.job_id for row in waiting}):
        if waiter.state not in (JobState.WAITING, JobState.PAUSED) or waiter.chunks is not None:
            continue
        missing = [r.upstream_output for r in waiting if r.job_id == waiter.id and not r.sha256]
        if missing:
            lost = UpstreamFailed(f"job {job.id} ended without making {missing[0]!r}")
            fail(session, waiter, lost, now=now)
        elif waiter.state == JobState.WAITING:
            plan_if_whole(session, waiter, now=now)
    return bool(waiting)


def _stages(job: Job, spec: JobSpec, inputs: Mapping[str, Input]) -> list[Stage]:
    """Ask the kind for its stages; what it did not foresee ends this job and no other."""
    try:
        stages = kind_of(job).stages(spec, inputs)
        return [_on_device(spec, stage) for stage in stages if stage.chunks]
    except StillroomError:
        raise
    except Exception as error:
        log.exception("the kind %s could not plan job %s", job.kind, job.id)
        raise PlanFailed(f"kind {job.kind}: {type(error).__name__}: {error}") from error


def plan_if_whole(session: Session, job: Job, *, now: datetime) -> None:
    """Plan a waiting job once all its inputs are there; where they do not fit, it fails."""
    query = select(JobInput.field).where(JobInput.job_id == job.id, JobInput.sha256.is_(None))
    if session.scalar(query.limit(1)) is not None:
        return
    try:
        plan(session, job, parse_spec(job), now=now)
    except StillroomError as error:
        fail(session, job, error, now=now)


def lock(session: Session, ids: set[str]) -> Sequence[Job]:
    """Lock jobs in the order of their ids, as everybody does."""
    found: list[Job] = []
    for some in _batches(sorted(ids)):
        query = select(Job).where(Job.id.in_(some)).order_by(Job.id).with_for_update()
        found += session.scalars(query.execution_options(populate_existing=True))
    return found


def lock_chain(session: Session, job_id: str) -> Job:
    """Lock a job together with all that waits for it, which may end with it; return the job.

    One after another they would not be locked in the order of their ids.
    """
    lock(session, {job_id} | downstream(session, job_id))
    return session.get_one(Job, job_id)


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut ids into as many as one statement may name."""
    for start in range(0, len(ids), IDS_AT_ONCE):
        yield ids[start : start + IDS_AT_ONCE]


def fail(
    session: Session,
    job: Job,
    error: StillroomError,
    *,
    now: datetime,
    chunk: Chunk | None = None,
) -> float:
    """End a job, and every job that waits for its outputs, with the reason.

    Returns:
        The device seconds of what still ran of it: the caller charges them, as its last act.
    """
    return _end(session, job, JobState.FAILED, now=now, error=_facts(error, chunk))


def end_cancelled(session: Session, job: Job, *, now: datetime) -> None:
    """End a job because its owner asked."""
    _end(session, job, JobState.CANCELLED, now=now, error=None)


def _end(
    session: Session, job: Job, state: JobState, *, now: datetime, error: dict[str, object] | None
) -> float:
    """End a job, and all that can no longer get what they wait for; what waits runs nothing."""
    seconds = _end_one(session, job, state, now=now, error=error)
    lost = UpstreamFailed(f"it needs an output of job {job.id}, which {state}")
    for waiter in lock(session, downstream(session, job.id)):
        if waiter.state not in TERMINAL:
            _end_one(session, waiter, JobState.FAILED, now=now, error=_facts(lost))
    return seconds


def downstream(session: Session, job_id: str) -> set[str]:
    """Every job that waits for this one, or for one that waits for it, and so on."""
    found: set[str] = set()
    fresh = {job_id}
    while fresh:
        below: set[str] = set()
        for some in _batches(sorted(fresh)):
            query = select(JobInput.job_id).where(JobInput.upstream_id.in_(some))
            below.update(session.scalars(query))
        fresh = below - found
        found |= fresh
    return found


def _facts(error: StillroomError, chunk: Chunk | None = None) -> dict[str, object]:
    return {
        "code": error.code(),
        "message": error.message,
        "retryable": error.retryable,
        "chunk": {"stage": chunk.stage, "index": chunk.index} if chunk else None,
    }


def _end_one(
    session: Session, job: Job, state: JobState, *, now: datetime, error: dict[str, object] | None
) -> float:
    move(session, job, state, now=now, error=error)
    running = select(Chunk).where(Chunk.job_id == job.id, Chunk.state == RUNNING_CHUNK)
    seconds = sum(
        shares.count_seconds(session, job, chunk, now=now)
        for chunk in session.scalars(running.order_by(Chunk.id)).all()
    )
    still_open = (*OPEN_CHUNKS, ChunkState.RUNNING)
    session.execute(
        update(Chunk)
        .where(Chunk.job_id == job.id, Chunk.state.in_(still_open))
        .values(state=ChunkState.CANCELLED, finished_at=now)
        .execution_options(synchronize_session=False)
    )
    events.record(session, job.id, f"job.{state}", now=now, **({"error": error} if error else {}))
    return seconds


def check_open(job: Job) -> None:
    """Raise Conflict where a job is over."""
    if job.state in TERMINAL:
        raise Conflict(f"job {job.id} is already {job.state}")
