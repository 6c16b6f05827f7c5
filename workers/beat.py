"""The reconciler of team mode: Celery beat asks for a tick every two seconds, and this answers.

It needs no torch and no data folder. Ticks that are missed, sent twice or by two beats do no harm.
"""

import logging
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from celery.beat import EmbeddedService, Scheduler, SchedulingError
from sqlalchemy import Engine

from core.db.session import reading
from core.jobs import recovery
from core.jobs.hints import CONTROL, TICK, CeleryHints, Hints, make_celery
from core.jobs.lease import Rules
from core.settings import Settings
from workers.alive import AliveFile
from workers.consumer import connected, consume
from workers.outages import Outages
from workers.stop import Stop

log = logging.getLogger(__name__)


class Reconciler:
    """Does on each tick what must happen though nobody asks, and tells idle workers of work."""

    def __init__(
        self,
        engine: Engine,
        hints: Hints,
        *,
        rules: Rules,
        clock: Callable[[], datetime],
        stop: Stop,
        alive: AliveFile,
    ) -> None:
        self._engine = engine
        self._hints = hints
        self._rules = rules
        self._clock = clock
        self._alive = alive
        self._outages = Outages(stop)

    def tick(self) -> None:
        """Do every duty once; after an outage, first give the living time to renew."""
        if self._outages.surviving(self._duties):
            self._alive.touch()

    def _duties(self) -> bool:
        now = self._clock()
        if not self._outages.within(self._rules.lease):
            tally = recovery.tick(self._engine, now=now, rules=self._rules)
            if tally.released:
                log.warning("took back %d chunks of dead workers", tally.released)
            if tally.overdue:
                log.info("failed %d jobs past their deadline", tally.overdue)
        with reading(self._engine) as session:
            pools: Mapping[str, int] = recovery.ready_pools(session, now=now)
        self._hints.wake(pools)
        return True


class _Scheduler(Scheduler):  # type: ignore[misc]
    """Celery's scheduler in memory alone, with one line for ticks that cannot be sent."""

    _failing = False

    def apply_entry(self, entry: Any, producer: Any = None) -> None:
        try:
            self.apply_async(entry, producer=producer, advance=False)
        except SchedulingError as error:
            if not self._failing:
                log.warning("no ticks, the broker is away; workers do its duties: %s", error)
            self._failing = True
        else:
            self._failing = False

    def _ensure_connected(self) -> Any:
        return connected(self.connection, asks=lambda: None)


def serve(engine: Engine, *, settings: Settings, clock: Callable[[], datetime], stop: Stop) -> int:
    """Tick until told to stop; return the exit status."""
    alive = AliveFile.of(settings)
    alive.prepare()
    hints = CeleryHints(make_celery(settings))
    reconciler = Reconciler(
        engine,
        hints,
        rules=Rules.of(settings),
        clock=clock,
        stop=stop,
        alive=alive,
    )
    app = make_celery(settings)

    def tick() -> None:  # a function: Celery cannot read the arguments of a method
        reconciler.tick()

    app.task(name=TICK, shared=False)(tick)
    beat = EmbeddedService(app, thread=True, scheduler_cls=_Scheduler)
    beat.start()
    try:
        consume(
            app,
            queue=CONTROL,
            name=f"beat-{os.getpid()}@{settings.node_name}",
            stop=stop,
            meanwhile=reconciler.tick,
        )
        return 0
    finally:
        beat.service.stop()
        hints.close()
        alive.remove()
