"""A worker of team mode: Celery brings hints on the main thread, the loop runs beside it.

A hint makes the loop look at SQL at once; without any, because the broker is away or lost them,
the loop looks by itself every two seconds.
"""

import logging
import os
import threading

from core.jobs.hints import RUN, make_celery
from core.settings import Settings
from workers.consumer import consume
from workers.loop import DeviceLoop
from workers.stop import Stop

log = logging.getLogger(__name__)


def serve(loop: DeviceLoop, *, settings: Settings, kind: str, stop: Stop) -> int:
    """Run the loop until told to stop; return the exit status."""
    app = make_celery(settings)

    def run(pool: str) -> None:
        """Run what is ready on this process's device."""
        loop.drain()

    app.task(name=RUN, shared=False)(run)
    crashed: list[BaseException] = []

    def work() -> None:
        try:
            loop.run()
        except BaseException as error:
            log.critical("the device loop crashed", exc_info=error)
            crashed.append(error)
        finally:
            stop.tell()

    # Not a daemon: however Celery ends, the chunk at hand is finished or handed back.
    thread = threading.Thread(target=work, name="device")
    thread.start()
    try:
        consume(app, queue=kind, name=f"{kind}-{os.getpid()}@{settings.node_name}", stop=stop)
    finally:
        stop.tell()
        thread.join()
    return 1 if crashed else 0
