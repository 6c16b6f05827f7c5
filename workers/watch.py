"""What a worker does beside its chunks, busy or not: it shows itself and looks after the dead."""

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from core.db.session import transaction
from core.jobs import housekeeping, pool, recovery
from core.jobs.runner import Runner
from workers.outages import Outages
from workers.stop import SLICE_S, Stop

log = logging.getLogger(__name__)
WATCH_EVERY = timedelta(seconds=5)
TIDY_EVERY = timedelta(hours=1)


class Watch:
    """A thread beside the loop. It also hands back a chunk that outlasts the soft stop."""

    def __init__(
        self,
        runner: Runner,
        *,
        stop: Stop,
        outages: Outages,
        soft_stop: timedelta,
        every: timedelta,
    ) -> None:
        self._runner = runner
        self._stop = stop
        self._outages = outages
        self._soft_stop = soft_stop
        self._every = every.total_seconds()
        self._over = threading.Event()
        self._node_state = pool.ACTIVE
        self._tidied_at = -float("inf")
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self) -> None:
        """End, once the duty in hand is done."""
        self._over.set()
        self._thread.join()

    @property
    def barred(self) -> bool:
        """Whether the node was last seen draining or excluded: nothing can be claimed there."""
        return self._node_state != pool.ACTIVE

    def _run(self) -> None:
        while not self._over.is_set():
            for duty in (self._show_presence, self._look_after_the_dead, self._tidy):
                self._do(duty)
            self._rest()

    def _do(self, duty: Callable[[], bool | None]) -> None:
        """Do a duty; what nobody foresaw of it ends neither the others nor the thread."""
        try:
            self._outages.surviving(duty)
        except Exception:
            log.exception("a duty of the watch failed; it is done again in %g s", self._every)

    def _rest(self) -> None:
        until = time.monotonic() + self._every
        while time.monotonic() < until and not self._over.wait(SLICE_S):
            if self._stop.overdue(self._soft_stop):
                # Again and again: the chunk may have begun a moment ago.
                self._runner.interrupt()

    def _show_presence(self) -> bool:
        runner, now = self._runner, self._runner.clock()
        with transaction(runner.engine) as session:
            pool.hello(session, runner.owner, place=runner.place, now=now)
            pool.seen(session, runner.owner, now=now)
            state = pool.node_state(session, runner.place.node)
        if state != self._node_state:
            takes = "takes work again" if state == pool.ACTIVE else "finishes its chunk and rests"
            log.warning("node %s is %s: this worker %s", runner.place.node, state, takes)
            self._node_state = state
        return True

    def _look_after_the_dead(self) -> bool | None:
        """Do the reconciler's duties; after an outage, first give the living time to renew."""
        runner = self._runner
        if self._outages.within(runner.rules.lease):
            return None
        tally = recovery.tick(runner.engine, now=runner.clock(), rules=runner.rules)
        return tally.released > 0

    def _tidy(self) -> bool | None:
        if time.monotonic() - self._tidied_at < TIDY_EVERY.total_seconds():
            return None
        self._tidied_at = time.monotonic()
        runner = self._runner
        removed = housekeeping.tidy(runner.engine, runner.store, runner.scratch, now=runner.clock())
        if removed:
            log.info("removed %d leftovers: %s", len(removed), ", ".join(removed[:10]))
        return True
