"""Hints over a real Redis: they may be lost, and their loss, or Redis's, harms nobody."""

import json
import logging
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from core.jobs import hints
from core.jobs.hints import CeleryHints, NoHints, make_celery
from core.settings import Settings
from scripts.processes import Guard, Process, free_port
from scripts.servers import Redis
from tests.conftest import wait_for

KEY = "a-key-of-some-length"


def settings_of(url: str) -> Settings:
    return Settings.model_validate(
        {"broker_url": url, "database_url": "postgresql+psycopg://still@host/still", "api_key": KEY}
    )


@pytest.fixture
def keys(broker: Redis) -> Iterator["redis.Redis[bytes]"]:
    with redis.Redis.from_url(broker.url) as client:
        yield client


@pytest.fixture
def waker(broker: Redis) -> Iterator[CeleryHints]:
    found = CeleryHints(make_celery(settings_of(broker.url)))
    yield found
    found.close()


def queued(keys: "redis.Redis[bytes]", pool: str) -> list[dict[str, Any]]:
    return [json.loads(message) for message in keys.lrange(pool, 0, -1)]


def test_a_hint_is_a_small_json_message_that_expires(
    waker: CeleryHints, keys: "redis.Redis[bytes]"
) -> None:
    waker.wake({"cpu": 1, "gpu": 0})
    wait_for(lambda: keys.llen("cpu") == 1)

    [message] = queued(keys, "cpu")
    assert message["content-type"] == "application/json"
    assert message["headers"]["task"] == "jobs.run"
    assert message["headers"]["argsrepr"] == "['cpu']"
    assert message["headers"]["expires"] is not None
    assert keys.llen("gpu") == 0


def test_what_is_asked_together_is_published_but_never_above_the_bound(
    waker: CeleryHints, keys: "redis.Redis[bytes]"
) -> None:
    for _ in range(3):
        waker.wake({"gpu": 20_000})
        wait_for(lambda: keys.llen("gpu") == hints.MOST)
    waker.wake({"cpu": 2})
    wait_for(lambda: keys.llen("cpu") == 2)

    assert keys.llen("gpu") == hints.MOST


def test_after_a_flush_hints_still_find_their_queue(
    waker: CeleryHints, keys: "redis.Redis[bytes]"
) -> None:
    waker.wake({"cpu": 1})
    wait_for(lambda: keys.llen("cpu") == 1)
    keys.flushall()

    waker.wake({"cpu": 1})
    wait_for(lambda: keys.llen("cpu") == 1)

    assert keys.keys() == [b"cpu"], "routing keeps nothing in Redis"


def test_hints_resume_when_the_broker_does(
    waker: CeleryHints, broker: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    waker.wake({"cpu": 1})
    broker.process.kill()
    with caplog.at_level(logging.INFO, "core.jobs.hints"):
        for _ in range(5):
            waker.wake({"cpu": 1})
            time.sleep(0.1)
        broker.process.start()
        broker.wait()
        with redis.Redis.from_url(broker.url) as client:

            def arrives() -> bool:
                waker.wake({"cpu": 1})
                return bool(client.llen("cpu"))

            wait_for(arrives)
        wait_for(lambda: len(caplog.records) == 2)

    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


@pytest.mark.parametrize("answers", [False, True], ids=["nobody listens", "nobody answers"])
def test_a_broker_that_is_away_slows_nobody(*, answers: bool) -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        if answers:
            hole.listen(1)
        waker = CeleryHints(
            make_celery(settings_of(f"redis://127.0.0.1:{hole.getsockname()[1]}/0"))
        )
        began = time.monotonic()
        for _ in range(200):
            waker.wake({"cpu": 1, "gpu": 3})
        took = time.monotonic() - began
        waker.close()
        closed = time.monotonic() - began

    assert took < 10
    assert closed < 20
    waker.wake({"cpu": 1})  # after the end: nothing, and no error


def test_no_hints_do_nothing() -> None:
    NoHints().wake({"cpu": 1})
    NoHints().close()


def test_without_a_broker_there_is_no_celery() -> None:
    with pytest.raises(ValueError, match="STILL_BROKER_URL"):
        make_celery(Settings())


@pytest.fixture
def tls(tmp_path: Path, guard: Guard, redis_server: Redis) -> Iterator[tuple[int, Path]]:
    """A Redis that speaks TLS alone, with a certificate of its own making."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    port = free_port()
    options = {
        "port": "0",
        "tls-port": str(port),
        "tls-cert-file": str(certificate),
        "tls-key-file": str(key),
        "tls-auth-clients": "no",
        "save": "",
    }
    command = ["redis-server", *(word for k, v in options.items() for word in (f"--{k}", v))]
    server = Process("tls", command, env={}, log=tmp_path / "tls.log", guard=guard).start()

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    server.wait_until(listens)
    yield port, certificate
    server.kill()


def test_a_certificate_is_checked(tls: tuple[int, Path], caplog: pytest.LogCaptureFixture) -> None:
    port, certificate = tls
    url = f"rediss://127.0.0.1:{port}/0"
    blind, knowing = (
        CeleryHints(make_celery(settings_of(one)))
        for one in (url, f"{url}?ssl_ca_certs={certificate}&ssl_cert_reqs=required")
    )

    blind.wake({"cpu": 1})
    wait_for(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text)
    knowing.wake({"gpu": 1})

    options: Any = {"ssl": True, "ssl_ca_certs": str(certificate)}
    with redis.Redis(port=port, **options) as client:
        wait_for(lambda: client.llen("gpu") == 1)
        assert client.llen("cpu") == 0
    blind.close()
    knowing.close()
