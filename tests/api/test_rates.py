"""The limit on how often one key may ask: in memory, and in a real Redis that goes away."""

import asyncio
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from api.rates import BadLimit, Rates, make_rates, read_limit
from core.settings import Settings
from scripts.processes import Guard
from scripts.servers import REDIS_MISSING, Redis
from tests.api.conftest import KEY, OPERATOR, key_of, make_settings, problem_of, serving
from tests.conftest import Clock


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[TestClient]:
    settings = make_settings(tmp_path, api_key=KEY, rate_limit="4/hour")
    with serving(settings, Clock()) as server:
        yield server


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Redis]:
    if shutil.which("redis-server") is None and not os.environ.get("CI"):  # noqa: TID251
        pytest.skip(REDIS_MISSING)
    guard = Guard()
    server = Redis(tmp_path, guard, env=dict(os.environ))  # noqa: TID251 - handed on whole
    server.wait()
    yield server
    server.process.kill()
    guard.close()


def shared_rates(folder: Path, url: str) -> Rates:
    # Not through the validators: all that is asked here are the two fields.
    settings = make_settings(folder, rate_limit="3/hour")
    team: Settings = settings.model_copy(update={"broker_url": SecretStr(url)})
    return make_rates(team)


def ask(rates: Rates, actor: str) -> int | None:
    return asyncio.run(rates.wait_s(actor))


def test_one_key_too_many_requests_are_429_and_others_go_on(slow: TestClient) -> None:
    other = key_of(slow, "prj_default")
    answers = [slow.get("/v1/jobs", headers=OPERATOR) for _ in range(5)]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    told = problem_of(answers[-1], 429, "too_many_requests")
    assert told["retryable"]
    assert "allowed: 4 per 1 hour" in told["detail"]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 3600
    assert slow.get("/v1/jobs", headers=other).status_code == 200
    for path in ("/healthz", "/readyz", "/login", "/static/style.css"):
        assert slow.get(path).status_code == 200
    # Who has no key is nobody to count for.
    assert [slow.get("/v1/jobs").status_code for _ in range(6)] == [401] * 6


def test_replicas_count_together_in_redis(tmp_path: Path, redis_server: Redis) -> None:
    one, two = (shared_rates(tmp_path, redis_server.url) for _ in range(2))

    assert [ask(rates, "key_1") for rates in (one, two, one)] == [None, None, None]
    for rates in (one, two):
        wait_s = ask(rates, "key_1")
        assert wait_s is not None
        assert 1 <= wait_s <= 3600
    assert ask(two, "key_2") is None


def test_without_redis_everybody_is_served_at_once(tmp_path: Path, redis_server: Redis) -> None:
    rates = shared_rates(tmp_path, redis_server.url)
    for _ in range(4):
        ask(rates, "key_1")
    assert ask(rates, "key_1") is not None
    redis_server.process.kill()

    began = time.monotonic()
    assert [ask(rates, "key_1") for _ in range(50)] == [None] * 50
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("wrong", ["", "x", "0/minute", "600", "600/min", "-1/second"])
def test_what_is_no_limit_is_refused(wrong: str) -> None:
    with pytest.raises(BadLimit, match="STILL_RATE_LIMIT"):
        read_limit(wrong)
