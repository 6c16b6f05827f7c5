"""The pool at a glance: which worker runs what, and how many jobs each project has before it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job, Node, Worker
from core.jobs import pool, projects, shares
from core.jobs.scheduler import IN_QUEUE
from core.jobs.shares import Fairness, Standing
from core.jobs.states import RUNNING_CHUNK


@dataclass(frozen=True)
class Running:
    """The chunk that a worker runs."""

    project_id: str
    job_id: str
    kind: str
    stage: str
    index: int
    since: datetime | None
    progress: float


@dataclass(frozen=True)
class Place:
    """A worker, its node, and what it runs now."""

    worker: Worker
    node: Node
    alive: bool
    running: Running | None
    utilisation: float
    """Part of its life that it ran chunks; from 0 to 1."""


@dataclass(frozen=True)
class Queue:
    """A project's open jobs, and how it stands."""

    standing: Standing
    queued_limit: int | None
    jobs: Mapping[str, int] = field(default_factory=dict)
    """Open jobs by state."""
    chunks_left: int = 0
    """Of those that are planned."""


def places(session: Session, *, now: datetime) -> list[Place]:
    """Return every worker heard of within a day; those alive come first."""
    running = _running(session)
    nodes = {node.id: node for node in pool.nodes(session)}
    found = [
        Place(
            worker=worker,
            node=nodes[worker.node_id],
            alive=alive,
            running=running.get(worker.id),
            utilisation=_utilisation(worker, running.get(worker.id), now=now),
        )
        for worker, alive in pool.workers(session, now=now)
    ]
    return sorted(found, key=lambda place: (not place.alive, place.node.id, place.worker.id))


def _running(session: Session) -> dict[str, Running]:
    query = select(Chunk, Job.project_id, Job.kind).join(Job, Job.id == Chunk.job_id)
    return {
        chunk.owner: Running(
            project_id=project_id,
            job_id=chunk.job_id,
            kind=kind,
            stage=chunk.stage,
            index=chunk.index,
            since=chunk.started_at,
            progress=chunk.progress,
        )
        for chunk, project_id, kind in session.execute(query.where(Chunk.state == RUNNING_CHUNK))
        if chunk.owner is not None
    }


def _utilisation(worker: Worker, running: Running | None, *, now: datetime) -> float:
    life = (now - worker.started_at).total_seconds()
    busy = worker.busy_seconds
    if running is not None and running.since is not None:
        busy += (now - running.since).total_seconds()
    return round(min(max(busy / life, 0.0), 1.0), 4) if life > 0 else 0.0


def queue_passes(session: Session, jobs: int) -> bool:
    """Return whether more than so many jobs are queued or running; costs no more than they do."""
    some = select(Job.id).where(IN_QUEUE).limit(jobs + 1).subquery()
    return (session.scalar(select(func.count()).select_from(some)) or 0) > jobs


def queues(session: Session, *, now: datetime, fairness: Fairness) -> Sequence[Queue]:
    """Return every project's queue, by name."""
    standings = shares.standings(session, now=now, fairness=fairness)
    limits = {row.id: row.queued_limit for row in projects.list_projects(session)}
    jobs, chunks = _open_jobs(session)
    found = [
        Queue(
            standing=one,
            queued_limit=limits[one.project_id],
            jobs=jobs.get(one.project_id, {}),
            chunks_left=chunks.get(one.project_id, 0),
        )
        for one in standings.values()
    ]
    return sorted(found, key=lambda queue: queue.standing.name)


def _open_jobs(session: Session) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Return by project the open jobs of each state, and the chunks they have still to run."""
    query = (
        select(Job.project_id, Job.state, func.count(), func.sum(Job.chunks - Job.chunks_over))
        .where(Job.finished_at.is_(None))
        .group_by(Job.project_id, Job.state)
        .order_by(Job.state)
    )
    jobs: dict[str, dict[str, int]] = {}
    chunks: dict[str, int] = {}
    for project_id, state, count, left in session.execute(query):
        jobs.setdefault(project_id, {})[state] = count
        chunks[project_id] = chunks.get(project_id, 0) + int(left or 0)
    return jobs, chunks
