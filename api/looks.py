"""Shows how jobs stand to the many who ask again and again: together, and nothing dear twice."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from api.lanes import Lane
from api.together import Key, Together
from api.views import JobView
from core.db.models import Job
from core.db.session import glancing, reading
from core.errors import NotFound
from core.jobs import service, status
from core.jobs.shares import Fairness
from core.jobs.status import JobStatus, Seen
from core.jobs.waiting import Ahead, Outlook

log = logging.getLogger("stillroom.api")
GLANCES = 32
"""Jobs that one statement asks for."""
PLACES = 8
"""Jobs of which it is found out at a time what they wait for, and event streams that look; half of
them of one project. Each takes milliseconds of Python: more threads only pass the interpreter
around."""
WAIT_S = 5.0
"""For a glance, and for a place; where the database hangs, who asks is told to come again."""
DEAR_S = 0.03
"""Of computing: what takes less is found out each time, and so is never stale."""
REMEMBERED = 10_000


class Foretold:
    """Remembers what jobs have before them where finding out is dear.

    Behind a queue of thousands, what cost so long to find out is kept 20 times as long, unless
    something of the job changed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[Any, ...], tuple[Ahead, float]] = {}

    def of(self, job: Job, find: Callable[[], Ahead]) -> Ahead:
        """Return what is remembered of a job as it is now, or find out."""
        # A chunk that starts raises the attempts, one that ends changes the others.
        key = (job.id, job.state, job.rank, job.chunks_over, job.attempts)
        with self._lock:
            known, until = self._known.get(key, (None, 0.0))
        if known is not None and time.monotonic() < until:
            return known
        began = time.thread_time()
        found = find()
        took_s = time.thread_time() - began
        if took_s >= DEAR_S:
            with self._lock:
                if len(self._known) >= REMEMBERED:
                    self._known.clear()
                self._known[key] = (found, time.monotonic() + 20 * took_s)
        return found


@dataclass(frozen=True)
class Glance:
    """What one statement tells of a job that is there."""

    shown: str | None
    """As JSON; None where the job is to be looked at alone."""
    last_event: int
    """Its number; 0 where there is none."""


class Looks:
    """Looks at single jobs. One statement tells all of most, and of all who ask meanwhile.

    Only what may have to wait is looked at alone, on a snapshot.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        clock: Callable[[], datetime],
        fairness: Fairness,
        places: Lane,
        wait_s: float = WAIT_S,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._fairness = fairness
        self._foretold = Foretold()
        self._glances = Together(self._glance, at_once=GLANCES, wait_s=wait_s)
        self.places = places

    async def at(self, job_id: str, *, project: str) -> str:
        """Return a job as it is shown alone, as JSON.

        Raises:
            NotFound: no such job in the project.
            Busy: no answer, or no place, came in time.
        """
        glance = await self.glance(job_id, project=project)
        return glance.shown or await self.alone(job_id, project=project)

    async def glance(self, job_id: str, *, project: str) -> Glance:
        """Return what is told of a job together with others.

        Raises:
            NotFound: no such job in the project.
            Busy: no answer came in time.
        """
        glance = await self._glances.tell(project, job_id)
        if glance is None:
            raise NotFound(f"no job {job_id}")
        return glance

    async def alone(self, job_id: str, *, project: str) -> str:
        """Return a job as `at` does, also what it waits for.

        Raises:
            NotFound: no such job in the project.
            Busy: no place came in time.
        """
        return await self.places.run(partial(self._look, job_id, project), project=project)

    def status_of(self, session: Session, job: Job) -> JobStatus:
        """Return how a job stands, with its place in the queue and why it waits."""
        now = self._clock()
        outlook = Outlook(session, now=now, fairness=self._fairness)
        ahead = partial(self._foretold.of, job, partial(outlook.ahead, job))
        return status.describe_one(session, job, now=now, ahead=ahead)

    def _glance(self, asked: Sequence[Key]) -> dict[Key, Glance]:
        with glancing(self._engine) as connection:
            found = status.glance(connection, sorted({job_id for _, job_id in asked}))
        now = self._clock()
        by_key = {(seen.job.project_id, seen.job.id): seen for seen in found}
        # Of another project's job nothing is worked out: it takes as long as one that is not there.
        return {key: _shown(by_key[key], now=now) for key in asked if key in by_key}

    def _look(self, job_id: str, project: str) -> str:
        with reading(self._engine) as session:
            job = service.get(session, job_id, project=project)
            return JobView.of(job, self.status_of(session, job)).model_dump_json()


def _shown(seen: Seen, *, now: datetime) -> Glance:
    try:
        told = seen.status(now=now)
        shown = None if told is None else JobView.of(seen.job, told).model_dump_json()
        return Glance(shown, seen.last_event)
    except Exception:
        # It must not spoil the answers of the others; alone, it fails for who asks for it.
        log.warning("a job that cannot be shown: %s", seen.job.id, exc_info=True)
        return Glance(None, seen.last_event)
