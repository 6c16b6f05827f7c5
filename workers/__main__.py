"""``python -m workers``: one worker for one device, or the beat; of a team, or of one server."""

import argparse
import logging
import os
import sys
import threading
from datetime import timedelta
from importlib.util import find_spec

from core import logs, tracing
from core.jobs.hints import CeleryHints, NoHints, make_celery
from core.jobs.lease import Rules
from core.jobs.runner import Runner
from core.settings import Settings
from core.tracing import TracingUnavailable
from workers import start, threads
from workers.check import check_beat, check_worker
from workers.device import DEVICE, DeviceMissing
from workers.loop import DeviceLoop
from workers.start import StartRefused, Stopped, utc_now
from workers.stop import Stop

log = logging.getLogger("stillroom.worker")
USAGE_ERROR = 2
KEYS = ("STILL_API_KEY", "STILL_KEY_SECRET", "STILL_METRICS_KEY")
TEAM_POLL = timedelta(seconds=2)
"""Between the looks of an idle worker that hears of work through the broker."""
STUCK = 70
"""Exit status of a worker that ended itself because its chunk neither moved nor stopped."""


def main() -> int:
    """Do what the command line says; return the exit status."""
    parser = _parser()
    told = parser.parse_args()
    if told.beat and told.embedded:
        parser.error("an embedded server has no beat: its workers do those duties")
    for key in KEYS:  # what a chunk's own processes need not inherit
        os.environ.pop(key, None)  # noqa: TID251 - nothing is read from it
    team = not told.embedded
    try:
        settings = start.read_settings(team=team)
        if told.check:
            return _check(settings, told.device)
        if team and find_spec("celery") is None:
            raise StartRefused("celery is not installed: pip install 'stillroom[team]'")
        stop = Stop()
        stop.on_signals()
        if told.embedded:
            _end_with_parent()
        return _beat(settings, stop) if told.beat else _work(settings, told.device, stop, team=team)
    except Stopped:
        return 0
    except (StartRefused, DeviceMissing, TracingUnavailable) as error:
        sys.stderr.write(f"stillroom: {' '.join(str(error).split())}\n")
        return USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument("--device", type=_device, help="run chunks on it: cpu, or cuda:N")
    role.add_argument("--beat", action="store_true", help="send the ticks, and do them")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--embedded", action="store_true", help="poll, and end when standard input closes"
    )
    mode.add_argument(
        "--check", action="store_true", help="end with 0 if it is running here and well"
    )
    return parser


def _device(text: str) -> str:
    if not DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: cpu, cuda:0, cuda:1, ...")
    return text


def _check(settings: Settings, device: str | None) -> int:
    if device is None:
        from workers.beat import alive_file  # noqa: PLC0415 - with Celery, which --embedded lacks

        wrong = check_beat(alive_file())
    else:
        wrong = check_worker(settings, device, now=utc_now())
    if wrong is not None:
        sys.stderr.write(f"stillroom: {wrong}\n")
    return 0 if wrong is None else 1


def _beat(settings: Settings, stop: Stop) -> int:
    from workers.beat import serve  # noqa: PLC0415 - with Celery, which --embedded lacks

    logs.set_up(settings, process="beat")
    engine = start.open_database(settings, stop=stop)
    return serve(engine, settings=settings, clock=utc_now, stop=stop)


def _work(settings: Settings, device: str, stop: Stop, *, team: bool) -> int:
    logs.set_up(settings, process="worker", worker=start.owner_of(settings, device))
    here = start.admit(settings, device, stop=stop, rebind=not team)
    threads.apply(here.place.threads, os.environ)  # noqa: TID251 - for libraries not yet loaded
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
        while sys.stdin.buffer.read(1):
            pass
        tracing.close(limit_s=0.5)
        os._exit(0)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
