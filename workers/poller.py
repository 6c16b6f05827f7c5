"""The embedded worker: polls SQL for ready chunks and runs them, one at a time."""

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from sqlalchemy.exc import OperationalError

from core.db.session import transaction
from core.jobs import housekeeping, lease, pool
from core.jobs.runner import Runner

log = logging.getLogger(__name__)
WATCH_EVERY = timedelta(seconds=5)
"""How often a worker shows itself and looks for chunks of dead ones, busy or not."""
TIDY_EVERY = timedelta(hours=1)


class Poller:
    """Runs chunks until told to stop; finishes the chunk it is at."""

    def __init__(
        self, runner: Runner, *, poll: timedelta, watch_every: timedelta = WATCH_EVERY
    ) -> None:
        self._runner = runner
        self._poll = poll
        self._watch_every = watch_every
        self._stop = threading.Event()
        self._outage_at = -float("inf")
        self._tidied_at = -float("inf")

    def stop(self) -> None:
        """Stop after the running chunk."""
        self._stop.set()

    def run(self) -> None:
        """Claim, run, repeat. A database outage makes it wait, never end."""
        watch = threading.Thread(target=self._watch, name="watch", daemon=True)
        watch.start()
        while not self._stop.is_set():
            if not self._surviving_outages(self._runner.run_one):
                self._stop.wait(self._poll.total_seconds())
        watch.join()
        with transaction(self._runner.engine) as session:
            pool.goodbye(session, self._runner.owner)

    def _watch(self) -> None:
        while not self._stop.is_set():
            for duty in (self._show_presence, self._release_expired, self._tidy):
                self._surviving_outages(duty)
            self._stop.wait(self._watch_every.total_seconds())

    def _show_presence(self) -> bool:
        runner = self._runner
        with transaction(runner.engine) as session:
            pool.hello(session, runner.owner, device=runner.device, now=runner.clock())
            pool.seen(session, runner.owner, now=runner.clock())
        return True

    def _release_expired(self) -> bool:
        """Take back chunks of dead workers; after an outage, give the living time to renew."""
        runner = self._runner
        if time.monotonic() - self._outage_at < runner.rules.lease.total_seconds():
            return False
        now = runner.clock()
        if not lease.any_expired(runner.engine, now=now):
            return False
        with transaction(runner.engine) as session:
            failures = runner.rules.max_failures
            return lease.release_expired(session, now=now, max_failures=failures) > 0

    def _tidy(self) -> bool:
        if time.monotonic() - self._tidied_at < TIDY_EVERY.total_seconds():
            return False
        self._tidied_at = time.monotonic()
        runner = self._runner
        removed = housekeeping.tidy(runner.engine, runner.store, runner.scratch, now=runner.clock())
        if removed:
            log.info("removed %d leftovers: %s", len(removed), ", ".join(removed[:10]))
        return True

    def _surviving_outages(self, step: Callable[[], bool]) -> bool:
        try:
            return step()
        except OperationalError as outage:
            log.warning("database away, trying again: %s", outage.orig)
            self._outage_at = time.monotonic()
            self._stop.wait(1.0)
            return False
