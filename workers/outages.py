"""A database outage makes a worker wait; it ends no process and fails no job."""

import logging
import time
from collections.abc import Callable
from datetime import timedelta

from sqlalchemy.exc import DBAPIError

from core.db.session import deadlocked, is_away
from workers.stop import Stop

log = logging.getLogger(__name__)
PAUSE = timedelta(seconds=1)


class Outages:
    """Runs steps that need the database, and remembers when it was last away."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._at = -float("inf")
        self._away = False

    def surviving(self, step: Callable[[], bool | None]) -> bool:
        """Return what ``step`` does; False, after a pause, where the database was away.

        A step that did not ask the database says None.
        """
        try:
            done = step()
        except DBAPIError as error:
            if deadlocked(error):  # it is there, and nothing was written: the next time it passes
                log.warning("again after a deadlock: %s", told(error))
                return False
            if not is_away(error):
                raise
            self.note(error)
            self._stop.wait(PAUSE)
            return False
        if self._away and done is not None:
            log.info("the database is back")
            self._away = False
        return bool(done)

    def note(self, outage: DBAPIError) -> None:
        """Remember an outage; tell of its beginning."""
        self._at = time.monotonic()
        if not self._away:
            log.warning("the database is away, trying again and again: %s", told(outage))
        self._away = True

    def within(self, span: timedelta) -> bool:
        """Whether the database was away at any time of the last ``span``."""
        return time.monotonic() - self._at < span.total_seconds()


def told(outage: DBAPIError) -> str:
    """Return what the driver says, in one line."""
    return " ".join(str(outage.orig or outage).split())
