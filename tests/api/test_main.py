"""The whole command, as a user starts it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.api.conftest import ECHO

REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def start(folder: Path, **more: str) -> "subprocess.Popen[str]":
    inherited = dict(os.environ)  # noqa: TID251 - handed on to the server under test
    env = {name: value for name, value in inherited.items() if not name.startswith("STILL_")}
    env |= {"STILL_DATA_DIR": str(folder), "STILL_DEVICES": '["cpu"]', **more}
    return subprocess.Popen(
        [sys.executable, "-m", "api"], cwd=REPOSITORY, env=env, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    port = free_port()
    process = start(tmp_path / "data", STILL_PORT=str(port))
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/readyz").json()["workers"]:
                break
        time.sleep(0.1)
    yield process, url
    process.kill()
    process.communicate()


def test_one_command_serves_runs_and_ends_on_sigterm(
    served: tuple["subprocess.Popen[str]", str],
) -> None:
    process, url = served
    job = httpx2.post(f"{url}/v1/jobs", json=ECHO).json()
    with httpx2.stream(
        "GET", f"{url}/v1/jobs/{job['id']}/events", headers={"Accept": "text/event-stream"}
    ) as stream:
        assert "event: job.succeeded" in "".join(stream.iter_text())

    waiting = httpx2.post(f"{url}/v1/jobs", json={**ECHO, "times": 10_000}).json()
    with httpx2.stream(
        "GET", f"{url}/v1/jobs/{waiting['id']}/events", headers={"Accept": "text/event-stream"}
    ) as stream:
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(httpx2.TransportError):
            for _ in stream.iter_text():
                pass
    _, log = process.communicate(timeout=20)

    assert process.returncode == 0, log
    assert time.monotonic() - began < 10
    assert all(json.loads(line) for line in log.splitlines() if line.startswith("{"))
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"STILL_PORT": "x"}, "STILL_PORT"),
        ({"STILL_HOST": "0.0.0.0"}, "STILL_API_KEY"),
        ({"STILL_API_KEY": "short-secret"}, "STILL_API_KEY"),
        ({"STILL_DEVICES": "cpu"}, "devices"),
        ({"STILL_HOST": "no.such.host.invalid", "STILL_API_KEY": "x" * 16}, "stillroom: "),
        ({"STILL_DATA_DIR": "/proc/nothing"}, "/proc/nothing"),
    ],
)
def test_bad_settings_are_one_line_and_status_2(
    tmp_path: Path, settings: dict[str, str], told: str
) -> None:
    process = start(tmp_path, **{"STILL_PORT": str(free_port()), **settings})
    _, log = process.communicate(timeout=60)

    assert process.returncode == 2
    assert told in log
    assert log.count("\n") == 1
    assert "short-secret" not in log


def test_busy_port_is_one_line_and_status_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start(tmp_path, STILL_PORT=str(taken.getsockname()[1]))
        _, log = process.communicate(timeout=60)

    assert process.returncode == 2
    assert "in use" in log
    assert log.count("\n") == 1


def test_api_process_never_imports_torch(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from starlette.testclient import TestClient
from api.app import create_app
from core.settings import Settings
app = create_app(Settings(data_dir=Path(sys.argv[1])), workers=False)
with TestClient(app, base_url="http://127.0.0.1") as client:
    for kind in client.get("/v1/kinds").json()["items"]:
        client.post("/v1/jobs", json=kind["example"])
    assert client.get("/").status_code == client.get("/docs").status_code == 200
heavy = {"torch", "sklearn", "onnx", "matplotlib"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
