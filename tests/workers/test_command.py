"""``still worker`` and ``still beat`` become ``python -m workers``."""

import os
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from client.commands import worker
from client.commands.worker import NEEDED, beat
from client.commands.worker import worker as work

BROKER = "redis://:word@host:6379/0"
DATABASE = "postgresql+psycopg://still:word@host/still"


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have taken this process's place."""
    told: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: told.append(arguments))
    for name in ("STILL_BROKER_URL", "STILL_DATABASE_URL", "STILL_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_worker_takes_its_settings_from_options_and_variables(became: list[Any]) -> None:
    options = ["--device", "cuda:1", "--threads", "2", "--data-dir", "d", "--node", "mill"]
    result = CliRunner().invoke(
        work,
        [*options, "--broker-url", BROKER],
        env={"STILL_DATABASE_URL": DATABASE, "STILL_API_KEY": "of-a-person-and-no-worker"},
    )

    assert result.exit_code == 0, result.output
    [(program, command, env)] = became
    assert program == sys.executable
    assert command == [sys.executable, "-P", "-m", "workers", "--device", "cuda:1"]
    assert {name: env[name] for name in env if name.startswith("STILL_")} == {
        "STILL_THREADS": "2",
        "STILL_DATA_DIR": "d",
        "STILL_NODE": "mill",
        "STILL_BROKER_URL": BROKER,
        "STILL_DATABASE_URL": DATABASE,
    }


def test_beat_needs_neither_device_nor_torch(
    became: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set(NEEDED)
    monkeypatch.setattr(worker, "find_spec", lambda name: name if name in found else None)

    without_torch = CliRunner().invoke(work, ["--device", "cpu"])
    result = CliRunner().invoke(beat, [])

    assert without_torch.exit_code == 1
    assert "missing: torch" in without_torch.output
    assert "pip install 'stillroom[worker,team]'" in without_torch.output
    assert result.exit_code == 0, result.output
    assert became[0][1][1:] == ["-P", "-m", "workers", "--beat"]


def test_help_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILL_BROKER_URL", BROKER)
    monkeypatch.setenv("STILL_DATABASE_URL", DATABASE)

    for command in (work, beat):
        told = CliRunner().invoke(command, ["--help"]).output
        assert "word" not in told.replace(":password@", "")
        assert "STILL_BROKER_URL" in told
