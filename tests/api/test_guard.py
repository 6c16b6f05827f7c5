import logging
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from api.principals import COOKIE, COOKIE_FOR, Principals, Proof
from core.errors import Unauthorized
from core.logs import JsonLines
from tests.api.conftest import ECHO, KEY, context_of, make_settings, problem_of, serving
from tests.conftest import Clock


@pytest.mark.parametrize("path", ["/v1", "/v1/nothing", "/nothing", "//v1/jobs", "/v1/../v1/jobs"])
def test_unknown_paths_ask_for_the_key_too(locked: TestClient, path: str) -> None:
    assert locked.get(path).status_code == 401


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer é"],
)
def test_wrong_key_is_401(locked: TestClient, header: str) -> None:
    answer = locked.get("/v1/jobs", headers={"Authorization": header.encode("latin-1")})

    problem_of(answer, 401, "unauthorized")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_right_key_opens(locked: TestClient, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {KEY}"}

    assert locked.get("/v1/jobs", headers=headers).status_code == 200
    assert locked.post("/v1/jobs", json=ECHO, headers=headers).status_code == 201


def test_browser_without_key_is_led_to_the_login_and_back(locked: TestClient) -> None:
    html = {"Accept": "text/html"}
    led = locked.get("/jobs/job_1", headers=html)
    assert (led.status_code, led.headers["location"]) == (303, "/login?next=/jobs/job_1")
    assert "password" in locked.get(led.headers["location"]).text

    wrong = locked.post("/login", data={"key": "wrong", "next": "/submit"})
    assert wrong.status_code == 401
    assert "set-cookie" not in wrong.headers
    right = locked.post("/login", data={"key": KEY, "next": "/submit"})

    assert (right.status_code, right.headers["location"]) == (303, "/submit")
    cookie = right.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert KEY not in cookie
    assert locked.get("/submit", headers=html).status_code == 200
    assert locked.get("/v1/jobs").status_code == 200  # the event stream of a page needs it
    locked.post("/logout")
    assert locked.get("/v1/jobs").status_code == 401
    locked.cookies.clear()


@pytest.mark.parametrize(
    "following", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:1", ""]
)
def test_login_leads_nowhere_else(locked: TestClient, following: str) -> None:
    answer = locked.post("/login", data={"key": KEY, "next": following})
    locked.cookies.clear()

    assert answer.headers["location"] == "/"


def test_cookie_ends_and_cannot_be_made_up(tmp_path: Path) -> None:
    clock = Clock()
    settings = make_settings(tmp_path, api_key=KEY)
    with serving(settings, clock) as server:
        here = context_of(server).principals
        operator = here.find(Proof(bearer=KEY))
        cookie = here.cookie_for(operator)

        assert here.find(Proof(cookie=cookie)) == operator
        actor, until, signature = cookie.split(".")
        later = f"{actor}.{int(until) + 1}.{signature}"
        other = f"key_000000000000.{until}.{signature}"
        for forged in (later, other, f"{actor}.{until}.", until, "", ".", f"{actor}.².{signature}"):
            with pytest.raises(Unauthorized):
                here.find(Proof(cookie=forged))
        # Another secret, another key of the operator: either ends it.
        newer = make_settings(tmp_path, api_key=KEY + "2")
        for changed, secret in ((settings, b"x" * 32), (newer, here.secret)):
            elsewhere = Principals(
                engine=context_of(server).engine, settings=changed, secret=secret, clock=clock
            )
            with pytest.raises(Unauthorized):
                elsewhere.find(Proof(cookie=cookie))
        clock.tick(seconds=COOKIE_FOR.total_seconds())
        with pytest.raises(Unauthorized):
            here.find(Proof(cookie=cookie))


def test_cookie_lasts_as_long_as_the_browser_is_told(locked: TestClient) -> None:
    said = locked.post("/login", data={"key": KEY}).headers["set-cookie"]
    locked.cookies.clear()

    assert said.startswith(f"{COOKIE}=")
    assert f"Max-Age={int(timedelta(days=7).total_seconds())}" in said


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 201),
        ({"Origin": "http://127.0.0.1"}, 201),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "http://127.0.0.1.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 201),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_pages_of_other_origins_cannot_write(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    assert client.post("/v1/jobs", json=ECHO, headers=headers).status_code == status
    form = {"spec": '{"kind": "echo", "text": "form"}'}
    answer = client.post("/submit", data=form, headers=headers)
    assert answer.status_code == (303 if status == 201 else 403)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8321", 200),
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("[::1]:8321", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:8321", 421),
        ("", 421),
    ],
)
def test_rebound_host_names_are_refused_while_no_key_is_set(
    client: TestClient, host: str, status: int
) -> None:
    assert client.get("/healthz", headers={"Host": host}).status_code == status


def test_no_cross_origin_reading_is_offered(client: TestClient) -> None:
    answer = client.get("/v1/jobs", headers={"Origin": "http://evil.example"})

    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_json_body_over_the_limit_is_413_however_it_is_sent(alone: TestClient) -> None:
    body = b'{"kind": "echo", "text": "' + b"x" * 2048 + b'"}'
    headers = {"Content-Type": "application/json"}

    problem_of(alone.post("/v1/jobs", content=body, headers=headers), 413, "too_large")
    chunked = alone.post("/v1/jobs", content=iter([body[:9], body[9:]]), headers=headers)
    problem_of(chunked, 413, "too_large")
    for said in ("9" * 30, "-1", "x"):
        answer = alone.post("/v1/jobs", content=b"{}", headers={**headers, "Content-Length": said})
        problem_of(answer, 413, "too_large")


def test_log_is_json_without_query_or_key(
    locked: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="stillroom.access"):
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "r-1"}
        locked.get("/v1/jobs?name=private", headers=headers)

    (line,) = [JsonLines().format(record) for record in caplog.records]
    assert '"request_id": "r-1"' in line
    assert '"status": 200' in line
    assert KEY not in line
    assert "private" not in line


def test_the_key_of_the_metrics_is_not_the_operators(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="take two"):
        make_settings(tmp_path, api_key=KEY, metrics_key=KEY)
    make_settings(tmp_path, api_key=KEY, metrics_key=KEY[::-1])
