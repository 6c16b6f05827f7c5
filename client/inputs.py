"""Types of what is typed after ``still``: what cannot be sent is refused with the option's name."""

import math
from typing import Any

import click

from client import references, strict


class Text(click.ParamType[str]):
    """Text that UTF-8 can hold; a shell also passes stray bytes."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return ``value``, or end the command."""
        text = str(value)
        if not strict.is_text(text):
            self.fail(f"{text[:60]!r} holds bytes that are not UTF-8", param, ctx)
        return text


class JobId(Text):
    """The id of a job."""

    name = "job"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return ``value``, or end the command."""
        text = super().convert(value, param, ctx)
        if not references.is_job_id(text):
            self.fail(f"{references.not_a_job(text)}; `still ls` lists them", param, ctx)
        return text


class Finite(click.FloatRange):
    """A number within bounds; neither nan nor inf, which pass any bound."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return ``value``, or end the command."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


TEXT, JOB_ID = Text(), JobId()
