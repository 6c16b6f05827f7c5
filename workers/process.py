"""What ``python -m workers`` runs: the whole of a worker, or the beat, and what each needs."""

import logging
import os
import threading
from datetime import timedelta
from importlib.util import find_spec

from core import logs, tracing
from core.jobs.hints import CeleryHints, NoHints, make_celery
from core.jobs.lease import Rules
from core.jobs.runner import Runner
from core.settings import Settings
from core.tracing import TracingUnavailable
from workers import allocator, start, threads
from workers.device import DeviceMissing
from workers.loop import DeviceLoop
from workers.settings import StartRefused
from workers.start import Stopped, utc_now
from workers.stop import Stop

log = logging.getLogger("stillroom.worker")
TEAM_POLL = timedelta(seconds=2)
"""Between the looks of an idle worker that hears of work through the broker."""
STUCK = 70
"""Exit status of a worker that ended itself because its chunk neither moved nor stopped."""


def run(settings: Settings, *, device: str | None, team: bool) -> int:
    """Work on ``device``, or be the beat where there is none, until told to stop.

    Returns:
        The exit status.

    Raises:
        StartRefused: it cannot work as it was started.
    """
    if team and find_spec("celery") is None:
        raise StartRefused("celery is not installed: pip install 'stillroom[team]'")
    stop = Stop()
    stop.on_signals()
    if not team:
        _end_with_parent()
    try:
        return _work(settings, device, stop, team=team) if device else _beat(settings, stop)
    except Stopped:
        return 0
    except (DeviceMissing, TracingUnavailable) as error:
        raise StartRefused(str(error)) from error


def _beat(settings: Settings, stop: Stop) -> int:
    from workers.beat import serve  # noqa: PLC0415 - with Celery, which --embedded lacks

    logs.set_up(settings, process="beat")
    engine = start.open_database(settings, stop=stop)
    return serve(engine, settings=settings, clock=utc_now, stop=stop)


def _work(settings: Settings, device: str, stop: Stop, *, team: bool) -> int:
    logs.set_up(settings, process="worker", worker=start.owner_of(settings, device))
    here = start.admit(settings, device, stop=stop, rebind=not team)
    threads.apply(here.place.threads, os.environ)  # noqa: TID251 - for libraries not yet loaded
    allocator.keep_freed()
    tracing.set_up(settings, "stillroom-worker")
    hints = CeleryHints(make_celery(settings)) if team else NoHints()
    runner = Runner(
        engine=here.engine,
        store=here.store,
        scratch=settings.scratch,
        owner=here.owner,
        place=here.place,
        clock=utc_now,
        rules=Rules.of(settings),
        on_stuck=lambda: os._exit(STUCK),
        hints=hints,
        model_roots=settings.model_roots,
    )
    poll = TEAM_POLL if team else settings.poll
    loop = DeviceLoop(runner, stop=stop, poll=poll, soft_stop=settings.soft_stop)
    log.info("%s is ready on %s, %d threads", here.owner, here.place.node, here.place.threads)
    status = _serve(loop, settings, here.place.kind, stop) if team else loop.run()
    hints.close()
    tracing.close()
    return status


def _serve(loop: DeviceLoop, settings: Settings, kind: str, stop: Stop) -> int:
    from workers.team import serve  # noqa: PLC0415 - with Celery, which --embedded lacks

    return serve(loop, settings=settings, kind=kind, stop=stop)


def _end_with_parent() -> None:
    """Leave at once when standard input closes: the kernel closes it however the server died."""

    def watch() -> None:
        # Not sys.stdin: this thread would hold its lock while the interpreter ends.
        while os.read(0, 1):
            pass
        tracing.close(limit_s=0.5)
        os._exit(0)

    threading.Thread(target=watch, name="parent", daemon=True).start()
