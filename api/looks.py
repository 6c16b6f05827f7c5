"""Shows how jobs stand to the many who ask again and again: together, and nothing dear twice."""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from api.together import Together
from api.views import JobView
from core.db.models import Job
from core.db.session import glancing, reading
from core.errors import NotFound
from core.jobs import status
from core.jobs.shares import Fairness
from core.jobs.status import JobRow, JobStatus
from core.jobs.waiting import Ahead, Outlook

GLANCES = 32
"""Jobs that one statement asks for."""
LOOKS = 8
"""Jobs on one snapshot: of each it takes milliseconds to tell what it waits for."""
LOOK_S = 5.0
"""To wait for an answer; where the database hangs, whoever asks is told to come again."""
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


class Looks:
    """Looks at single jobs. Most need one statement; only what waits is read again, on a snapshot.

    Both are done for all who ask meanwhile at once: a poll in a crowd costs half of one alone.
    """

    def __init__(
        self, *, engine: Engine, clock: Callable[[], datetime], fairness: Fairness
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._fairness = fairness
        self._foretold = Foretold()
        self._glances = Together("looks at jobs", self._glance, at_once=GLANCES, wait_s=LOOK_S)
        self._looks = Together("looks at jobs", self._look, at_once=LOOKS, wait_s=LOOK_S)

    async def at(self, job_id: str, *, project: str) -> str:
        """Return a job as it is shown alone, as JSON.

        Raises:
            NotFound: no such job in the project.
            Busy: no answer came in time.
        """
        shown = await self._glances.tell(project, job_id) or await self._looks.tell(project, job_id)
        if shown is None:
            raise NotFound(f"no job {job_id}")
        return shown

    def status_of(self, session: Session, job: Job) -> JobStatus:
        """Return how a job stands, with its place in the queue and why it waits."""
        return status.describe_one(session, job, now=self._clock(), ahead=self._ahead(session))

    def _glance(self, job_ids: Sequence[str]) -> dict[tuple[str, str], str]:
        with glancing(self._engine) as connection:
            found = status.look(connection, job_ids, now=self._clock())
        return _written(found)

    def _look(self, job_ids: Sequence[str]) -> dict[tuple[str, str], str]:
        with reading(self._engine) as session:
            now, ahead = self._clock(), self._ahead(session)
            found = status.look(session.connection(), job_ids, now=now, ahead=ahead)
        return _written(found)

    def _ahead(self, session: Session) -> status.Foretell:
        outlook = Outlook(session, now=self._clock(), fairness=self._fairness)
        return lambda job: self._foretold.of(job, partial(outlook.ahead, job))


def _written(found: Sequence[tuple[JobRow, JobStatus]]) -> dict[tuple[str, str], str]:
    """Return jobs as JSON by project and id: what another project asks for is not there."""
    return {
        (job.project_id, job.id): JobView.of(job, told).model_dump_json() for job, told in found
    }
