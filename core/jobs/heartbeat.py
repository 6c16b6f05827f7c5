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

from core.db.session import transaction
from core.errors import Cancelled, LeaseLost
from core.jobs import lease
from core.jobs.lease import Claim, Rules

log = logging.getLogger(__name__)
BEAT = timedelta(seconds=1)
"""Also how soon a cancellation reaches the chunk."""


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
        self._asked_to_stop: float | None = None
        self._lost: LeaseLost | None = None
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

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
        """
        self._fraction = fraction
        self._moved = time.monotonic()
        if self._lost is not None:
            raise self._lost
        if self._asked_to_stop is not None:
            raise Cancelled(f"job {self._claim.job_id} was cancelled")

    def _beat(self) -> None:
        while not self._done.wait(BEAT.total_seconds()):
            try:
                self._renew()
            except LeaseLost as lost:
                self._lost = lost
            except DBAPIError as outage:
                # The chunk goes on: should another attempt own it by then, the fence will tell.
                log.warning("lease not renewed: %s", outage.orig)
            if self._stuck():
                self._on_stuck()

    def _renew(self) -> None:
        if self._lost is not None:
            return
        with transaction(self._engine) as session:
            until = self._clock() + self._rules.lease
            cancelling = lease.renew(session, self._claim, until=until, progress=self._fraction)
        if cancelling and self._asked_to_stop is None:
            self._asked_to_stop = time.monotonic()

    def _stuck(self) -> bool:
        """Whether the chunk stalls, or runs on long after it was told to stop."""
        now = time.monotonic()
        if now - self._moved > self._rules.stall_limit.total_seconds():
            log.error("chunk %s reports no progress; ending it", self._claim.chunk_id)
            return True
        asked = self._asked_to_stop
        if asked is not None and now - asked > self._rules.stop_limit.total_seconds():
            log.error("chunk %s did not stop when told to; ending it", self._claim.chunk_id)
            return True
        return False
