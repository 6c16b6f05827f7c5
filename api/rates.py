"""How often one key may ask. Without the counter (Redis is away) everybody may."""

import logging
import math
import time
from contextlib import suppress
from typing import Protocol

from fastapi.concurrency import run_in_threadpool
from limits import RateLimitItem, parse
from limits.storage import storage_from_string
from limits.strategies import SlidingWindowCounterRateLimiter

from core.settings import Settings

log = logging.getLogger("stillroom.api")
ANSWER_S = 0.2
"""So long Redis may take for one count."""
REST_S = 5.0
"""So long Redis is left alone after it did not answer."""


class BadLimit(RuntimeError):
    """STILL_RATE_LIMIT is no limit."""


class Rates(Protocol):
    """Counts requests."""

    limit: str
    """As people read it."""

    async def wait_s(self, actor: str) -> int | None:
        """Count a request; return how many seconds to wait where it is one too many."""
        ...


class NoRates:
    """No limit."""

    limit = "any number"

    async def wait_s(self, actor: str) -> int | None:
        """Let everything pass."""
        return None


class Limited:
    """A sliding window per key: in memory, or in Redis for all replicas together."""

    def __init__(self, limit: RateLimitItem, *, redis_url: str | None) -> None:
        self.limit = str(limit)
        self._item = limit
        self._away_until = 0.0
        self._in_memory = redis_url is None
        options = {} if redis_url is None else {"socket_timeout": ANSWER_S}
        options |= {} if redis_url is None else {"socket_connect_timeout": ANSWER_S}
        storage = storage_from_string(redis_url or "memory://", **options)
        self._window = SlidingWindowCounterRateLimiter(storage)
        away = storage.base_exceptions
        several = away if isinstance(away, tuple) else (away,)
        self._away: tuple[type[Exception], ...] = (*several, OSError)

    async def wait_s(self, actor: str) -> int | None:
        """Count a request; return how many seconds to wait where it is one too many."""
        if self._in_memory:
            return self._count(actor)
        if time.monotonic() < self._away_until:
            return None
        return await run_in_threadpool(self._count, actor)

    def _count(self, actor: str) -> int | None:
        try:
            if self._window.hit(self._item, actor):
                return None
            reset_at = self._window.get_window_stats(self._item, actor).reset_time
        except self._away as error:
            self._away_until = time.monotonic() + REST_S
            log.warning("rate limit: the counter does not answer (%s)", type(error).__name__)
            return None
        # The library keeps the time of its counters by the wall clock.
        return max(1, math.ceil(reset_at - time.time()))


def make_rates(settings: Settings) -> Rates:
    """Return the counter that the settings ask for.

    Raises:
        BadLimit: the limit is not one.
    """
    if settings.rate_limit is None:
        return NoRates()
    limit = read_limit(settings.rate_limit)
    url = settings.broker_url
    return Limited(limit, redis_url=url.get_secret_value() if url is not None else None)


def read_limit(text: str) -> RateLimitItem:
    """Read a limit such as ``600/minute``.

    Raises:
        BadLimit: it is none, or lets nobody pass.
    """
    with suppress(ValueError):
        limit = parse(text)
        if limit.amount > 0:
            return limit
    raise BadLimit(f"STILL_RATE_LIMIT: {text!r} is no limit; write it like 600/minute")
