"""Takes messages of one queue on the main thread, one at a time: a Celery worker, pool solo.

A broker that is away, or comes back, ends nothing: it is asked again every few seconds.
"""

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from celery import Celery
from celery.app.trace import setup_worker_optimizations
from celery.worker import WorkController, state
from celery.worker.consumer import Consumer

from workers.stop import Stop

log = logging.getLogger(__name__)
MOST_WAIT = timedelta(seconds=2)


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


def consume(app: Celery, *, queue: str, name: str, stop: Stop) -> int:
    """Run the application's tasks from ``queue`` until told to stop; return the exit status.

    Args:
        app: With its tasks.
        queue: Whose messages to take.
        name: Of this process among Celery's nodes.
        stop: When to end: after the task at hand.
    """

    def pass_on() -> None:
        # Celery's loop looks at it between messages and while it waits for the broker.
        state.should_stop = 0

    stop.also(pass_on)
    worker = _Worker(
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
    )
    worker.start()
    if worker.exitcode:
        log.error("the consumer of queue %s ended with status %s", queue, worker.exitcode)
    return int(worker.exitcode or 0)
