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
from datetime import timedelta
from pathlib import Path

import httpx2
import pytest

from api.__main__ import _url, main
from api.app import open_data
from tests.api.conftest import ECHO, make_settings
from tests.conftest import wait_for

TEAM = {
    "STILL_BROKER_URL": "redis://127.0.0.1:1/0",
    "STILL_DATABASE_URL": "postgresql+psycopg://u:short-secret@127.0.0.1:1/y",
}
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
        [sys.executable, "-m", "api"],
        cwd=REPOSITORY,
        start_new_session=True,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    port = free_port()
    process = start(tmp_path / "data", STILL_PORT=str(port), STILL_BODY_IDLE="2")
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/readyz").status_code == 200:
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

    waiting = httpx2.post(f"{url}/v1/jobs", json={**ECHO, "times": 1_000}).json()
    with httpx2.stream(
        "GET", f"{url}/v1/jobs/{waiting['id']}/events", headers={"Accept": "text/event-stream"}
    ) as stream:
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(httpx2.TransportError):
            for _ in stream.iter_text():
                pass
    told, log = process.communicate(timeout=20)

    assert process.returncode == 0, log
    assert told == f"dashboard  {url}/\nAPI docs   {url}/docs\n"
    assert time.monotonic() - began < 10
    assert all(json.loads(line) for line in log.splitlines() if line.startswith("{"))
    assert "Traceback" not in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_server_and_worker_at_once_ends_both_in_silence(
    served: tuple["subprocess.Popen[str]", str], number: signal.Signals
) -> None:
    """As Ctrl-C on a terminal sends it."""
    process, url = served
    job = httpx2.post(f"{url}/v1/jobs", json=ECHO).json()["id"]
    wait_for(lambda: httpx2.get(f"{url}/v1/jobs/{job}").json()["state"] == "succeeded")

    os.killpg(process.pid, number)
    _, log = process.communicate(timeout=30)

    assert process.returncode == 0, log
    assert "Fatal" not in log
    assert "Traceback" not in log


def slow(url: str, request: str) -> socket.socket:
    """Begin a request whose body stops after its first byte."""
    host, _, port = url.removeprefix("http://").partition(":")
    sender = socket.create_connection((host, int(port)), timeout=30)
    head = f"{request} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n"
    sender.sendall(f"{head}Content-Type: application/json\r\nUpload-Offset: 0\r\n\r\n{{".encode())
    return sender


def answer_of(sender: socket.socket) -> tuple[int, str]:
    with sender, sender.makefile("rb") as answer:
        whole = answer.read().decode()
    return int(whole.split(" ", 2)[1]), whole


def test_slow_uploads_stop_nobody_and_are_ended(
    served: tuple["subprocess.Popen[str]", str],
) -> None:
    _, url = served
    about = {"file_name": "x", "size_bytes": 9, "sha256": "a" * 64}
    uploads = [httpx2.post(f"{url}/v1/uploads", json=about).json()["id"] for _ in range(50)]
    began = time.monotonic()
    senders = [slow(url, f"PATCH /v1/uploads/{one}") for one in uploads]
    senders.append(slow(url, "POST /v1/jobs"))

    for path in ("/healthz", "/readyz", "/v1/jobs", "/"):
        assert httpx2.get(f"{url}{path}", timeout=5).status_code == 200, path
    assert time.monotonic() - began < 20  # one after another, they would wait for minutes

    answers = [answer_of(sender) for sender in senders]
    assert {status for status, _ in answers} <= {408, 503}
    assert answers[0][0] == answers[-1][0] == 408
    assert '"code":"body_stalled"' in answers[0][1]
    assert '"retryable":true' in answers[0][1]
    # What came is kept, and the upload goes on from there.
    assert httpx2.get(f"{url}/v1/uploads/{uploads[0]}").json()["received_bytes"] == 1
    rest = {"Upload-Offset": "1"}
    sent = httpx2.patch(f"{url}/v1/uploads/{uploads[0]}", content=b"x" * 8, headers=rest)
    assert sent.json()["received_bytes"] == 9


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "http://127.0.0.1:9"),
        ("0.0.0.0", "http://127.0.0.1:9"),
        ("::", "http://[::1]:9"),
        ("::1", "http://[::1]:9"),
        ("still.example", "http://still.example:9"),
    ],
)
def test_announced_address_can_be_opened(host: str, shown: str) -> None:
    assert _url(host, 9) == shown


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"STILL_DEVICES": '["gpu"]'}, "STILL_DEVICES: no device 'gpu'; allowed: cpu, cuda:0"),
        ({"STILL_LEASE": "soon"}, "STILL_LEASE"),
        ({"STILL_POLL": "0"}, "STILL_POLL"),
        ({"STILL_DATABASE_URL": "nope"}, "STILL_DATABASE_URL: not a database URL"),
        ({"STILL_DATABASE_URL": "postgresql://u:short-secret@h:x/y"}, "STILL_DATABASE_URL: not"),
        ({"STILL_DATABASE_URL": "mysql://u:short-secret@h/y"}, "allowed: sqlite, postgresql"),
        ({"STILL_DATABASE_URL": "postgresql+none://u:short-secret@h/y"}, "no driver"),
        (
            {"STILL_DATABASE_URL": "postgresql+psycopg://u:short-secret@127.0.0.1:1/y"},
            "does not open: ",
        ),
        ({"STILL_DATABASE_URL": "sqlite:////proc/nothing/x.db"}, "/proc/nothing"),
        ({"STILL_PORT": "x"}, "STILL_PORT"),
        ({"STILL_HOST": "0.0.0.0"}, "STILL_API_KEY"),
        ({"STILL_API_KEY": "short-secret"}, "STILL_API_KEY"),
        ({"STILL_DEVICES": "cpu"}, "STILL_DEVICES: not JSON; got 'cpu'; write JSON"),
        ({"STILL_LEASE": "0.5"}, "STILL_LEASE: "),
        ({"STILL_LEASE": "P9999D"}, "STILL_LEASE: "),
        ({"STILL_SOFT_STOP": "P999999999D"}, "STILL_SOFT_STOP: "),
        ({"STILL_ATTEMPTS": '{"worker_lst": 3}'}, "STILL_ATTEMPTS: no error 'worker_lst' is tried"),
        ({"STILL_DATA_DIR": "~nobody-of-this-name/x"}, "STILL_DATA_DIR: no such folder"),
        ({"STILL_DATA_DIR": ""}, "STILL_DATA_DIR: no folder is named"),
        ({"STILL_MODEL_ROOTS": "/srv"}, "STILL_MODEL_ROOTS: not JSON"),
        ({"STILL_MODEL_ROOTS": '["models"]'}, "STILL_MODEL_ROOTS: 'models' is relative"),
        ({"STILL_MODEL_ROOTS": '["~nobody-of-this-name"]'}, "STILL_MODEL_ROOTS: no such folder"),
        ({"STILL_MODEL_ROOTS": '["/"]'}, "STILL_MODEL_ROOTS: '/' and STILL_DATA_DIR"),
        ({"STILL_OTEL_ENDPOINT": "http://"}, "STILL_OTEL_ENDPOINT: it names no host"),
        ({"STILL_HOST": "no.such.host.invalid", "STILL_API_KEY": "x" * 16}, "stillroom: "),
        ({"STILL_DATA_DIR": "/proc/nothing"}, "/proc/nothing"),
        ({"STILL_RATE_LIMIT": "often"}, "STILL_RATE_LIMIT: 'often' is no limit"),
        ({"STILL_KEY_SECRET": "short-secret"}, "STILL_KEY_SECRET: "),
        ({"STILL_METRICS_KEY": "short-secret"}, "STILL_METRICS_KEY: "),
        ({"STILL_OTEL_ENDPOINT": "collector"}, "STILL_OTEL_ENDPOINT must begin"),
        (TEAM, "team mode needs STILL_API_KEY"),
        (
            {**TEAM, "STILL_API_KEY": "x" * 16, "STILL_BROKER_URL": "amqp://u:short-secret@h"},
            "STILL_BROKER_URL must begin with redis://",
        ),
        *(
            ({**TEAM, "STILL_API_KEY": "x" * 16, "STILL_BROKER_URL": url}, "STILL_BROKER_URL: not")
            for url in (
                "redis://:short-secret/more@h:6379/0",
                "redis://:short-secret@h:abc/0",
                "redis://:short-secret@[::1/0",
                "redis://:short-secret@h/notadb",
                "redis://",
            )
        ),
        (
            {**TEAM, "STILL_API_KEY": "x" * 16, "STILL_DATABASE_URL": "sqlite:///x.db"},
            "needs STILL_DATABASE_URL to name a PostgreSQL database",
        ),
    ],
)
def test_bad_settings_are_one_line_and_status_2(
    tmp_path: Path,
    settings: dict[str, str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {
        "STILL_DATA_DIR": str(tmp_path),
        "STILL_DEVICES": '["cpu"]',
        "STILL_PORT": str(free_port()),
        **settings,
    }
    for name in list(os.environ):  # noqa: TID251 - as in ``start``
        if name.startswith("STILL_"):
            monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    status = main()

    said, log = capsys.readouterr()
    assert status == 2
    assert said == ""
    assert told in log
    assert log.count("\n") == 1
    assert "short-secret" not in log


def test_durations_are_seconds_or_iso_8601(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILL_LEASE", "30")
    monkeypatch.setenv("STILL_POLL", "0.2")
    monkeypatch.setenv("STILL_STALL_LIMIT", "PT15M")

    settings = make_settings(tmp_path)

    assert settings.lease == timedelta(seconds=30)
    assert settings.poll == timedelta(milliseconds=200)
    assert settings.stall_limit == timedelta(minutes=15)


def test_model_roots_are_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("/srv")
    monkeypatch.setenv("STILL_MODEL_ROOTS", f'["{tmp_path}/link/models", "/opt/hub/"]')

    assert make_settings(tmp_path / "data").model_roots == (Path("/srv/models"), Path("/opt/hub"))


def test_busy_port_is_one_line_and_status_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start(tmp_path, STILL_PORT=str(taken.getsockname()[1]))
        said, log = process.communicate(timeout=60)

    assert process.returncode == 2
    assert said == ""
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


def test_a_database_of_another_data_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    open_data(make_settings(mine))[0].dispose()

    with start(other, STILL_DATABASE_URL=f"sqlite:///{mine / 'stillroom.db'}") as process:
        said = process.communicate(timeout=60)[1]

    assert process.returncode == 2
    assert "set STILL_DATA_DIR" in said
    assert len(said.splitlines()) == 1
