"""What can go wrong, by what happened. The class says the HTTP status and whether a retry helps."""

import re


class StillroomError(Exception):
    """The root of every error a user may see.

    The class name in snake_case is the stable wire code. ``pointer`` is a JSON pointer into the
    request where one field is to blame.
    """

    status = 500
    retryable = False
    attempts = 1
    """How often a chunk that ends in this error is tried in all; settings may say otherwise."""

    def __init__(self, message: str, *, pointer: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.pointer = pointer

    @classmethod
    def code(cls) -> str:
        """Return the wire code, ``lease_lost`` for LeaseLost."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()


class SpecInvalid(StillroomError):
    """The request is well formed and asks for something that cannot be."""

    status = 422


class DataInvalid(StillroomError):
    """A file's content breaks its format: the message names the field, the value and the fix."""

    status = 422


class UploadIncomplete(StillroomError):
    """Bytes are missing, too many, or not those the hash promised."""

    status = 409


class TooLarge(StillroomError):
    """A limit on size was passed; the message names the limit."""

    status = 413


class Unauthorized(StillroomError):
    """No key, or none that is known, valid and unrevoked."""

    status = 401


class Forbidden(StillroomError):
    """The key is known and its scopes do not reach so far."""

    status = 403


class QuotaExceeded(StillroomError):
    """The project is at a limit; the message names the limit and what is in use."""

    status = 429
    retryable = True


class StorageFull(QuotaExceeded):
    """The project holds as many bytes as it may; waiting frees none."""

    status = 409
    retryable = False


class NotFound(StillroomError):
    """No such thing, or not yours to see."""

    status = 404


class Conflict(StillroomError):
    """The thing's present state forbids the move."""

    status = 409


class InFlight(Conflict):
    """The same request is being answered at this moment."""

    retryable = True


class LeaseLost(StillroomError):
    """Another attempt owns the chunk now; nothing this attempt did may be written."""

    status = 409


class Cancelled(StillroomError):
    """The job was cancelled while the chunk ran."""

    status = 409


class HandedBack(StillroomError):
    """The chunk was given back to the queue: its job is paused, or its worker stops."""

    status = 409
    retryable = True


class DeadlinePassed(StillroomError):
    """The job was not done by its deadline."""

    status = 409


class UpstreamFailed(StillroomError):
    """A job this one takes its input from did not succeed."""

    status = 409


class WorkerLost(StillroomError):
    """The process that ran the chunk vanished."""

    retryable = True
    attempts = 5


class GateFailed(StillroomError):
    """What a job had to reach was missed; its report tells by how much."""

    status = 422


class PlanFailed(StillroomError):
    """A kind could not cut its job into chunks, for a reason that nobody foresaw."""


class Stalled(StillroomError):
    """The chunk reported no progress for its stall limit, so its process was ended."""

    retryable = True
    attempts = 2


class OutOfMemory(StillroomError):
    """The device or the host had too little memory; the same chunk would fail again."""


class ChunkCrashed(StillroomError):
    """A chunk raised something nobody foresaw; tried again in case it passes."""

    retryable = True
    attempts = 3
