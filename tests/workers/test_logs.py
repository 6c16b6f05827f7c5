"""Whoever looks for a job's id in the logs finds where it was taken."""

import json
import logging
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


def test_the_log_of_the_server_names_the_job_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, log = Lines(), logging.getLogger("stillroom.api")
    monkeypatch.setattr(log, "handlers", [kept])
    monkeypatch.setattr(log, "level", logging.INFO)
    with serving(make_settings(tmp_path), Clock()) as client:
        job_id = client.post("/v1/jobs", json=ECHO).json()["id"]

    [line] = [json.loads(line) for line in kept.lines if job_id in line]
    assert (line["job"], line["message"]) == (job_id, "submitted: echo")
