"""Team mode: several servers on one data folder, one PostgreSQL and one Redis."""

import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.app import DoorOpen, create_app
from core.db.models import Chunk, Job
from core.db.session import reading, transaction
from core.jobs import pool
from core.jobs.hints import CeleryHints
from core.jobs.pool import Place
from core.settings import Settings
from scripts.processes import Guard
from scripts.servers import REDIS_MISSING, Redis
from tests.api.conftest import (
    ECHO,
    KEY,
    OPERATOR,
    context_of,
    key_of,
    make_project,
    make_settings,
    runner_of,
    serving,
)
from tests.conftest import Clock

pytestmark = pytest.mark.parametrize("engine", ["postgresql"], indirect=True)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Redis]:
    if shutil.which("redis-server") is None and not os.environ.get("CI"):  # noqa: TID251
        pytest.skip(REDIS_MISSING)
    guard = Guard()
    server = Redis(tmp_path, guard, env=dict(os.environ))  # noqa: TID251 - handed on whole
    server.wait()
    yield server
    server.process.kill()
    guard.close()


@pytest.fixture
def team(engine: Engine, broker: Redis, tmp_path: Path) -> Settings:
    url = engine.url.render_as_string(hide_password=False)
    return make_settings(
        tmp_path / "data", api_key=KEY, database_url=url, broker_url=broker.url, node="n"
    )


@pytest.fixture
def both(team: Settings, clock: Clock) -> Iterator[tuple[TestClient, TestClient]]:
    with serving(team, clock) as one, serving(team, clock) as two:
        yield one, two


def test_a_key_made_at_one_server_opens_the_other(
    both: tuple[TestClient, TestClient], clock: Clock
) -> None:
    one, two = both
    key = key_of(one, make_project(one, "mine"))
    actor = two.get("/v1/me", headers=key).json()["actor"]
    job = two.post("/v1/jobs", json=ECHO, headers=key).json()["id"]

    assert one.get(f"/v1/jobs/{job}", headers=key).json()["submitted_by"] == actor
    one.delete(f"/v1/keys/{actor}", headers=OPERATOR)
    clock.tick(seconds=2)
    assert two.get("/v1/me", headers=key).status_code == 401
    one.cookies.clear()
    one.post("/login", data={"key": KEY})
    two.cookies.update(one.cookies)
    assert two.get("/").status_code == 200


def test_a_team_has_no_workers_of_the_server_and_the_lock_stays_free(
    both: tuple[TestClient, TestClient], team: Settings
) -> None:
    for server in both:
        assert not context_of(server).embedded
        assert server.get("/readyz").json()["status"] == "ok"
    assert not (team.data_dir / "still.lock").exists()


def test_a_server_that_starts_takes_no_chunk_from_the_living(
    team: Settings, clock: Clock, engine: Engine
) -> None:
    with serving(team, clock) as server:
        job = server.post("/v1/jobs", json=ECHO, headers=OPERATOR).json()["id"]
        runner = runner_of(server)
        with transaction(engine) as session:
            chunk = session.query(Chunk).filter_by(job_id=job, index=0).one()
            chunk.state, chunk.owner, chunk.attempt = "running", runner.owner, 1
            chunk.owner, chunk.lease_until = f"{team.owner_prefix}1:cpu", clock()
    with serving(team, clock), reading(engine) as session:
        chunk = session.query(Chunk).filter_by(job_id=job, index=0).one()
        assert (chunk.state, chunk.attempt) == ("running", 1)


def test_a_submitted_job_wakes_a_worker_once_it_is_committed(
    both: tuple[TestClient, TestClient], broker: Redis, clock: Clock, engine: Engine
) -> None:
    one, _ = both
    place = Place(node="n:cpu", device="cpu", memory_bytes=1 << 40)
    with transaction(engine) as session:
        pool.hello(session, "w", place=place, now=clock())

    one.post("/v1/jobs", json=ECHO, headers=OPERATOR)
    hints = context_of(one).hints
    assert isinstance(hints, CeleryHints)
    hints.close(limit=timedelta(seconds=30))  # connecting takes long on a machine at work

    with redis.Redis.from_url(broker.url) as client:
        assert client.llen("cpu") == 1
        assert client.llen("gpu") == 0


def test_a_broker_that_is_away_delays_no_answer(
    both: tuple[TestClient, TestClient], broker: Redis, clock: Clock, engine: Engine
) -> None:
    one, _ = both
    with transaction(engine) as session:
        place = Place(node="n:cpu", device="cpu", memory_bytes=1 << 40)
        pool.hello(session, "w", place=place, now=clock())
    broker.process.kill()

    job = one.post("/v1/jobs", json=ECHO, headers=OPERATOR)

    assert job.status_code == 201
    assert job.elapsed.total_seconds() < 5
    with reading(engine) as session:
        assert session.get_one(Job, job.json()["id"]).state == "queued"


def test_a_team_without_the_operators_key_is_not_served(team: Settings) -> None:
    # As a worker has them: it gets no key.
    with pytest.raises(DoorOpen, match="STILL_API_KEY"):
        create_app(team.model_copy(update={"api_key": None}))
