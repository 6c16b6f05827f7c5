"""What can go wrong on this side of the wire. The class says whether a retry can help."""

from collections.abc import Mapping, Sequence
from typing import Any


class StillroomError(Exception):
    """The root of every error this package raises on purpose."""

    retryable = False
    retry_after_s = 0.0


class Unreachable(StillroomError):
    """No answer, or a broken one: the connection failed, timed out or was cut."""

    def __init__(self, url: str, cause: Exception | str, *, retryable: bool = True) -> None:
        reason = str(cause) or type(cause).__name__
        super().__init__(f"no answer from {url}: {reason}")
        self.url = url
        self.retryable = retryable


class ApiError(StillroomError):
    """The server answered with an error (RFC 9457 ``application/problem+json``)."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        errors: Sequence[Mapping[str, Any]] = (),
        *,
        retryable: bool = False,
    ) -> None:
        told = [(str(e.get("pointer", "")), str(e.get("detail", ""))) for e in errors]
        lines = [detail, *(f"  {place}: {what}" for place, what in told if what not in detail)]
        super().__init__("\n".join(lines))
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = tuple(errors)
        self.retryable = retryable


class HashMismatch(StillroomError):
    """The bytes that came are not those the hash promised; nothing was kept."""


class FileInTheWay(StillroomError):
    """Another file stands where a download should go, and overwriting was not asked for."""


class BadManifest(StillroomError):
    """The artifact is no list of a model's files, or one that no folder can be made of."""


class NotUploadable(StillroomError):
    """The path is nothing that can be sent as one artifact."""


class NotSendable(StillroomError):
    """No request can be made of what was given: text that is no text, an address too long."""


class BadReference(StillroomError):
    """What was given as a job's id or a SHA-256 has not the form of one; nothing was sent."""


class NoSuchArtifact(StillroomError):
    """The job offers no artifact of that name."""
