"""Told to end: a flag that a signal handler may set, so nothing here takes a lock."""

import signal
import time
from collections.abc import Callable
from datetime import timedelta

SLICE_S = 0.1


class Stop:
    """Whether, and since when, this process is to end."""

    def __init__(self) -> None:
        self._at: float | None = None
        self._then: tuple[Callable[[], None], ...] = ()

    def tell(self) -> None:
        """Ask to end; asking again changes nothing."""
        if self._at is None:
            self._at = time.monotonic()
            for pass_on in self._then:
                pass_on()

    def also(self, pass_on: Callable[[], None]) -> None:
        """Pass the word on; ``pass_on`` may run inside a signal handler, perhaps twice."""
        self._then = (*self._then, pass_on)
        if self.told:
            pass_on()

    def on_signals(self) -> None:
        """Tell it by SIGTERM, and by SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.tell())

    @property
    def told(self) -> bool:
        """Whether it was asked."""
        return self._at is not None

    def overdue(self, limit: timedelta) -> bool:
        """Whether it was asked longer than ``limit`` ago."""
        return self._at is not None and time.monotonic() - self._at > limit.total_seconds()

    def wait(self, limit: timedelta) -> bool:
        """Sleep for ``limit``, or until told; return whether it was."""
        until = time.monotonic() + limit.total_seconds()
        while not self.told and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, SLICE_S))
        return self.told
