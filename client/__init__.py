"""The light client: ``Stillroom`` speaks HTTP, ``still`` is the command. No torch, no server."""

from client.api import Stillroom
from client.errors import (
    ApiError,
    BadManifest,
    BadReference,
    FileInTheWay,
    HashMismatch,
    StillroomError,
    Unreachable,
)
from client.wire import Retry

__all__ = [
    "ApiError",
    "BadManifest",
    "BadReference",
    "FileInTheWay",
    "HashMismatch",
    "Retry",
    "Stillroom",
    "StillroomError",
    "Unreachable",
]
