"""Renews the lease of a running chunk from a thread of its own, and carries progress out."""

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from core.db.session import transaction
from core.errors import Cancelled, HandedBack, LeaseLost, Stalled, StillroomError
from core.jobs import lease
from core.jobs.lease import Claim, Rules
from core.jobs.states import JobState
from core.logs import carried

log = logging.getLogger(__name__)
BEAT = timedelta(seconds=1)
"""Also how soon a cancellation reaches the chunk."""
STOPS: dict[JobState, StillroomError] = {
    JobState.CANCELLING: Cancelled("the job was cancelled"),
    JobState.PAUSING: HandedBack("the job is paused"),
}
"""What a chunk of a job in such a state is told."""


class Heartbeat:
    """While entered, the lease is renewed; ``report`` raises once the chunk must stop."""

    def __init__(
        self,
        engine: Engine,
        claim: Claim,
        *,
        clock: Callable[[], datetime],
        rules: Rules,
        on_stuck: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._claim = claim
        self._clock = clock
        self._rules = rules
        self._on_stuck = on_stuck
        self._done = threading.Event()
        self._fraction = 0.0
        self._moved = time.monotonic()
        self._told: StillroomError | None = None
        self._told_at = 0.0
        self._unheard = False
        self._thread = threading.Thread(target=carried(self._beat), name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def report(self, fraction: float) -> None:
        """Note the progress.

        Raises:
            LeaseLost: another attempt owns the chunk.
            Cancelled: the job was cancelled.
            HandedBack: the job is paused, or the worker stops.
        """
        self._fraction = fraction
        self.moved()
        if self._told is not None:
            raise self._told

    def moved(self) -> None:
        """Note that what the chunk's process does now, it does not do alone: it stalls not."""
        self._moved = time.monotonic()

    def tell(self, why: StillroomError) -> None:
        """Make the next report raise ``why``; the first reason stands."""
        if self._told is None:
            self._told_at = time.monotonic()
            self._told = why

    def _beat(self) -> None:
        while not self._done.wait(BEAT.total_seconds()):
            try:
                self._renew()
            except LeaseLost as lost:
                self.tell(lost)
            except DBAPIError as outage:
                # The chunk goes on: should another attempt own it by then, the fence will tell.
                if not self._unheard:
                    log.warning("lease not renewed, trying again and again: %s", outage.orig)
                self._unheard = True
            else:
                self._unheard = False
            if self._stuck():
                self._on_stuck()

    def _renew(self) -> None:
        if isinstance(self._told, LeaseLost):
            return
        with transaction(self._engine) as session:
            until = self._clock() + self._rules.lease
            state = lease.renew(session, self._claim, until=until, progress=self._fraction)
        if state in STOPS:
            self.tell(STOPS[state])

    def _stuck(self) -> bool:
        """Whether the chunk stalls, or runs on long after it was told to stop."""
        now, claim = time.monotonic(), self._claim
        if now - self._moved > claim.stall_limit.total_seconds():
            log.error("chunk %s reports no progress; ending it", claim.chunk_id)
            self._give_up(Stalled(f"no progress for {claim.stall_limit.total_seconds():g} s"))
            return True
        if self._told is None or now - self._told_at <= self._rules.stop_limit.total_seconds():
            return False
        log.error("chunk %s did not stop when told to; ending it", claim.chunk_id)
        self._end(self._told)
        return True

    def _give_up(self, error: Stalled) -> None:
        self._write(
            lambda session: lease.give_up(
                session, self._claim, error, now=self._clock(), rules=self._rules
            )
        )

    def _end(self, why: StillroomError) -> None:
        """Write what the chunk itself would have written, had it stopped."""
        ends = {Cancelled: lease.stop, HandedBack: lease.hand_back}
        end = ends.get(type(why))
        if end is not None:
            self._write(
                lambda session: end(session, self._claim, now=self._clock(), rules=self._rules)
            )

    def _write(self, change: Callable[[Session], None]) -> None:
        """Try once: the process ends in any case, and the lease runs out by itself."""
        try:
            with transaction(self._engine) as session:
                change(session)
        except (LeaseLost, DBAPIError) as error:
            log.warning("not written: %s", error)
