"""What a worker, or the beat, is told: words of its command line, and variables. Light to load."""

import re
from typing import Any

from pydantic import ValidationError, model_validator
from pydantic_settings import SettingsError

from core.settings import Settings

DEVICE = re.compile(r"cpu|cuda:\d{1,3}")


class StartRefused(RuntimeError):
    """This process cannot work as it was started; the message says why, in one line."""


class WorkerSettings(Settings):
    """The settings of a process that serves nobody: it needs no key, and should get none."""

    @model_validator(mode="after")
    def _open_door(self) -> "WorkerSettings":
        return self


def read_settings(*, team: bool) -> Settings:
    """Return the settings.

    Raises:
        StartRefused: a variable is wrong, or team mode lacks its two addresses.
    """
    try:
        settings = WorkerSettings()
    except ValidationError as error:
        raise StartRefused("; ".join(map(_wrong, error.errors(include_url=False)))) from None
    except SettingsError as error:
        raise StartRefused(f"{' '.join(str(error).split())}; write it as JSON") from None
    if team and settings.broker_url is None:
        raise StartRefused("STILL_BROKER_URL is not set; write it like redis://:password@host/0")
    return settings


def _wrong(error: Any) -> str:
    """Name the variable and what was wrong; not its value, which may hold a password."""
    name = "_".join(str(step) for step in error["loc"][:1]).upper()
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"STILL_{name}: {message}" if name else message
