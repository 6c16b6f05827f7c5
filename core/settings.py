"""Every setting, read once from STILL_* variables. The mode of the service is settings alone."""

import hashlib
import re
import socket
from datetime import timedelta
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?")
_DEVICE = re.compile(r"cpu|cuda:\d{1,3}")


def _from_seconds(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


Duration = Annotated[timedelta, BeforeValidator(_from_seconds), Field(gt=timedelta(0))]


class Settings(BaseSettings):
    """What an operator decides. Durations are seconds (``30``, ``0.2``) or ISO 8601 (``PT30S``)."""

    model_config = SettingsConfigDict(env_prefix="STILL_", frozen=True, extra="ignore")

    data_dir: Path = Field(Path("stillroom-data"), description="Database, blobs, uploads, scratch.")
    database_url: str | None = Field(None, description="SQLAlchemy URL; null: SQLite in data_dir.")
    host: str = "127.0.0.1"
    port: int = Field(8321, ge=1, le=65_535)
    api_key: SecretStr | None = Field(None, min_length=16, description="Asked of every request.")
    devices: tuple[str, ...] = Field(
        (), description="One embedded worker each, as JSON; empty: every GPU, or one on the CPU."
    )
    threads: int | None = Field(None, ge=1, description="Per worker; null: cores over workers.")
    lease: Duration = timedelta(seconds=30)
    poll: Duration = timedelta(milliseconds=200)
    stall_limit: Duration = Field(
        timedelta(minutes=15), description="A chunk that reports no progress for so long is ended."
    )
    stop_limit: Duration = Field(
        timedelta(seconds=30), description="A cancelled chunk that runs on for so long is ended."
    )
    max_failures: int = Field(3, ge=1, description="Tries of a chunk before its job fails.")
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
        return value.expanduser().resolve()

    @field_validator("devices")
    @classmethod
    def _known_devices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for device in value:
            if not _DEVICE.fullmatch(device):
                raise ValueError(f"no device {device!r}; allowed: cpu, cuda:0, cuda:1 and so on")
        return value

    @model_validator(mode="after")
    def _open_door(self) -> "Settings":
        if self.api_key is None and not self.loopback:
            raise ValueError(
                f"host {self.host!r} is reachable from outside: set STILL_API_KEY to at least "
                "16 characters, or bind to 127.0.0.1"
            )
        return self

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
