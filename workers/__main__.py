"""``python -m workers --device cpu``: one embedded worker; ends when its parent does."""

import argparse
import logging
import os
import re
import signal
import sys
import threading
from datetime import UTC, datetime

from core.artifacts.store import LocalStore
from core.db.session import make_engine
from core.jobs.lease import Rules
from core.jobs.runner import Runner
from core.settings import Settings
from workers.poller import Poller

STUCK = 70
"""Exit status of a worker that ended itself because its chunk neither moved nor stopped."""


def main() -> None:
    """Run until standard input closes (the server is gone) or a signal asks to stop."""
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    parser.add_argument("--device", default="cpu", type=_device, help="cpu, or cuda:N")
    device = parser.parse_args().device
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # Alembic, matplotlib and torch speak at INFO of things no operator asked for.
    logging.getLogger("core").setLevel(logging.INFO)
    _end_with_parent()
    poller = Poller(_runner(Settings(), device), poll=Settings().poll)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: poller.stop())
    poller.run()


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda:\d{1,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: cpu, cuda:0, cuda:1, ...")
    return text


def _runner(settings: Settings, device: str) -> Runner:
    return Runner(
        engine=make_engine(settings.url),
        store=LocalStore(settings.data_dir),
        scratch=settings.scratch,
        owner=f"{settings.owner_prefix}{os.getpid()}:{device}",
        device=device,
        clock=lambda: datetime.now(UTC),  # noqa: TID251 - the edge where the clock comes from
        rules=Rules(
            lease=settings.lease,
            max_failures=settings.max_failures,
            stall_limit=settings.stall_limit,
            stop_limit=settings.stop_limit,
        ),
        on_stuck=lambda: os._exit(STUCK),
    )


def _end_with_parent() -> None:
    """Leave at once when standard input closes: the kernel closes it however the server died."""

    def watch() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    main()
