"""Keys as they are made, used and revoked over HTTP; projects, limits and the audit log."""

import logging
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from core.db.models import ApiKey
from core.jobs import keys
from tests.api.conftest import (
    ECHO,
    KEY,
    OPERATOR,
    announce,
    context_of,
    key_of,
    make_project,
    make_settings,
    problem_of,
    serving,
)
from tests.conftest import Clock, statements

FIRST = "prj_default"
ASKED = {"project": FIRST, "name": "k"}
HTML = {"Accept": "text/html"}


def make(server: TestClient, **more: Any) -> dict[str, Any]:
    asked = {"project": FIRST, "name": "k", **more}
    answer = server.post("/v1/keys", json=asked, headers=OPERATOR)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_key_is_shown_once_and_stored_as_a_hash(
    shared: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        answer = shared.post(
            "/v1/keys", json={"project": FIRST, "name": "nightly"}, headers=OPERATOR
        )
    made = answer.json()
    context = context_of(shared)

    assert re.fullmatch(r"still_[0-9a-z]{12}_[0-9a-z]{40}", made["key"])
    assert answer.headers["cache-control"] == "no-store"
    assert made["scopes"] == ["read", "submit"]
    with context.reading() as session:
        row = session.get_one(ApiKey, made["id"])
    assert row.digest == keys.digest(made["key"], secret=context.principals.secret)
    secret = made["key"].rpartition("_")[2]
    for path in ("/v1/keys", f"/v1/keys/{made['id']}", "/v1/audit", "/v1/me"):
        text = shared.get(path, headers=OPERATOR).text
        assert secret not in text
        assert row.digest not in text
    assert secret not in caplog.text
    assert shared.get("/v1/me", headers=bearer(made["key"])).json()["actor"] == made["id"]


def test_mistyped_key_is_told_without_the_database(shared: TestClient) -> None:
    key = make(shared)["key"]
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")

    with statements(context_of(shared).engine) as seen:
        answer = shared.get("/v1/jobs", headers=bearer(wrong))

    assert "mistyped" in problem_of(answer, 401, "unauthorized")["detail"]
    assert seen == []


def test_poll_with_a_remembered_key_costs_no_query_for_the_key(
    shared: TestClient, clock: Clock
) -> None:
    key = bearer(make(shared)["key"])
    job = shared.post("/v1/jobs", json=ECHO, headers=key).json()["id"]
    shared.get(f"/v1/jobs/{job}", headers=key)

    with statements(context_of(shared).engine) as seen:
        for _ in range(3):
            shared.get(f"/v1/jobs/{job}", headers=key)
    assert seen
    assert not [statement for statement in seen if "api_keys" in statement]

    clock.tick(seconds=2)
    with statements(context_of(shared).engine) as seen:
        shared.get(f"/v1/jobs/{job}", headers=key)
    assert len([statement for statement in seen if "api_keys" in statement]) == 1


def test_revocation_holds_within_two_seconds(shared: TestClient, clock: Clock) -> None:
    made = make(shared, scopes=["read"])
    key = bearer(made["key"])
    assert shared.get("/v1/jobs", headers=key).status_code == 200

    first = shared.delete(f"/v1/keys/{made['id']}", headers=OPERATOR)
    again = shared.delete(f"/v1/keys/{made['id']}", headers=OPERATOR)
    clock.tick(seconds=2)

    assert (first.status_code, again.status_code) == (204, 204)
    told = problem_of(shared.get("/v1/jobs", headers=key), 401, "unauthorized")
    assert "was revoked" in told["detail"]
    revoked = shared.get("/v1/audit?action=key.revoke", headers=OPERATOR).json()["items"]
    assert [entry["target"] for entry in revoked] == [made["id"]]


def test_key_ends_when_it_was_to_end(shared: TestClient, clock: Clock) -> None:
    until = clock() + timedelta(hours=1)
    key = bearer(make(shared, expires_at=until.isoformat())["key"])
    assert shared.get("/v1/jobs", headers=key).status_code == 200

    clock.tick(hours=1)

    told = problem_of(shared.get("/v1/jobs", headers=key), 401, "unauthorized")
    assert "ended at" in told["detail"]


def test_use_is_noted_to_the_minute(shared: TestClient, clock: Clock) -> None:
    made = make(shared)
    seen = []
    for _ in range(4):
        shared.get("/v1/jobs", headers=bearer(made["key"]))
        found = shared.get(f"/v1/keys/{made['id']}", headers=OPERATOR).json()
        seen.append(found["last_used_at"])
        clock.tick(seconds=30)

    assert None not in seen
    assert len(set(seen)) == 2


def test_me_tells_project_scopes_limits_and_use(shared: TestClient) -> None:
    project = make_project(shared, "mine", queued_limit=7, weight=2)
    key = key_of(shared, project, "submit", "read")
    shared.post("/v1/jobs", json=ECHO, headers=key)

    me = shared.get("/v1/me", headers=key).json()

    assert me["scopes"] == ["read", "submit"]
    assert me["key"]["id"] == me["actor"]
    assert (me["project"]["id"], me["project"]["queued_limit"]) == (project, 7)
    assert me["project"]["use"] == {"running_chunks": 0, "queued_jobs": 1, "storage_bytes": 0}
    operator = shared.get("/v1/me", headers=OPERATOR).json()
    assert (operator["actor"], operator["key"]) == ("operator", None)
    assert operator["scopes"] == ["read", "submit", "admin"]


def test_server_without_a_key_serves_everybody_as_local(client: TestClient) -> None:
    me = client.get("/v1/me").json()
    job = client.post("/v1/jobs", json=ECHO).json()

    assert (me["actor"], me["project"]["id"]) == ("local", FIRST)
    assert job["submitted_by"] == "local"
    # Who shows a key means it; a cookie may be that of another server on this machine.
    assert client.get("/v1/jobs", headers=bearer("wrong")).status_code == 401
    assert client.get("/v1/jobs", headers={"Cookie": "stillroom=x.1.y"}).status_code == 200


def test_limits_are_named_where_they_are_reached(shared: TestClient) -> None:
    project = make_project(shared, "small", queued_limit=1, storage_limit_bytes=10)
    key = key_of(shared, project)
    job = shared.post("/v1/jobs", json=ECHO, headers=key).json()

    full = shared.post("/v1/jobs", json=ECHO, headers=key)
    told = problem_of(full, 429, "quota_exceeded")
    assert "queued_limit: project 'small' has 1 jobs" in told["detail"]
    assert told["retryable"]
    assert full.headers["retry-after"]
    form = shared.post("/submit", data={"spec": '{"kind": "echo", "text": "x"}'}, headers=key)
    assert "queued_limit" in form.text
    heavy = shared.post("/v1/uploads", json=announce(b"x" * 11), headers=key)
    told = problem_of(heavy, 409, "storage_full")
    assert "storage_limit_bytes" in told["detail"]
    assert not told["retryable"]  # waiting frees no byte

    change = {"queued_limit": None}
    shared.patch(f"/v1/projects/{project}", json=change, headers=OPERATOR)
    assert shared.post("/v1/jobs", json=ECHO, headers=key).status_code == 201
    assert job["submitted_by"].startswith("key_")


@pytest.mark.parametrize(
    ("path", "body", "pointer"),
    [
        ("projects", {"name": ""}, "/name"),
        ("projects", {"name": " x"}, "/name"),
        ("projects", {"name": "<b>"}, "/name"),
        ("projects", {"name": "x", "weight": 0}, "/weight"),
        ("projects", {"name": "x", "weight": True}, "/weight"),
        ("projects", {"name": "x", "queued_limit": -1}, "/queued_limit"),
        ("projects", {"name": "x", "queued_limit": 1.5}, "/queued_limit"),
        ("projects", {"name": "x", "limit": 1}, "/limit"),
        ("keys", {"project": FIRST}, "/name"),
        ("keys", {"project": "prj_none", "name": "k"}, "/project"),
        ("keys", {**ASKED, "scopes": []}, "/scopes"),
        ("keys", {**ASKED, "scopes": ["root"]}, "/scopes/0"),
        ("keys", {**ASKED, "expires_at": "2020-01-01T00:00:00Z"}, "/expires_at"),
        ("keys", {**ASKED, "expires_at": "2030-01-01T00:00:00"}, "/expires_at"),
        ("keys", {**ASKED, "expires_at": "9999-12-31T23:59:59-23:59"}, "/expires_at"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_field(
    locked: TestClient, path: str, body: dict[str, Any], pointer: str
) -> None:
    told = problem_of(locked.post(f"/v1/{path}", json=body, headers=OPERATOR), 422, "spec_invalid")

    assert pointer in [blame["pointer"] for blame in told["errors"]]


def test_projects_are_made_once_changed_and_listed(shared: TestClient) -> None:
    project = make_project(shared, "one", running_limit=2)
    url = f"/v1/projects/{project}"

    twice = shared.post("/v1/projects", json={"name": "one"}, headers=OPERATOR)
    assert problem_of(twice, 409, "conflict")["errors"][0]["pointer"] == "/name"
    change = {"name": "uno", "running_limit": None, "weight": 3}
    changed = shared.patch(url, json=change, headers=OPERATOR).json()
    assert (changed["name"], changed["running_limit"], changed["weight"]) == ("uno", None, 3.0)
    empty = shared.patch(url, json={}, headers=OPERATOR)
    assert "nothing to change" in problem_of(empty, 422, "spec_invalid")["detail"]
    assert shared.get(url, headers=OPERATOR).json() == changed
    assert shared.patch(url, json={"name": None}, headers=OPERATOR).status_code == 422
    assert shared.get(url, headers=OPERATOR).json() == changed
    found = shared.get("/v1/projects", headers=OPERATOR).json()["items"]
    assert [one["name"] for one in found] == ["default", "uno"]
    for method in ("GET", "PATCH"):
        body = {"weight": 1} if method == "PATCH" else None
        absent = shared.request(method, "/v1/projects/prj_x", json=body, headers=OPERATOR)
        problem_of(absent, 404, "not_found")


def test_audit_log_is_paged(shared: TestClient) -> None:
    for number in range(5):
        make_project(shared, f"p{number}")
    path = "/v1/audit?limit=2&action=project.create"
    seen, following = [], "x"
    while following:
        more = "" if following == "x" else f"&before={following}"
        page = shared.get(f"{path}{more}", headers=OPERATOR).json()
        seen += [one["data"]["name"] for one in page["items"]]
        following = page["next_before"]

    assert seen == ["p4", "p3", "p2", "p1", "p0"]


def test_absent_database_is_503_and_not_401(shared: TestClient, clock: Clock) -> None:
    key = bearer(make(shared)["key"])
    assert shared.get("/v1/jobs", headers=key).status_code == 200
    engine = context_of(shared).engine
    clock.tick(seconds=2)

    event.listen(engine, "before_cursor_execute", _outage, named=True)
    try:
        answer = shared.get("/v1/jobs", headers=key)
        page = shared.get("/", headers={**key, **HTML})
        ready = shared.get("/readyz", headers=key)
    finally:
        event.remove(engine, "before_cursor_execute", _outage)

    told = problem_of(answer, 503, "database_unavailable")
    assert told["retryable"]
    assert answer.headers["retry-after"]
    assert page.status_code == 503
    assert (ready.status_code, ready.json()["workers"]) == (503, None)
    assert shared.get("/v1/jobs", headers=key).status_code == 200


def _outage(**_: Any) -> None:
    raise OperationalError("SELECT", {}, Exception("gone"))


def test_dashboard_opens_with_the_key_of_any_project(shared: TestClient, clock: Clock) -> None:
    project = make_project(shared, "mine")
    made = make(shared, project=project, scopes=["read"])
    job = shared.post("/v1/jobs", json=ECHO, headers=key_of(shared, project)).json()["id"]

    into = shared.post("/login", data={"key": made["key"], "next": f"/jobs/{job}"})
    cookie = into.headers["set-cookie"]
    assert (into.status_code, into.headers["location"]) == (303, f"/jobs/{job}")
    assert made["key"].rpartition("_")[2] not in cookie
    assert made["id"] in cookie
    page = shared.get(f"/jobs/{job}", headers=HTML)
    assert page.status_code == 200
    assert "<form" in page.text  # to sign out
    assert f"/jobs/{job}/cancel" not in page.text
    for link in ("/submit", "/upload"):
        assert f'href="{link}' not in page.text
        assert shared.get(link, headers=HTML).status_code == 403
    assert "needs the scope submit" in shared.get("/submit", headers=HTML).text
    assert shared.get("/v1/jobs").json()["items"][0]["id"] == job

    shared.delete(f"/v1/keys/{made['id']}", headers=OPERATOR)
    clock.tick(seconds=2)
    assert shared.get(f"/jobs/{job}", headers=HTML).status_code == 303
    assert shared.get("/v1/jobs").status_code == 401
    refused = shared.post("/login", data={"key": made["key"]})
    assert refused.status_code == 401
    assert "was revoked" in refused.text


def test_dashboard_shows_forms_to_who_may_submit(shared: TestClient) -> None:
    shared.post("/login", data={"key": make(shared)["key"]})
    job = shared.post("/submit", data={"spec": '{"kind": "echo", "text": "x"}'})
    page = shared.get(job.headers["location"], headers=HTML).text

    assert f"{job.headers['location']}/cancel" in page
    assert 'href="/submit' in page


def test_metrics_key_opens_no_dashboard(tmp_path: Path) -> None:
    metrics = "only-for-the-metrics"
    settings = make_settings(tmp_path, api_key=KEY, metrics_key=metrics)
    with serving(settings, Clock()) as server:
        assert server.post("/login", data={"key": metrics}).status_code == 401
        for path in ("/v1/me", "/v1/jobs", "/", "/docs", "/v1/audit"):
            assert server.get(path, headers=bearer(metrics)).status_code == 403
        assert server.get("/readyz", headers=bearer(metrics)).json()["workers"] is None
