"""Every setting, read once from STILL_* variables. The mode of the service is settings alone."""

import hashlib
import re
import socket
from datetime import timedelta
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from core.errors import StillroomError

_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?")
_DATABASE = re.compile(r"(/\d*)?")
_FIELD = re.compile(r'field "(\w+)"')
_DEVICE = re.compile(r"cpu|cuda:\d{1,3}")


def _from_seconds(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


Duration = Annotated[
    timedelta, BeforeValidator(_from_seconds), Field(gt=timedelta(0), le=timedelta(days=3650))
]
SECRETS = frozenset({"api_key", "broker_url", "database_url", "key_secret", "metrics_key"})
"""Settings whose values no message repeats."""


def told(error: ValidationError | SettingsError) -> str:
    """Say in one line which variable is wrong, its value unless it is a secret, and what may be."""
    if isinstance(error, SettingsError):
        field = _FIELD.search(str(error))
        name = "" if field is None else f"STILL_{field[1].upper()}: "
        doc = getattr(error.__cause__, "doc", None)
        return f"{name}not JSON" + (f"; got {doc!r}" if doc is not None else "") + "; write JSON"
    lines = []
    for wrong in error.errors(include_url=False):
        field_name = "_".join(str(step) for step in wrong["loc"][:1])
        message = wrong["msg"].removeprefix("Value error, ")
        if not field_name:
            lines.append(message)
        elif field_name in SECRETS:
            lines.append(f"STILL_{field_name.upper()}: {message}")
        else:
            lines.append(f"STILL_{field_name.upper()}: {message}; got {wrong['input']!r}")
    return " ".join("; ".join(lines).split())


class Settings(BaseSettings):
    """What an operator decides. Durations are seconds (``30``, ``0.2``) or ISO 8601 (``PT30S``)."""

    model_config = SettingsConfigDict(env_prefix="STILL_", frozen=True, extra="ignore")

    data_dir: Path = Field(Path("stillroom-data"), description="Database, blobs, uploads, scratch.")
    database_url: str | None = Field(None, description="SQLAlchemy URL; null: SQLite in data_dir.")
    host: str = "127.0.0.1"
    port: int = Field(8321, ge=1, le=65_535)
    api_key: SecretStr | None = Field(
        None, min_length=16, description="The operator's key: every scope, the first project."
    )
    broker_url: SecretStr | None = Field(
        None, description="redis:// or rediss://; makes this the team mode."
    )
    key_secret: SecretStr | None = Field(
        None,
        min_length=32,
        description="Keys are stored as HMAC-SHA256 under it; null: made once in data_dir.",
    )
    metrics_key: SecretStr | None = Field(
        None, min_length=16, description="Opens /metrics and nothing else."
    )
    otel_endpoint: str | None = Field(
        None, description="OTLP over HTTP, such as http://collector:4318; null: no traces."
    )
    node: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Name of this machine; null: its own."
    )
    devices: tuple[str, ...] = Field(
        (), description="One embedded worker each, as JSON; empty: every GPU, or one on the CPU."
    )
    threads: int | None = Field(None, ge=1, description="Per worker; null: cores over workers.")
    memory_bytes: int | None = Field(
        None, ge=1 << 20, description="What a worker offers; null: what its device has."
    )
    lease: Duration = Field(
        timedelta(seconds=20),
        ge=timedelta(seconds=2),
        le=timedelta(hours=1),
        description="Renewed every second; a worker silent for so long loses its chunk.",
    )
    poll: Duration = timedelta(milliseconds=200)
    stall_limit: Duration = Field(
        timedelta(minutes=15), description="A chunk that reports no progress for so long is ended."
    )
    stop_limit: Duration = Field(
        timedelta(seconds=30), description="A cancelled chunk that runs on for so long is ended."
    )
    soft_stop: Duration = Field(
        timedelta(seconds=60),
        description="A worker told to end gives its chunk back after so long.",
    )
    attempts: dict[str, Annotated[int, Field(ge=1, le=100)]] = Field(
        default_factory=dict,
        description="Error code -> tries of a chunk in all, over the product's own table.",
    )
    retry_wait: Duration = Field(
        timedelta(seconds=5),
        description="Until a chunk is tried again where it failed; others may at once.",
    )
    usage_half_life: Duration = Field(
        timedelta(days=1), description="Device time that a project used counts half after so long."
    )
    entry_penalty: Duration = Field(
        timedelta(seconds=10), description="A chunk that starts counts so long at once."
    )
    rate_limit: str | None = Field(
        None, description="Requests of one key, such as 600/minute; null: none."
    )
    model_roots: tuple[Path, ...] = Field(
        (),
        description="Folders of language models that import_model may read, as JSON; the same on "
        "every worker. Empty: none.",
    )
    body_limit_bytes: int = Field(1 << 20, ge=1024, description="Of a JSON body.")
    part_limit_bytes: int = Field(64 << 20, ge=1 << 16, description="Of one upload part.")
    upload_limit_bytes: int = Field(8 << 30, ge=1 << 20, description="Of one uploaded file.")
    uploads_open_limit: int = Field(64, ge=1, description="Unfinished uploads at once.")
    import_memory_bytes: int = Field(8 << 30, ge=1 << 28, description="Of the import sandbox.")
    import_timeout: Duration = timedelta(minutes=10)
    imports_at_once: int = Field(2, ge=1, le=64, description="Others wait for their turn.")
    parts_at_once: int = Field(16, ge=1, le=256, description="Upload parts received at once.")
    body_idle: Duration = Field(
        timedelta(seconds=30), description="A body of which nothing comes for so long is refused."
    )

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        if value == Path():
            raise ValueError("no folder is named; leave it out for stillroom-data")
        try:
            return value.expanduser().resolve()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"no such folder: {error}") from None

    @field_validator("model_roots")
    @classmethod
    def _whole_roots(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        found = []
        for root in value:
            try:
                place = root.expanduser()
                if not place.is_absolute():
                    raise ValueError(f"{str(root)!r} is relative; write whole paths")
                found.append(place.resolve())
            except (OSError, RuntimeError) as error:
                raise ValueError(f"no such folder: {error}") from None
        return tuple(found)

    @field_validator("broker_url")
    @classmethod
    def _whole_url(cls, value: SecretStr | None) -> SecretStr | None:
        try:
            parts = urlsplit("" if value is None else value.get_secret_value())
            whole = value is None or (bool(parts.hostname) and parts.port != 0)
        except ValueError:
            whole = False
        if not whole or not _DATABASE.fullmatch(parts.path):
            # Not what was given, nor what the library says of it: both may hold the password.
            raise ValueError(
                "not an address; write it like redis://:password@host:6379/0, with what is not a "
                "letter or digit in the password percent-encoded"
            )
        return value

    @field_validator("otel_endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value is not None and "://" in value and not urlsplit(value).hostname:
            raise ValueError("it names no host; write it like http://collector:4318")
        return value

    @field_validator("devices")
    @classmethod
    def _known_devices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for device in value:
            if not _DEVICE.fullmatch(device):
                raise ValueError(f"no device {device!r}; allowed: cpu, cuda:0, cuda:1 and so on")
        return value

    @field_validator("attempts")
    @classmethod
    def _tried_again(cls, value: dict[str, int]) -> dict[str, int]:
        tried = sorted(one.code() for one in StillroomError.__subclasses__() if one.attempts > 1)
        for code in value:
            if code not in tried:
                raise ValueError(f"no error {code!r} is tried again; allowed: {', '.join(tried)}")
        return value

    @model_validator(mode="after")
    def _open_door(self) -> "Settings":
        if self.api_key is not None:
            if self.metrics_key == self.api_key:
                raise ValueError("STILL_METRICS_KEY is STILL_API_KEY, which opens all; take two")
            return self
        if not self.loopback:
            raise ValueError(
                f"host {self.host!r} is reachable from outside: set STILL_API_KEY to at least "
                "16 characters, or bind to 127.0.0.1"
            )
        if self.broker_url is not None:
            raise ValueError("team mode needs STILL_API_KEY, of at least 16 characters")
        return self

    @model_validator(mode="after")
    def _whole_team(self) -> "Settings":
        if self.broker_url is None:
            return self
        scheme = self.broker_url.get_secret_value().partition("://")[0]
        if scheme not in ("redis", "rediss"):
            raise ValueError("STILL_BROKER_URL must begin with redis:// or rediss://")
        if not (self.database_url or "").startswith("postgresql"):
            raise ValueError(
                "team mode (STILL_BROKER_URL is set) needs STILL_DATABASE_URL to name a "
                "PostgreSQL database: postgresql+psycopg://user:password@host/name"
            )
        return self

    @model_validator(mode="after")
    def _roots_apart(self) -> "Settings":
        for root in self.model_roots:
            if self.data_dir.is_relative_to(root) or root.is_relative_to(self.data_dir):
                raise ValueError(
                    f"STILL_MODEL_ROOTS: {str(root)!r} and STILL_DATA_DIR {str(self.data_dir)!r} "
                    "lie in each other; keep models and the service's own files apart"
                )
        return self

    @cached_property
    def team(self) -> bool:
        """Whether workers are processes of their own that hear of work through a broker."""
        return self.broker_url is not None

    @cached_property
    def node_name(self) -> str:
        """The name of this machine in the pool."""
        return self.node or socket.gethostname()

    @cached_property
    def loopback(self) -> bool:
        """Whether only this machine can reach the API."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    @cached_property
    def url(self) -> str:
        """The SQLAlchemy URL in force."""
        return self.database_url or f"sqlite:///{self.data_dir / 'stillroom.db'}"

    @cached_property
    def owner_prefix(self) -> str:
        """How the names of this server's own workers begin: its host and data folder."""
        folder = hashlib.sha256(str(self.data_dir).encode()).hexdigest()[:12]
        return f"{socket.gethostname()}:{folder}:"

    @cached_property
    def scratch(self) -> Path:
        """Where chunks work; emptied when the server starts."""
        return self.data_dir / "scratch"

    @cached_property
    def uploads(self) -> Path:
        """Where parts of unfinished uploads wait."""
        return self.data_dir / "uploads"
