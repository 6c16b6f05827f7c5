"""Whoever looks for a job's id in the logs finds where it was taken."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.logs import JsonLines
from tests.api.conftest import ECHO, make_settings, serving
from tests.conftest import Clock


class Lines(logging.Handler):
    """Keeps what would be written."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def kept() -> Iterator[Lines]:
    """What the server logs."""
    lines, log = Lines(), logging.getLogger("stillroom.api")
    before = log.level
    log.addHandler(lines)
    log.setLevel(logging.INFO)  # unlike an assignment, it forgets what was asked of the level
    yield lines
    log.removeHandler(lines)
    log.setLevel(before)


def test_the_log_of_the_server_names_the_job_it_took(tmp_path: Path, kept: Lines) -> None:
    with serving(make_settings(tmp_path), Clock()) as client:
        job_id = client.post("/v1/jobs", json=ECHO).json()["id"]

    [line] = [json.loads(line) for line in kept.lines if job_id in line]
    assert (line["job"], line["message"]) == (job_id, "submitted: echo")
