"""``still project``, ``key`` and ``whoami`` against the real service, as an operator uses them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from client import Stillroom, StillroomError
from client.cli import still

KEY = "the-operators-own-key"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("service")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inherited = dict(os.environ)  # noqa: TID251 - handed on to the server under test
    env = {name: value for name, value in inherited.items() if not name.startswith("STILL_")}
    env |= {"STILL_DATA_DIR": str(folder / "data"), "STILL_PORT": str(port), "STILL_API_KEY": KEY}
    env |= {"STILL_DEVICES": '["cpu"]', "STILL_THREADS": "1"}
    with (folder / "log").open("ab") as log:
        command = [sys.executable, "-m", "api"]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    with Stillroom(address) as client:
        for _ in range(600):
            try:
                client.ready()
                break
            except StillroomError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
    yield address
    process.terminate()
    process.wait(30)


@pytest.fixture
def run(url: str, tmp_path: Path) -> Run:
    def invoke(*arguments: str, key: str = KEY) -> Result:
        env = {"STILL_URL": url, "STILL_API_KEY": key, "STILL_CACHE_DIR": str(tmp_path)}
        result = CliRunner().invoke(still, arguments, env=env)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result

    return invoke


def made(run: Run, *arguments: str) -> str:
    result = run("key", "create", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_operator_makes_a_project_and_a_key_that_works(run: Run) -> None:
    created = run("project", "create", "search", "--weight", "2", "--queued-limit", "5")
    assert created.exit_code == 0
    assert "queued   0 of 5 jobs" in created.stdout

    result = run("key", "create", "nightly", "--project", "search")
    key = result.stdout.strip()
    assert key.startswith("still_")
    assert "not shown again" in result.stderr
    assert key not in result.stderr

    who = run("whoami", key=key).stdout
    assert "search" in who
    assert "read, submit" in who
    assert run("ls", key=key).exit_code == 0
    refused = run("project", "ls", key=key)
    assert refused.exit_code == 1
    assert "this needs the scope admin; the key has: read, submit" in refused.stderr


def test_project_is_changed_by_name_and_limits_are_taken_away(run: Run) -> None:
    run("project", "create", "vision", "--running-limit", "3", "--storage-limit", "2G")
    changed = run("--json", "project", "set", "vision", "--running-limit", "none", "--weight", "3")
    found = json.loads(changed.stdout)

    assert found["running_limit"] is None
    assert found["weight"] == 3
    assert found["storage_limit_bytes"] == 2 << 30
    renamed = run("project", "set", found["id"], "--name", "sight", "--queued-limit", "0")
    assert "0 of 0 jobs" in renamed.stdout
    rows = [row.split("\t") for row in run("project", "ls").stdout.splitlines()]
    (row,) = [row for row in rows if row[1] == "sight"]
    assert row[2:] == ["3", "0", "0 of 0", "0 B of 2.0 GiB"]


def test_revoked_key_opens_nothing_within_two_seconds(run: Run) -> None:
    key = made(run, "short", "--scope", "read", "--expires", "12h")
    (row,) = [row for row in run("key", "ls").stdout.splitlines() if "\tshort\t" in row]
    key_id = row.split("\t")[0]
    assert key.startswith(row.split("\t")[1])
    assert key not in row
    assert run("ls", key=key).exit_code == 0

    assert run("key", "revoke", key_id).stdout == f"{key_id} revoked\n"
    time.sleep(2.1)

    refused = run("ls", key=key)
    assert refused.exit_code == 1
    assert "was revoked" in refused.stderr
    assert "\trevoked" in run("key", "ls", "--project", "default").stdout


def test_expiry_is_so_long_from_now(run: Run) -> None:
    run("key", "create", "brief", "--expires", "90m")
    found = json.loads(run("--json", "key", "ls").stdout)
    (brief,) = [one for one in found if one["name"] == "brief"]
    now = datetime.now(UTC)  # noqa: TID251 - as the command did

    left = datetime.fromisoformat(brief["expires_at"]) - now
    assert timedelta(minutes=88) < left <= timedelta(minutes=90)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["key", "create", "x", "--project", "nowhere"], "no project 'nowhere'; there are: "),
        (["key", "create", "x", "--scope", "root"], "'root' is not one of"),
        (["key", "create", "x", "--expires", "soon"], "allowed: 30d"),
        (["key", "create", "x", "--expires", "2030-01-01T00:00:00"], "allowed: 30d"),
        (["project", "create", "x", "--weight", "0"], "--weight"),
        (["project", "create", "x", "--weight", "nan"], "--weight"),
        (["project", "create", "x", "--queued-limit", "-1"], "allowed: none"),
        (["project", "create", "x", "--storage-limit", "2X"], "allowed: none"),
        (["project", "set", "default"], "nothing to change"),
        (["project", "set", "nowhere", "--weight", "1"], "there are: "),
    ],
)
def test_mistakes_are_usage_errors(run: Run, arguments: list[str], told: str) -> None:
    result = run(*arguments)

    assert result.exit_code == 2
    assert told in result.stderr


def test_a_key_given_instead_of_its_id_is_not_sent(run: Run) -> None:
    key = made(run, "leaky")

    result = run("key", "revoke", key)

    assert result.exit_code == 1
    assert "still key ls" in result.stderr
    assert key not in result.stderr


def test_name_that_is_taken_is_told(run: Run) -> None:
    result = run("project", "create", "default")

    assert result.exit_code == 1
    assert "a project named 'default' exists" in result.stderr
