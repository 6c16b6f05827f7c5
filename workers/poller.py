"""The embedded worker: polls SQL for ready chunks and runs them, one at a time."""

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from sqlalchemy.exc import OperationalError

from core.db.session import transaction
from core.jobs import lease, pool
from core.jobs.runner import Runner

log = logging.getLogger(__name__)
SEEN_EVERY = timedelta(seconds=10)


class Poller:
    """Runs chunks until told to stop; finishes the chunk it is at."""

    def __init__(self, runner: Runner, *, poll: timedelta) -> None:
        self._runner = runner
        self._poll = poll
        self._stop = threading.Event()

    def stop(self) -> None:
        """Stop after the running chunk."""
        self._stop.set()

    def run(self) -> None:
        """Claim, run, repeat. A database outage makes it wait, never end."""
        presence = threading.Thread(target=self._show_presence, name="presence", daemon=True)
        presence.start()
        while not self._stop.is_set():
            worked = self._surviving_outages(self._runner.run_one)
            if not worked:
                self._surviving_outages(self._reconcile)
                self._stop.wait(self._poll.total_seconds())
        with transaction(self._runner.engine) as session:
            pool.goodbye(session, self._runner.owner)

    def _show_presence(self) -> None:
        runner = self._runner

        def show() -> bool:
            with transaction(runner.engine) as session:
                pool.hello(session, runner.owner, device=runner.device, now=runner.clock())
                pool.seen(session, runner.owner, now=runner.clock())
            return True

        while not self._stop.is_set():
            self._surviving_outages(show)
            self._stop.wait(SEEN_EVERY.total_seconds())

    def _reconcile(self) -> bool:
        runner = self._runner
        now = runner.clock()
        if not lease.any_expired(runner.engine, now=now):
            return False
        with transaction(runner.engine) as session:
            failures = runner.rules.max_failures
            return lease.release_expired(session, now=now, max_failures=failures) > 0

    def _surviving_outages(self, step: Callable[[], bool]) -> bool:
        try:
            return step()
        except OperationalError as outage:
            log.warning("database away, trying again: %s", outage.orig)
            time.sleep(1.0)
            return False
