"""One HTTP exchange: repeated while the server is away, errors read from problem+json.

Only calls that may safely be sent twice go through ``Wire.call``.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from client.errors import ApiError, NotSendable, StillroomError, Unreachable

AWAY = frozenset({429, 502, 503, 504})


@dataclass(frozen=True)
class Retry:
    """How long to put up with a server that is away."""

    limit_s: float = 60.0
    """Of one outage, once the server has answered something."""
    contact_s: float = 3.0
    """Before it ever answered: a wrong address should be told soon."""
    first_s: float = 0.25
    most_s: float = 5.0
    on_retry: Callable[[StillroomError], None] | None = None
    """Told before each wait."""


class Patience:
    """Waits between tries, twice as long each time; gives up when the outage passes its limit."""

    def __init__(self, wire: "Wire") -> None:
        self._wire = wire
        self._since: float | None = None
        self._wait_s = wire.retry.first_s

    def answered(self) -> None:
        """The outage is over."""
        self._since = None

    def worked(self) -> None:
        """The outage is over and something was gained: the next wait is short again."""
        self._since = None
        self._wait_s = self._wire.retry.first_s

    def pause(self, *, at_least_s: float = 0.0) -> None:
        """Wait without counting it as an outage."""
        time.sleep(max(self._wait_s * random.uniform(0.5, 1.0), at_least_s))
        self._wait_s = min(2 * self._wait_s, self._wire.retry.most_s)

    def after(self, error: StillroomError) -> None:
        """Wait for the next try, or raise ``error`` where no try is left or none would help."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        spent_s = now - self._since + max(self._wait_s, error.retry_after_s)
        if not error.retryable or spent_s > self._wire.limit_s:
            raise error
        if self._wire.retry.on_retry is not None:
            self._wire.retry.on_retry(error)
        self.pause(at_least_s=error.retry_after_s)


class Wire:
    """An HTTP client that turns every failure into a StillroomError."""

    def __init__(self, http: httpx2.Client, retry: Retry) -> None:
        self.http = http
        self.retry = retry
        self._answered = False

    @property
    def url(self) -> str:
        """The server's address."""
        return str(self.http.base_url).rstrip("/")

    @property
    def limit_s(self) -> float:
        """How long an outage may last now."""
        if self._answered:
            return self.retry.limit_s
        return min(self.retry.contact_s, self.retry.limit_s)

    def call(self, method: str, path: str, **options: Any) -> Any:
        """Return the JSON answer of a call that may be sent twice; retried while away."""
        patience = Patience(self)
        while True:
            try:
                return self.once(method, path, **options)
            except StillroomError as error:
                patience.after(error)

    def once(self, method: str, path: str, **options: Any) -> Any:
        """Return the JSON answer of one try."""
        with self.stream(method, path, **options) as response:
            body = response.read()
            if not body:
                return None
            try:
                return response.json()
            except ValueError as error:
                raise Unreachable(
                    self.url, "the answer is not JSON: is this a Stillroom server?", retryable=False
                ) from error

    @contextmanager
    def stream(self, method: str, path: str, **options: Any) -> Iterator[httpx2.Response]:
        """Open one answer and hand it over unread; raise ApiError unless it is a success."""
        try:
            with self.http.stream(method, path, **options) as response:
                self._answered = True
                if not response.is_success:
                    response.read()
                    raise problem(response)
                yield response
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            raise Unreachable(self.url, error, retryable=False) from error
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise NotSendable(f"this cannot be sent to {self.url}: {error}") from error
        except httpx2.RequestError as error:
            raise Unreachable(self.url, error) from error


def problem(response: httpx2.Response) -> ApiError:
    """Read an error answer; whatever is not problem+json is summed up by its status."""
    status = response.status_code
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        body = {}
    detail = body.get("detail") or body.get("title") or f"HTTP {status} {response.reason_phrase}"
    found = body.get("errors")
    error = ApiError(
        status,
        str(body.get("code") or f"http_{status}"),
        detail if isinstance(detail, str) else str(detail),
        [e for e in found if isinstance(e, dict)] if isinstance(found, list) else (),
        retryable=status in AWAY or body.get("retryable") is True,
    )
    seconds = response.headers.get("retry-after", "")
    error.retry_after_s = min(float(seconds), 30.0) if seconds.isdigit() else 0.0
    return error
