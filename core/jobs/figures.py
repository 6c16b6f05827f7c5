"""How the whole service stands, in numbers; every one is computed from rows when it is asked for.

So any replica of the API tells the same. Counters are sums over rows that only rise, in whole
milliseconds where they are times: a float's last digit must not look like a restart.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import BigInteger, cast, func, literal_column, select, union_all
from sqlalchemy.orm import Session

from core.db.models import Artifact, CacheEntry, Chunk, Event, Job, Output, Upload, Worker
from core.jobs import pool, shares
from core.jobs.lease import Rules
from core.jobs.scheduler import IN_QUEUE
from core.jobs.states import ALLOWED, READY_CHUNK, RUNNING_CHUNK, TERMINAL

POOLS = ("cpu", "gpu")
ANY_POOL = "any"
"""The pool of a chunk that runs anywhere."""
LOOKED_AT = 200
"""Of the jobs with a ready chunk, the oldest: the one that waited longest is sought among them."""
FAILED_CHUNK = Event.type == literal_column("'chunk.failed'")
"""Word for word the condition of the index that serves it."""
CHECKPOINT = Output.role == literal_column("'checkpoint'")
"""Likewise."""

OPEN = sorted(ALLOWED.keys() - TERMINAL)

Counts = Counter[tuple[str, ...]]
Samples = Mapping[tuple[str, ...], float]


@dataclass(frozen=True)
class Figure:
    """One quantity, by its labels."""

    name: str
    type: Literal["gauge", "counter"]
    help: str
    labels: tuple[str, ...]
    samples: Samples


def measure(session: Session, *, now: datetime, rules: Rules) -> list[Figure]:
    """Return every figure; a few cheap queries, however many jobs there were."""
    sums = _sums(session)
    return [
        *_jobs(sums),
        *_cache(session, sums),
        *_chunks(session),
        *_ages(session, now=now, lease=rules.lease),
        *_workers(session, now=now),
        *_shares(session, now=now, fairness=rules.fairness),
        *_failures(session),
        *_storage(session),
        *_uploads(session),
    ]


def _gauge(name: str, told: str, labels: tuple[str, ...], samples: Samples) -> Figure:
    return Figure(f"stillroom_{name}", "gauge", told, labels, samples)


def _counter(name: str, told: str, labels: tuple[str, ...], samples: Samples) -> Figure:
    return Figure(f"stillroom_{name}_total", "counter", told, labels, samples)


@dataclass(frozen=True)
class _Sum:
    """What the jobs of a project, a kind and a state come to."""

    project: str
    kind: str
    state: str
    jobs: int
    milliseconds: int
    attempts: int
    cache_hits: int


def _sums(session: Session) -> list[_Sum]:
    # One statement, so one snapshot: a job that ends meanwhile must count neither twice nor not
    # at all. Two halves, for each has its own index.
    keys = (Job.project_id, Job.kind, Job.state)
    milliseconds = cast(func.round(Job.device_seconds * 1000), BigInteger)
    sums = (func.count(), *map(func.sum, (milliseconds, Job.attempts, Job.cache_hits)))
    halves = (Job.finished_at.is_(None), Job.finished_at.is_not(None))
    rows = session.execute(
        union_all(*(select(*keys, *sums).where(half).group_by(*keys) for half in halves))
    )
    return [_Sum(*row[:3], *map(int, row[3:])) for row in rows]


def _jobs(sums: Sequence[_Sum]) -> list[Figure]:
    projects = {one.project for one in sums}
    states: Counts = Counter({(p, state): 0 for p in projects for state in OPEN})
    finished: Counts = Counter()
    milliseconds: Counts = Counter()
    attempts: Counts = Counter()
    for one in sums:
        if one.state in TERMINAL:
            finished[one.project, one.kind, one.state] += one.jobs
        else:
            states[one.project, one.state] += one.jobs
        milliseconds[one.project, one.kind] += one.milliseconds
        attempts[one.project, one.kind] += one.attempts
    by_kind = ("project", "kind")
    seconds = {labels: total / 1000 for labels, total in milliseconds.items()}
    return [
        _gauge("jobs", "Jobs that are not over.", ("project", "state"), states),
        _counter("jobs_finished", "Jobs that are over.", (*by_kind, "state"), finished),
        _counter("chunk_seconds", "Device time of ended attempts at chunks.", by_kind, seconds),
        _counter("chunk_attempts", "Attempts at chunks that began.", by_kind, attempts),
    ]


def _cache(session: Session, sums: Sequence[_Sum]) -> list[Figure]:
    hits: Counts = Counter()
    for one in sums:
        hits[one.project, one.kind] += one.cache_hits
    # Each key was computed once: its entry is the miss.
    entries = session.scalar(select(func.count()).select_from(CacheEntry)) or 0
    ratio = hits.total() / (hits.total() + entries) if entries else 0.0
    told = "Outputs found under a cache key, not computed."
    return [
        _counter("cache_hits", told, ("project", "kind"), hits),
        _gauge("cache_entries", "Cache keys: what can be found again.", (), {(): entries}),
        _gauge("cache_hit_ratio", "Hits over all outputs with a cache key.", (), {(): ratio}),
    ]


def _chunks(session: Session) -> list[Figure]:
    ready = (
        select(Job.project_id, func.coalesce(Chunk.device, ANY_POOL), func.count())
        .select_from(Chunk)
        .join(Job, Job.id == Chunk.job_id)
        .where(Chunk.state == READY_CHUNK, IN_QUEUE)
        .group_by(Job.project_id, Chunk.device)
    )
    running = (
        select(Job.project_id, func.coalesce(Worker.kind, Chunk.device, ANY_POOL), func.count())
        .select_from(Chunk)
        .join(Job, Job.id == Chunk.job_id)
        .outerjoin(Worker, Worker.id == Chunk.owner)
        .where(Chunk.state == RUNNING_CHUNK)
        .group_by(Job.project_id, Worker.kind, Chunk.device)
    )
    labels = ("project", "pool")
    told = "Chunks that a worker of the pool could start now."
    return [
        _gauge("chunks_ready", told, labels, _counts(session.execute(ready))),
        _gauge("chunks_running", "Chunks that run.", labels, _counts(session.execute(running))),
    ]


def _counts(rows: Any) -> Counts:
    found: Counts = Counter()
    for *labels, count in rows:
        found[tuple(labels)] += count
    return found


def _ages(session: Session, *, now: datetime, lease: timedelta) -> list[Figure]:
    running = Chunk.state == RUNNING_CHUNK
    first_end = session.scalar(select(func.min(Chunk.lease_until)).where(running))
    since_renewal = now - (first_end - lease) if first_end else timedelta(0)
    moved = _longest_unmoved(session)
    waits = now - moved if moved else timedelta(0)
    ages = {
        "oldest_ready_chunk_age_seconds": (
            waits,
            "Since anything happened to the job that waits longest: it has a ready chunk, and "
            "none that runs.",
        ),
        "lease_age_max_seconds": (since_renewal, "Since the renewal that is longest ago."),
    }
    return [
        _gauge(name, told, (), {(): max(age.total_seconds(), 0.0)})
        for name, (age, told) in ages.items()
    ]


def _longest_unmoved(session: Session) -> datetime | None:
    """Return when the job that waits longest was last heard of."""
    ready = select(Chunk.id).where(Chunk.job_id == Job.id, Chunk.state == READY_CHUNK).exists()
    busy = select(Chunk.job_id).where(Chunk.state == RUNNING_CHUNK)
    waiting = (
        select(Job.id)
        .where(IN_QUEUE, ready, Job.id.not_in(busy))
        .order_by(Job.created_at)
        .limit(LOOKED_AT)
        .subquery("waiting")
    )
    last = select(func.max(Event.id)).where(Event.job_id == waiting.c.id).scalar_subquery()
    lasts = select(last.correlate(waiting)).select_from(waiting)
    return session.scalar(select(func.min(Event.at)).where(Event.id.in_(lasts)))


def _workers(session: Session, *, now: datetime) -> list[Figure]:
    found = pool.workers(session, now=now)
    alive: Counts = Counter({(kind,): 0 for kind in POOLS})
    alive.update((worker.kind,) for worker, lives in found if lives)
    nodes: Counts = Counter({(state,): 0 for state in pool.NODE_STATES})
    nodes.update((node.state,) for node in pool.nodes(session))
    return [
        _gauge("workers_alive", "Workers heard of lately.", ("kind",), alive),
        _gauge("nodes", "Places that workers ever ran at.", ("state",), nodes),
    ]


def _shares(session: Session, *, now: datetime, fairness: shares.Fairness) -> list[Figure]:
    found = shares.standings(session, now=now, fairness=fairness).values()
    told = {
        "usage_seconds": "Device time used, decayed; running chunks count from their start.",
        "share": "Of the pool, by weight, among the projects that use it or wait for it.",
        "debt_seconds": "Device time used beyond the share; negative: short of it.",
        "weight": "What the share is in proportion to.",
    }
    return [
        _gauge("project_info", "1; the project's name.", ("project", "name"), _names(found)),
        *(
            _gauge(
                f"project_{name}",
                text,
                ("project",),
                {(one.project_id,): getattr(one, name.removesuffix("_seconds")) for one in found},
            )
            for name, text in told.items()
        ),
    ]


def _names(found: Any) -> Samples:
    return {(one.project_id, one.name): 1 for one in found}


def _failures(session: Session) -> list[Figure]:
    code = Event.data["code"].as_string()
    rows = session.execute(select(code, func.count()).where(FAILED_CHUNK).group_by(code))
    told = "Attempts at chunks that ended in an error, by its code."
    return [_counter("chunk_failures", told, ("code",), _counts(rows))]


def _storage(session: Session) -> list[Figure]:
    count, size = session.execute(select(func.count(), func.sum(Artifact.size_bytes))).one()
    held = select(Output.sha256).where(CHECKPOINT)
    kept = select(func.sum(Artifact.size_bytes)).where(Artifact.sha256.in_(held))
    sizes = {
        "artifacts": (count, "Stored artifacts, checkpoints included."),
        "artifact_bytes": (size, "Their size."),
        "checkpoint_bytes": (session.scalar(kept), "Size of the artifacts that are checkpoints."),
    }
    return [_gauge(name, told, (), {(): int(n or 0)}) for name, (n, told) in sizes.items()]


def _uploads(session: Session) -> list[Figure]:
    rows = session.execute(select(Upload.state, func.count()).group_by(Upload.state))
    return [_gauge("uploads", "Uploads, by how they stand.", ("state",), _counts(rows))]
