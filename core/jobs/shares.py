"""Who has used how much of the pool, and who is next by right.

Device time decays by half every half-life (as in Slurm's multifactor priority); a running chunk
counts as soon as it starts, for at least the entry penalty (as in Kueue's admission fair sharing),
so that a burst of short chunks cannot slip in before the first of them is paid.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job, Project, Worker
from core.jobs.states import RUNNING_CHUNK


@dataclass(frozen=True)
class Fairness:
    """How fast use is forgotten, and what a start costs at once."""

    half_life: timedelta = timedelta(days=1)
    entry_penalty: timedelta = timedelta(seconds=10)

    def decayed(self, usage: float, since: timedelta) -> float:
        """Return what is left of ``usage`` seconds; a clock set back decays none."""
        lives = max(since, timedelta(0)) / self.half_life
        return usage * math.pow(0.5, lives)


@dataclass(frozen=True)
class Standing:
    """How a project stands in the pool."""

    project_id: str
    name: str
    weight: float
    usage: float
    """Device seconds, decayed to now; running chunks included."""
    running: int
    running_limit: int | None
    share: float
    """Of the weights of all projects that use the pool or wait for it."""
    debt: float
    """Device seconds used beyond (or, negative, short of) the share of all use."""

    @property
    def level(self) -> float:
        """What decides between projects: the lowest goes first."""
        return self.usage / self.weight

    @property
    def at_limit(self) -> bool:
        """Whether it may start no chunk more."""
        return self.running_limit is not None and self.running >= self.running_limit


def standings(session: Session, *, now: datetime, fairness: Fairness) -> dict[str, Standing]:
    """Return every project's standing by id; shares are of those with use or with open jobs."""
    projects = session.scalars(select(Project).order_by(Project.id)).all()
    running = _running(session)
    usage = {p.id: _usage(p, running.get(p.id, ()), now=now, fairness=fairness) for p in projects}
    active = usage_or_open(session, usage)
    weights = sum(p.weight for p in projects if p.id in active) or 1.0
    total = sum(usage[project_id] for project_id in active)
    found = {}
    for p in projects:
        share = p.weight / weights if p.id in active else 0.0
        found[p.id] = Standing(
            project_id=p.id,
            name=p.name,
            weight=p.weight,
            usage=usage[p.id],
            running=len(running.get(p.id, ())),
            running_limit=p.running_limit,
            share=share,
            debt=usage[p.id] - share * total,
        )
    return found


def usage_or_open(session: Session, usage: Mapping[str, float]) -> set[str]:
    """Return the projects that use the pool or wait for it."""
    query = select(Job.project_id).where(Job.finished_at.is_(None)).distinct()
    return set(session.scalars(query)) | {p for p, seconds in usage.items() if seconds > 0}


def levels(session: Session, *, now: datetime, fairness: Fairness) -> dict[str, tuple[float, int]]:
    """Return each project's level and how many chunks more it may start: what a claim needs."""
    running = _running(session)
    found = {}
    for p in session.scalars(select(Project)):
        mine = running.get(p.id, ())
        room = 1 << 30 if p.running_limit is None else p.running_limit - len(mine)
        found[p.id] = (_usage(p, mine, now=now, fairness=fairness) / p.weight, room)
    return found


def _running(session: Session) -> dict[str, list[datetime]]:
    """When each running chunk started, by project."""
    query = (
        select(Job.project_id, Chunk.started_at)
        .join(Job, Job.id == Chunk.job_id)
        .where(Chunk.state == RUNNING_CHUNK)
    )
    found: dict[str, list[datetime]] = {}
    for project_id, started_at in session.execute(query):
        found.setdefault(project_id, []).extend([started_at] if started_at else [])
    return found


def _usage(
    project: Project, running: list[datetime] | tuple[()], *, now: datetime, fairness: Fairness
) -> float:
    penalty = fairness.entry_penalty
    pending = sum(max(now - at, penalty).total_seconds() for at in running)
    return fairness.decayed(project.usage, now - project.usage_at) + pending


def count_seconds(session: Session, job: Job, chunk: Chunk, *, now: datetime) -> float:
    """Add an attempt's device time to the chunk's, the job's and the worker's; return it."""
    # Never less than none: a clock may be set back.
    seconds = max(0.0, (now - chunk.started_at).total_seconds()) if chunk.started_at else 0.0
    chunk.seconds += seconds
    job.device_seconds += seconds
    session.execute(
        update(Worker)
        .where(Worker.id == chunk.owner)
        .values(busy_seconds=Worker.busy_seconds + seconds)
    )
    return seconds


def charge(
    session: Session, project_id: str, seconds: float, *, now: datetime, fairness: Fairness
) -> None:
    """Add device time to a project's use. The last lock a transaction takes, after every job's."""
    lock = {"key_share": True}
    project = session.get_one(Project, project_id, with_for_update=lock, populate_existing=True)
    project.usage = fairness.decayed(project.usage, now - project.usage_at) + seconds
    project.usage_at = max(now, project.usage_at)
