"""The one loop of every worker: claim a chunk, run it, look again; rest where nothing is ready.

All chunks run on the thread of run(). Others only ask it to look.
"""

import logging
import threading
from datetime import timedelta

from sqlalchemy.exc import DBAPIError

from core.db.session import transaction
from core.jobs import pool
from core.jobs.runner import Runner
from workers import allocator
from workers.outages import Outages, told
from workers.stop import SLICE_S, Stop
from workers.watch import WATCH_EVERY, Watch

log = logging.getLogger(__name__)


class DeviceLoop:
    """Runs chunks on one device until told to stop; finishes the chunk it is at."""

    def __init__(
        self,
        runner: Runner,
        *,
        stop: Stop,
        poll: timedelta,
        soft_stop: timedelta,
        watch_every: timedelta = WATCH_EVERY,
    ) -> None:
        """Take what to run.

        Args:
            runner: What claims and runs a chunk.
            stop: When to end.
            poll: How long to rest where nothing is ready and nobody asks.
            soft_stop: How long after ``stop`` the running chunk is handed back.
            watch_every: How often the duties beside the chunks are done.
        """
        self._runner = runner
        self._stop = stop
        self._poll = poll.total_seconds()
        self._outages = Outages(stop)
        self._watch = Watch(
            runner, stop=stop, outages=self._outages, soft_stop=soft_stop, every=watch_every
        )
        self._turn = threading.Condition()
        self._asked = self._answered = 0
        self._ended = False

    def run(self) -> int:
        """Claim, run, repeat, until told to stop; then leave the pool. Return the exit status."""
        self._watch.start()
        worked = False
        try:
            while not self._stop.told:
                asked = self._asked
                if self._outages.surviving(self._runner.run_one):
                    worked = True
                    continue
                if worked:
                    allocator.give_back()
                    worked = False
                self._rest(asked)
        finally:
            with self._turn:
                self._ended = True
                self._turn.notify_all()
            self._watch.end()
            self._say_goodbye()
        return 0

    def drain(self) -> None:
        """Have the loop look now; return once it has run everything that was ready.

        Meanwhile the caller takes no other hint: those are for workers that are idle, and may work.
        """
        with self._turn:
            self._asked += 1
            mine = self._asked
            self._turn.notify_all()
            while not (self._ended or self._stop.told) and (
                self._answered < mine or self._watch.barred
            ):
                self._turn.wait(SLICE_S)

    def _rest(self, answered: int) -> None:
        """Tell who asked before the last look that nothing is ready; wait for the next cause."""
        left = self._poll
        with self._turn:
            self._answered = answered
            self._turn.notify_all()
            while left > 0 and self._asked == answered and not self._stop.told:
                self._turn.wait(min(left, SLICE_S))
                left -= SLICE_S

    def _say_goodbye(self) -> None:
        try:
            with transaction(self._runner.engine) as session:
                pool.goodbye(session, self._runner.owner)
        except DBAPIError as outage:
            log.warning("left without a word, the database is away: %s", told(outage))
