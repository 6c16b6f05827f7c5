"""Hints: messages that say where work is ready. SQL is the truth, so each of them may be lost."""

import logging
import ssl
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from core.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger(__name__)

RUN, TICK = "jobs.run", "jobs.tick"
POOLS = ("cpu", "gpu")
"""The kinds of device: each has the queue of its name."""
CONTROL = "control"
"""The reconciler's queue."""
TICK_EVERY = timedelta(seconds=2)
EXPIRES = timedelta(seconds=5)
"""A hint that nobody took in this time is worth nothing: idle workers look by themselves."""
MOST = 64
"""Hints in one queue: without a worker to take them they would pile up."""
REST = timedelta(seconds=2)
"""Between a failure of the broker and the next try."""


class Hints(Protocol):
    """Tells workers that there is work; may do nothing at all."""

    def wake(self, pools: Mapping[str, int]) -> None:
        """Tell so many idle workers of each pool to look. Never raises, never blocks."""


class NoHints:
    """For workers that poll."""

    def wake(self, pools: Mapping[str, int]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def make_celery(settings: Settings) -> "Celery":
    """Build the Celery application: the one place of its configuration.

    JSON only, no results, no remote control. The queues hang on the anonymous exchange, whose
    routing needs no keys in Redis that a FLUSHALL could take away.
    """
    # Imported here: an embedded service installs no Celery.
    from celery import Celery  # noqa: PLC0415
    from kombu.entity import Exchange, Queue  # noqa: PLC0415

    if settings.broker_url is None:
        raise ValueError("STILL_BROKER_URL is not set; write it like redis://host:6379/0")
    url = settings.broker_url.get_secret_value()
    app = Celery("stillroom", set_as_current=False)
    app.conf.update(
        broker_url=url,
        # kombu would trust any certificate, unless the URL's own ssl_... options say otherwise.
        broker_use_ssl={"ssl_cert_reqs": ssl.CERT_REQUIRED} if url.startswith("rediss:") else None,
        broker_connection_timeout=2.0,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_connect_timeout": 2.0,
            "socket_timeout": 5.0,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        accept_content=["json"],
        task_serializer="json",
        enable_utc=True,
        timezone="UTC",
        task_queues=[
            Queue(name, Exchange("", type="direct"), routing_key=name) for name in (*POOLS, CONTROL)
        ],
        task_create_missing_queues=False,
        task_default_queue=CONTROL,
        task_ignore_result=True,
        task_acks_late=False,
        task_publish_retry=False,
        # No limit. A solo worker takes one message at a time in any case, and a message whose
        # acknowledgement failed, as where the broker died, would count against a limit for ever.
        worker_prefetch_multiplier=0,
        worker_enable_prefetch_count_reduction=False,
        worker_cancel_long_running_tasks_on_connection_loss=True,  # of acks_late: there are none
        worker_detect_quorum_queues=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        beat_schedule={
            TICK: {
                "task": TICK,
                "schedule": TICK_EVERY,
                "options": {"queue": CONTROL, "expires": TICK_EVERY.total_seconds()},
            }
        },
        beat_max_loop_interval=1,
    )
    return app


def drop_hints(app: "Celery", queue: str) -> None:
    """Empty ``queue``, and what Redis keeps of messages that were taken but not acknowledged.

    That store is one for all queues, and may bring a message back. A hint is lost without harm, so
    nothing there is worth a thought. Never raises.
    """
    once = {"max_retries": 0}
    try:
        with app.connection_for_write(transport_options=once) as connection:
            channel = connection.default_channel
            # Whatever their type: DEL works where reading one by one would fail again.
            names = [channel._q_for_pri(queue, step) for step in channel.priority_steps]
            channel.client.delete(*names, channel.unacked_key, channel.unacked_index_key)
    except Exception as error:  # noqa: BLE001 - on the way out of a failure already
        log.warning("could not drop the hints of queue %s: %s", queue, error)


class CeleryHints:
    """Publishes hints from a thread of its own, so that a broker's trouble slows no caller."""

    def __init__(self, app: "Celery") -> None:
        self._app = app
        self._turn = threading.Condition()
        self._asked: dict[str, int] = {}
        self._closed = False
        self._thread: threading.Thread | None = None
        self._connection: Any = None

    def wake(self, pools: Mapping[str, int]) -> None:
        """See Hints.wake."""
        with self._turn:
            for pool, count in pools.items():
                self._asked[pool] = min(MOST, max(count, self._asked.get(pool, 0)))
            if self._closed or not any(self._asked.values()):
                return
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._publish, name="hints", daemon=True)
                self._thread.start()
            self._turn.notify_all()

    def close(self, *, limit: timedelta = timedelta(seconds=1)) -> None:
        """Send what was asked for, if the broker takes it within ``limit``, and end the thread."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        if self._thread is not None:
            self._thread.join(limit.total_seconds())

    def _publish(self) -> None:
        away = False
        while asked := self._next():
            try:
                for pool, count in asked.items():
                    self._send(pool, count)
                if away:
                    log.info("the broker is back")
                away = False
            except self._failures() as error:
                if not away:
                    log.warning("no hints, the broker is away; workers look every 2 s: %s", error)
                away = True
                self._drop_connection()
                self._rest()
        self._drop_connection()

    def _next(self) -> dict[str, int]:
        with self._turn:
            self._turn.wait_for(lambda: self._closed or any(self._asked.values()))
            asked, self._asked = self._asked, {}
        return {pool: count for pool, count in asked.items() if count > 0}

    def _rest(self) -> None:
        until = time.monotonic() + REST.total_seconds()
        with self._turn:
            while not self._closed and (left := until - time.monotonic()) > 0:
                self._turn.wait(left)

    def _send(self, pool: str, count: int) -> None:
        """Fill the queue of ``pool`` up to ``count`` hints, but never above the bound."""
        if self._connection is None:
            once = {"max_retries": 0}
            self._connection = self._app.connection_for_write(transport_options=once)
        channel = self._connection.default_channel
        queue = self._app.amqp.queues[pool].bind(channel)
        producer = self._app.amqp.Producer(channel, auto_declare=False)
        there: int = queue.queue_declare().message_count
        for _ in range(min(count, MOST - there)):
            self._app.send_task(
                RUN,
                args=[pool],
                queue=pool,
                expires=EXPIRES.total_seconds(),
                producer=producer,
                declare=(),
            )

    def _failures(self) -> tuple[type[Exception], ...]:
        """Return what a broker that is away, or refuses us, raises."""
        from kombu.exceptions import KombuError  # noqa: PLC0415

        connection = self._connection
        known = (*connection.connection_errors, *connection.channel_errors) if connection else ()
        return (KombuError, OSError, *known)

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()
