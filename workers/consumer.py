"""Takes messages of one queue on the main thread, one at a time: a Celery worker, pool solo.

A broker that is away, or comes back, ends nothing: it is asked again every few seconds.
"""

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from celery import Celery
from celery.app.trace import setup_worker_optimizations
from celery.worker import WorkController, state
from celery.worker.consumer import Consumer
from kombu.asynchronous import set_event_loop

from core.jobs.hints import drop_hints
from workers.stop import Stop

log = logging.getLogger(__name__)
MOST_WAIT = timedelta(seconds=2)
LEAST_REST, MOST_REST = timedelta(seconds=1), timedelta(seconds=10)
"""Between the end of a consumer and the next one; it doubles."""
LONG_LIFE = timedelta(minutes=1)
"""Of a consumer: what ended it is no longer what ended the one before."""


def connected(connection: Any, *, asks: Callable[[], None]) -> Any:
    """Return the connection once it is open; ``asks`` is called every second and may raise."""
    tries = 0

    def away(error: Exception, _wait: float) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            log.warning("the broker is away, trying again and again: %s", error)

    wait = MOST_WAIT.total_seconds()
    opened = connection.ensure_connection(
        away,
        None,
        interval_start=wait / 4,
        interval_step=wait / 4,
        interval_max=wait,
        callback=asks,
    )
    if tries:
        log.info("the broker is back")
    return opened


class _Consumer(Consumer):  # type: ignore[misc]
    """Celery's own waits half a minute between tries and tells of each."""

    def ensure_connected(self, conn: Any) -> Any:
        return connected(conn, asks=state.maybe_shutdown)


class _Worker(WorkController):  # type: ignore[misc]
    """Celery's worker without its command line, its signal handlers and its logging."""

    def start(self) -> None:
        setup_worker_optimizations(self.app, self.hostname)
        super().start()


def consume(
    app: Celery,
    *,
    queue: str,
    name: str,
    stop: Stop,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Run the application's tasks from ``queue`` until told to stop.

    A message that no library can read, or a broker that answers with errors, ends Celery's worker.
    Then another one is built, without the hints that were there: one may have been to blame.

    Args:
        app: With its tasks.
        queue: Whose messages to take.
        name: Of this process among Celery's nodes.
        stop: When to end: after the task at hand.
        meanwhile: What to do once after each of those ends, before the wait.
    """

    def pass_on() -> None:
        # Celery's loop looks at it between messages and while it waits for the broker.
        state.should_stop = 0

    stop.also(pass_on)
    wait = LEAST_REST
    while not stop.told:
        began = time.monotonic()
        _consume_once(app, queue=queue, name=name)
        if stop.told:
            return
        if time.monotonic() - began > LONG_LIFE.total_seconds():
            wait = LEAST_REST
        log.error("the consumer of queue %s ended; another in %s", queue, wait)
        drop_hints(app, queue)
        try:
            meanwhile()
        except Exception:
            log.exception("what is done meanwhile failed")
        stop.wait(wait)
        wait = min(2 * wait, MOST_REST)


def _consume_once(app: Celery, *, queue: str, name: str) -> None:
    """Run a worker of Celery until it ends, whatever it ends of."""
    set_event_loop(None)  # that of the worker before is closed
    state.reset_state()
    try:
        _Worker(
            app=app,
            hostname=name,
            pool="solo",
            concurrency=1,
            queues=[queue],
            consumer_cls=_Consumer,
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            task_events=False,
        ).start()
    except Exception:
        log.exception("the consumer of queue %s crashed", queue)
