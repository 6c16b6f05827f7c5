"""A database with 100,000 jobs in it, as years of use would leave one, put there by bulk inserts.

What is still queued or running asks for a GPU: no worker of a bench takes it.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from sqlalchemy import Engine, insert, text

from core.db.models import Artifact, Base, Chunk, Job, JobInput, JobLabel, Output, Project
from core.db.session import transaction
from core.jobs import pool
from core.jobs.ids import new_id
from core.jobs.pool import Place
from core.jobs.states import ChunkState, JobState

DEFAULT = "prj_default"
KINDS = {"echo": 1, "fit_federated": 6, "cache_targets": 3, "distill": 8, "evaluate": 3}
"""Kind -> chunks."""
STATES = {JobState.SUCCEEDED: 90, JobState.FAILED: 6, JobState.CANCELLED: 4}
TEAMS = ("search", "ads", "speech", "vision")
BATCH = 2_000
RUNNING = 8


@dataclass
class Crowd:
    """Ids to ask for, of the project that is asked about."""

    succeeded: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    queued: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    """Values of a label that is another for each job."""


def fill(engine: Engine, *, jobs: int, others: int, queued: int, now: datetime, seed: int) -> Crowd:
    """Put ``jobs`` into the first project, and a quarter as many into others together."""
    crowd, rng = Crowd(), random.Random(seed)
    projects = [f"prj_other{number}" for number in range(others)]
    with transaction(engine) as session:
        for name in projects:
            facts = {"id": name, "name": name, "weight": 1.0, "usage_at": now, "created_at": now}
            session.execute(insert(Project).values(**facts, usage=0.0))
        place = Place("crowd:cuda:0", "cuda:0", 1 << 40)
        for number in range(RUNNING):
            pool.hello(session, f"crowd:{number}", place=place, now=now)
    owners = [DEFAULT] * jobs + [p for p in projects for _ in range(jobs // 4 // max(1, others))]
    rng.shuffle(owners)
    for batch in _batches(_rows(owners, crowd, queued=queued, now=now, rng=rng)):
        with transaction(engine) as session:
            for table in (Job, JobLabel, Artifact, JobInput, Chunk, Output):
                rows = [row for kind, row in batch if kind is table]
                if rows:
                    session.execute(insert(table), rows)
    if engine.dialect.name == "postgresql":  # what its autovacuum does within a minute
        with engine.connect() as connection:
            connection.execute(text("ANALYZE"))
            connection.commit()
    return crowd


def _batches(
    rows: Iterable[list[tuple[type[Base], dict[str, Any]]]],
) -> Iterator[list[tuple[type[Base], dict[str, Any]]]]:
    jobs = iter(rows)
    while batch := list(islice(jobs, BATCH)):
        yield [row for job in batch for row in job]


def _rows(
    owners: list[str], crowd: Crowd, *, queued: int, now: datetime, rng: random.Random
) -> Iterator[list[tuple[type[Base], dict[str, Any]]]]:
    """Yield the rows of each job, the oldest first; the last ones are not over yet."""
    chunk_id, made = 1, [_sha256("first")]
    first = True
    mine = owners.count(DEFAULT)
    for age, project in zip(range(len(owners), 0, -1), owners, strict=True):
        mine -= project == DEFAULT
        state = rng.choices(list(STATES), weights=list(STATES.values()))[0]
        if project == DEFAULT and mine < queued + RUNNING:
            state = JobState.RUNNING if mine < RUNNING else JobState.QUEUED
        job = _job(project, state, now - timedelta(seconds=60 * age), rng)
        _note(crowd, job)
        rows: list[tuple[type[Base], dict[str, Any]]] = [(Job, job)]
        of_job = {"job_id": job["id"], "project_id": project, "created_at": job["created_at"]}
        rows += [(JobLabel, {"key": k, "value": v, **of_job}) for k, v in job["labels"].items()]
        if first:
            rows.append((Artifact, _artifact(made[0], job)))
            first = False
        if job["kind"] != "echo":
            asked = {"job_id": job["id"], "field": "pairs", "sha256": rng.choice(made[-500:])}
            rows.append((JobInput, asked))
        rows += [(Chunk, _chunk(chunk_id + i, i, job, now)) for i in range(job["chunks"])]
        if state is JobState.SUCCEEDED:
            for name in ("result", "report"):
                sha256 = _sha256(f"{job['id']} {name}")
                made.append(sha256)
                rows.append((Artifact, _artifact(sha256, job)))
                rows.append((Output, _output(chunk_id, name, sha256, job)))
        chunk_id += job["chunks"]
        yield rows


def _note(crowd: Crowd, job: dict[str, Any]) -> None:
    if job["project_id"] != DEFAULT:
        return
    crowd.runs.append(job["labels"]["run"])
    if job["name"]:
        crowd.names.append(job["name"])
    ids = {JobState.RUNNING: crowd.running, JobState.QUEUED: crowd.queued}
    ids.get(job["state"], crowd.succeeded).append(job["id"])


def _job(project: str, state: JobState, at: datetime, rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(list(KINDS))
    started = None if state is JobState.QUEUED else at + timedelta(seconds=rng.uniform(0.1, 30))
    over = state not in (JobState.QUEUED, JobState.RUNNING)
    chunks = KINDS[kind]
    number = rng.randrange(10**9)
    failed = {"code": "chunk_crashed", "message": "ValueError: NaN", "retryable": True}
    return {
        "id": new_id("job"),
        "project_id": project,
        "kind": kind,
        "name": f"run {number}" if rng.random() < 0.5 else None,
        "spec": {"kind": kind, "seed": number, "clustering": {"method": "kmeans"}, "labels": {}},
        "labels": {"team": rng.choice(TEAMS), "run": str(number)},
        "rank": 50,
        "state": state,
        "error": {**failed, "chunk": None} if state is JobState.FAILED else None,
        "submitted_by": "operator",
        "created_at": at,
        "started_at": started,
        "finished_at": started + timedelta(seconds=20) if over and started else None,
        "stage": None if over else "train",
        "chunks": chunks,
        "chunks_over": chunks if state is JobState.SUCCEEDED else 0,
        "attempts": chunks,
        "device_seconds": 20.0,
        "cache_hits": 0,
    }


def _chunk(chunk_id: int, index: int, job: dict[str, Any], now: datetime) -> dict[str, Any]:
    states = {
        JobState.SUCCEEDED: ChunkState.DONE,
        JobState.FAILED: ChunkState.FAILED,
        JobState.CANCELLED: ChunkState.CANCELLED,
        JobState.QUEUED: ChunkState.READY if index == 0 else ChunkState.BLOCKED,
        JobState.RUNNING: ChunkState.RUNNING if index == 0 else ChunkState.BLOCKED,
    }
    state = states[job["state"]]
    running = state is ChunkState.RUNNING
    return {
        "id": chunk_id,
        "job_id": job["id"],
        "stage": "train",
        "stage_index": 0,
        "index": index,
        "chained": True,
        "state": state,
        "device": "gpu",
        "memory_bytes": 0,
        "attempt": 1,
        "failures": {},
        "owner": "crowd:0",
        "lease_until": now + timedelta(days=30) if running else None,
        "progress": 0.5 if running else 1.0,
        "seconds": 2.0,
        "started_at": job["started_at"],
        "finished_at": job["finished_at"],
    }


def _artifact(sha256: str, job: dict[str, Any]) -> dict[str, Any]:
    file = {"format": "report", "media_type": "application/json", "file_name": "report.json"}
    return {**file, "sha256": sha256, "size_bytes": 4_096, "meta": {}, "created_at": _end(job)}


def _output(chunk_id: int, name: str, sha256: str, job: dict[str, Any]) -> dict[str, Any]:
    return {
        "chunk_id": chunk_id,
        "name": name,
        "job_id": job["id"],
        "role": "artifact",
        "sha256": sha256,
        "file_name": "report.json",
        "cached": False,
        "pinned": False,
        "created_at": _end(job),
    }


def _end(job: dict[str, Any]) -> datetime:
    end: datetime = job["finished_at"] or job["created_at"]
    return end


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
