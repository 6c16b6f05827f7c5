"""The real application on a temporary data folder; the real Runner is called by hand."""

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.app import create_app
from api.deps import Context
from core.db.session import transaction
from core.errors import OutOfMemory
from core.jobs import lease
from core.jobs.lease import Claim
from core.jobs.runner import Runner
from core.settings import Settings
from tests import life
from tests.conftest import DATABASES, Clock, fresh_database, make_runner

KEY = "a-key-of-some-length"
ECHO = {"kind": "echo", "text": "hello", "times": 2}


def make_settings(folder: Path, **more: Any) -> Settings:
    return Settings(data_dir=folder, **more)


@contextmanager
def serving(settings: Settings, clock: Clock) -> Iterator[TestClient]:
    app = create_app(settings, clock=clock, workers=False)
    with TestClient(
        app, base_url="http://127.0.0.1", raise_server_exceptions=False, follow_redirects=False
    ) as client:
        yield client


@pytest.fixture(scope="session")
def api_clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session", params=DATABASES)
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, api_clock: Clock
) -> Iterator[TestClient]:
    """One server for all tests that do not mind each other's jobs."""
    folder = tmp_path_factory.mktemp("data")
    with (
        fresh_database(request, folder) as url,
        serving(make_settings(folder, database_url=url), api_clock) as client,
    ):
        yield client


@pytest.fixture(scope="session", params=DATABASES)
def locked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, api_clock: Clock
) -> Iterator[TestClient]:
    """A server with a key."""
    folder = tmp_path_factory.mktemp("locked")
    with fresh_database(request, folder) as url:
        settings = make_settings(folder, api_key=KEY, database_url=url)
        with serving(settings, api_clock) as client:
            yield client


@pytest.fixture(params=DATABASES)
def alone(request: pytest.FixtureRequest, tmp_path: Path, api_clock: Clock) -> Iterator[TestClient]:
    """A server of this test only, with small limits."""
    limits = {"body_limit_bytes": 2048, "part_limit_bytes": 1 << 16, "uploads_open_limit": 3}
    with fresh_database(request, tmp_path / "data") as url:
        settings = make_settings(tmp_path / "data", database_url=url, **limits)
        with serving(settings, api_clock) as client:
            yield client


@pytest.fixture
def shared(engine: Engine, tmp_path: Path, clock: Clock) -> Iterator[TestClient]:
    """A server of this test only, with an operator's key, on either database."""
    url = engine.url.render_as_string(hide_password=False)
    settings = make_settings(tmp_path / "data", api_key=KEY, database_url=url)
    with serving(settings, clock) as server:
        yield server


def context_of(client: TestClient) -> Context:
    found: Context = client.app.state.context  # type: ignore[attr-defined]
    return found


def runner_of(client: TestClient) -> Runner:
    context = context_of(client)
    scratch = context.settings.scratch
    return make_runner(context.engine, context.store, context.clock, scratch)


@pytest.fixture
def finish(client: TestClient) -> Callable[[], None]:
    def run_all() -> None:
        runner = runner_of(client)
        while runner.run_one():
            pass

    return run_all


@pytest.fixture
def done(client: TestClient, finish: Callable[[], None]) -> dict[str, Any]:
    """A finished echo job."""
    job_id = client.post("/v1/jobs", json={**ECHO, "name": "done"}).json()["id"]
    finish()
    job: dict[str, Any] = client.get(f"/v1/jobs/{job_id}").json()
    assert job["state"] == "succeeded"
    return job


OPERATOR = {"Authorization": f"Bearer {KEY}"}
SCOPES = ("read", "submit", "admin")


def make_project(server: TestClient, name: str, **limits: Any) -> str:
    """Make a project as the operator and return its id."""
    answer = server.post("/v1/projects", json={"name": name, **limits}, headers=OPERATOR)
    assert answer.status_code == 201, answer.text
    project_id: str = answer.json()["id"]
    return project_id


def key_of(server: TestClient, project: str, *scopes: str, **more: Any) -> dict[str, str]:
    """Make a key as the operator and return the header that shows it."""
    asked = {"project": project, "name": "test", "scopes": scopes or SCOPES, **more}
    answer = server.post("/v1/keys", json=asked, headers=OPERATOR)
    assert answer.status_code == 201, answer.text
    return {"Authorization": f"Bearer {answer.json()['key']}"}


def problem_of(response: Any, status: int, code: str) -> dict[str, Any]:
    """Check that an answer is a whole problem and return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["code"] == code
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["title"]
    assert body["detail"]
    assert body["instance"]
    assert isinstance(body["retryable"], bool)
    assert all(set(blame) == {"pointer", "detail"} for blame in body["errors"])
    return body


def pairs(**more: Any) -> bytes:
    """A small file of pairs, and whatever else is to lie in it."""
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    arrays = {name: rng.normal(size=(8, 4)) for name in ("query_embeddings", "target_embeddings")}
    np.savez(file, **arrays, **more)
    return file.getvalue()


def send(
    client: TestClient, url: str, offset: Any, content: Any, key: dict[str, str] | None = None
) -> Any:
    headers = {"Content-Type": "application/octet-stream", "Upload-Offset": str(offset)}
    return client.patch(url, content=content, headers={**headers, **(key or {})})


def upload(client: TestClient, content: bytes, key: dict[str, str] | None = None) -> str:
    """Send a file whole and return the URL of its upload."""
    key = key or {}
    url: str = client.post("/v1/uploads", json=announce(content), headers=key).headers["location"]
    assert send(client, url, 0, content, key).status_code == 200
    return url


def announce(content: bytes, file_name: str = "pairs.npz") -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {"file_name": file_name, "size_bytes": len(content), "sha256": digest}


@dataclass(frozen=True)
class Desk:
    """A server and the key of whoever works with it."""

    server: TestClient
    engine: Engine
    clock: Clock
    key: dict[str, str]

    def submit(self, **changes: Any) -> str:
        answer = self.server.post("/v1/jobs", json={**ECHO, **changes}, headers=self.key)
        assert answer.status_code == 201, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def act(self, method: str, path: str, **more: Any) -> Any:
        return self.server.request(method, f"/v1/jobs/{path}", headers=self.key, **more)

    def show(self, job_id: str) -> dict[str, Any]:
        shown: dict[str, Any] = self.act("GET", job_id).json()
        return shown

    def events(self, job_id: str) -> list[str]:
        return [one["type"] for one in self.act("GET", f"{job_id}/events").json()["items"]]

    def noted(self) -> list[tuple[str, str, dict[str, Any]]]:
        """What the audit log says, the oldest first."""
        found = self.server.get("/v1/audit", headers=OPERATOR).json()["items"]
        return [(one["action"], one["target"], one["data"]) for one in reversed(found)]

    def claim(self) -> Claim:
        return life.claim(self.engine, self.clock)

    def hand_back(self, claimed: Claim) -> None:
        with transaction(self.engine) as session:
            lease.hand_back(session, claimed, now=self.clock(), rules=life.RULES)

    def fail(self) -> None:
        life.give_up(self.engine, self.claim(), OutOfMemory("32 GiB needed"), self.clock)


@pytest.fixture
def desk(shared: TestClient, engine: Engine, clock: Clock) -> Desk:
    return Desk(shared, engine, clock, key_of(shared, "prj_default", "read", "submit"))
