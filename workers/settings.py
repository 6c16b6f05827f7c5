"""What a worker, or the beat, is told: words of its command line, and variables. Light to load."""

import re

from pydantic import ValidationError, model_validator
from pydantic_settings import SettingsError

from core.settings import Settings, told

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
    except (ValidationError, SettingsError) as error:
        raise StartRefused(told(error)) from None
    if team and settings.broker_url is None:
        raise StartRefused("STILL_BROKER_URL is not set; write it like redis://:password@host/0")
    return settings
