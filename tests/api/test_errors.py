import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, text
from starlette.testclient import TestClient

from tests.api.conftest import ECHO, context_of, problem_of
from tests.api.walk import ROUTES

JSON = {"Content-Type": "application/json"}


def echo(**more: Any) -> bytes:
    return json.dumps({**ECHO, **more}).encode()


def distil(**training: Any) -> bytes:
    return json.dumps({"kind": "distill", "model": "a" * 64, "training": training}).encode()


def student(**said: Any) -> bytes:
    return json.dumps({"kind": "distill", "model": "a" * 64, "student": said}).encode()


@pytest.mark.parametrize(
    ("body", "pointer", "told"),
    [
        (echo(times=0), "/times", "got 0"),
        (echo(times=10**30), "/times", "1000"),
        (echo(times=1.5), "/times", "1.5"),
        (echo(times="x" * 500), "/times", "..."),
        (echo(times="3"), "/times", "got '3'"),
        (echo(times=True), "/times", "got True"),
        (echo(times=1.0), "/times", "got 1.0"),
        (echo(text=7), "/text", "got 7"),
        (distil(epochs="8"), "/training/epochs", "got '8'"),
        (distil(losses={"cvar": True}), "/training/losses/cvar", "got True"),
        (distil(losses={"custom": {"own": "1"}}), "/training/losses/custom/own", "got '1'"),
        (distil(losses={"custom": {"own": -1}}), "/training/losses", "custom.own -1; allowed: 0"),
        (distil(tau=0), "/training/tau", "greater than or equal to 0.000001"),
        (distil(tau=-0.5), "/training/tau", "got -0.5"),
        (
            distil(curriculum={"end_tau": -1}),
            "/training/curriculum/end_tau",
            "greater than or equal to 0.000001",
        ),
        (distil(curriculum={"stages": 0}), "/training/curriculum/stages", "got 0"),
        (distil(curriculum={"stages": 9}), "/training", "curriculum.stages 9 of 8 epochs"),
        (student(name="hierarchical_router", heads=1), "/student/heads", "got 1"),
        (student(name="hierarchical_router", levels=0), "/student/levels", "got 0"),
        (student(name="hierarchical", level_weights=[1.0]), "/student", "1 entries for 2"),
        (student(name="hierarchical", level_weights=[0.7, -1]), "/student/level_weights/1", "-1"),
        (student(name="hierarchical", levels=[25, 5]), "/student", "longer than the one before"),
        (student(name="nothing"), "/student/name", "'hierarchical_router'"),
        (student(heads=4), "/student/name", "name"),
        (echo(text=None), "/text", "None"),
        (echo(text=["a"]), "/text", "['a']"),
        (echo(more=1), "/more", "Extra"),
        (echo(labels={"k": 1}), "/labels/k", "got 1"),
        (echo(labels={"a/b": 1}), "/labels/a~1b", "got 1"),
        (echo(kind="nothing"), "/kind", "'echo'"),
        (echo(kind=7), "/kind", "'echo'"),
        (echo(priority=101), "/priority", "100"),
        (b'{"kind": "echo"}', "/text", "required"),
        (b'{"text": "hi"}', "/kind", "kind"),
        (b"{}", "/kind", "kind"),
        (b"[]", "", "dictionary"),
        (b"null", "", ""),
        (b"7", "", "7"),
        (b'"text"', "", "text"),
        (b'{"kind": "echo", "text": "a", "times": 1e999}', "/times", "inf"),
    ],
)
def test_wrong_spec_names_field_value_and_what_is_allowed(
    client: TestClient, body: bytes, pointer: str, told: str
) -> None:
    answer = problem_of(client.post("/v1/jobs", content=body, headers=JSON), 422, "spec_invalid")

    assert answer["errors"][0]["pointer"] == pointer
    assert told in answer["errors"][0]["detail"]
    assert len(answer["errors"][0]["detail"]) < 400


def test_a_rule_over_several_fields_speaks_for_itself(client: TestClient) -> None:
    body = b'{"kind": "export_cache"}'
    answer = problem_of(client.post("/v1/jobs", content=body, headers=JSON), 422, "spec_invalid")

    wrong = "model, targets: nothing to export; give one of them, or both"
    assert answer["errors"] == [{"pointer": "", "detail": wrong}]
    assert answer["detail"] == f"body: {wrong}"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff\xfe",
        b'{"kind": "echo", "text": NaN}',
        b'{"kind": "echo", "text": "a", "times": Infinity}',
        b'{"kind": "echo", "text": "a", "times": -Infinity}',
        b'{"kind": "echo", "text": "a", "times": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"kind": "echo", "text": "a\\u0000"}',
        b'{"kind": "echo", "text": "a\\ud800"}',
        b'{"kind": "echo", "labels": {"\\udc00": "x"}, "text": "a"}',
        b"\xef\xbb\xbf{}",
        b"{'kind': 'echo'}",
        b'{"kind": "echo", "text": "a", "times": 1, "times": 2}',
        b'{"kind": "echo", "text": "a", "labels": {"k": "1", "k": "1"}}',
        b'{"kind": "echo",}',
    ],
)
def test_body_that_is_not_json_is_400(client: TestClient, body: bytes) -> None:
    problem_of(client.post("/v1/jobs", content=body, headers=JSON), 400, "malformed")


def test_nested_up_to_the_edge_is_never_a_500(client: TestClient) -> None:
    for depth in (100, 500, 900, 990, 1100):
        body = b'{"kind": "echo", "text": ' + b"[" * depth + b"]" * depth + b"}"
        answer = client.post("/v1/jobs", content=body, headers=JSON)
        assert answer.status_code in (400, 422), depth


@pytest.mark.parametrize(
    "media_type",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"],
)
def test_other_media_types_are_415(client: TestClient, media_type: str) -> None:
    headers = {"Content-Type": media_type} if media_type else {}

    answer = client.post("/v1/jobs", content=echo(), headers=headers)

    problem_of(answer, 415, "unsupported_media_type")


def test_empty_body_is_422(client: TestClient) -> None:
    problem_of(client.post("/v1/jobs", content=b"", headers=JSON), 422, "spec_invalid")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/static/nothing", 404, "not_found"),
        ("GET", "/static/%2e%2e/%2e%2e/app.py", 404, "not_found"),
        ("PUT", "/v1/jobs", 405, "method_not_allowed"),
        ("DELETE", "/v1/kinds", 405, "method_not_allowed"),
        ("POST", "/static/style.css", 405, "method_not_allowed"),
        ("GET", "/v1/jobs/%00", 400, "malformed"),
        ("GET", "/v1/jobs?name=%00", 400, "malformed"),
        ("GET", "/v1/jobs?label=%00:a", 400, "malformed"),
    ],
)
def test_router_errors_are_problems(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    answer = client.request(method, path)

    problem_of(answer, status, code)
    assert status != 405 or answer.headers["allow"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/jobs", "GET, POST"),
        ("/v1/uploads/x", "DELETE, GET, PATCH"),
        ("/v1/artifacts/x/content", "GET, HEAD"),
        ("/submit", "GET, POST"),
        ("/static/style.css", "GET, HEAD"),
    ],
)
def test_wrong_method_is_told_every_right_one(client: TestClient, path: str, allowed: str) -> None:
    answer = client.put(path)

    assert answer.headers["allow"] == allowed
    assert problem_of(answer, 405, "method_not_allowed")["detail"].endswith(f"allowed: {allowed}")


@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path, _ in ROUTES])
def test_every_route_refuses_parameters_it_does_not_have(
    client: TestClient, method: str, path: str
) -> None:
    answer = client.request(
        method, f"{path}?foo=bar", content=b"{}" if method != "GET" else None, headers=JSON
    )

    assert answer.status_code == 422
    if method != "HEAD":
        assert "/query/foo: no such parameter; allowed: " in answer.text


@pytest.mark.parametrize(
    ("query", "pointer", "told"),
    [
        ("status=failed", "/query/status", "allowed: cursor, kind, label, limit, name, state"),
        ("State=failed", "/query/State", "allowed: cursor"),
        ("limit=1&limit=2", "/query/limit", "more than once"),
    ],
)
def test_strange_parameter_names_itself_and_the_allowed_ones(
    client: TestClient, query: str, pointer: str, told: str
) -> None:
    body = problem_of(client.get(f"/v1/jobs?{query}"), 422, "spec_invalid")

    assert body["errors"][0]["pointer"] == pointer
    assert told in body["errors"][0]["detail"]
    assert client.get("/v1/jobs?label=a:b&label=c:d").status_code == 200


def test_request_id_is_echoed_or_made(client: TestClient) -> None:
    echoed = client.get("/healthz", headers={"X-Request-Id": "trace-1"})
    assert echoed.headers["x-request-id"] == "trace-1"
    for strange in ("", "a b", "x" * 200, "<script>"):
        made = client.get("/healthz", headers={"X-Request-Id": strange})
        assert made.headers["x-request-id"].startswith("req_")


def test_unforeseen_error_is_a_500_that_tells_nothing_but_its_id(
    alone: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    alone.app.state.context = "broken"  # type: ignore[attr-defined]

    answer = alone.get("/v1/jobs", headers={"X-Request-Id": "find-me"})

    body = problem_of(answer, 500, "internal")
    assert "AttributeError" not in answer.text
    assert "find-me" in body["detail"]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info is not None
    assert record.request_id == "find-me"  # type: ignore[attr-defined]


def take_away(engine: Engine) -> None:
    """Let no connection reach the database, or, of a file, no statement succeed."""
    if engine.dialect.name == "sqlite":
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE jobs RENAME TO away")
        return
    name = engine.url.database
    admin = create_engine(engine.url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false"))
        ends = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
        connection.execute(text(ends), {"name": name})
    admin.dispose()


def test_database_that_is_away_is_503_and_retryable(alone: TestClient) -> None:
    job_id = alone.post("/v1/jobs", json=ECHO).json()["id"]
    take_away(context_of(alone).engine)

    for path in ("/v1/jobs", f"/v1/jobs/{job_id}"):
        body = problem_of(alone.get(path), 503, "database_unavailable")
        assert body["retryable"], path


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(), max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
FIELDS = st.sampled_from(["kind", "text", "times", "name", "priority", "seed", "labels", "x"])
SPECS = st.dictionaries(FIELDS, ANY, max_size=6).map(lambda body: {**ECHO, **body})


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=SPECS | ANY)
def test_any_json_is_a_job_or_a_problem(client: TestClient, body: Any) -> None:
    answer = client.post("/v1/jobs", content=json.dumps(body).encode(), headers=JSON)

    if answer.status_code != 201:
        problem_of(answer, answer.status_code, answer.json()["code"])
        assert answer.status_code in (400, 422), answer.text


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(body=st.binary(max_size=200))
def test_any_bytes_are_a_problem(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/jobs", content=body, headers=JSON)

    assert answer.status_code in (400, 422), answer.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Content-Encoding", "gzip")], 415),
        ([("Content-Type", "application/json; charset=utf-16")], 415),
        ([("Idempotency-Key", "a"), ("Idempotency-Key", "b")], 400),
    ],
)
def test_headers_that_change_what_a_body_means_are_not_overlooked(
    client: TestClient, headers: list[tuple[str, str]], status: int
) -> None:
    given = [*headers, *([] if headers[0][0] == "Content-Type" else JSON.items())]

    answer = client.post("/v1/jobs", content=b'{"kind": "echo", "text": "x"}', headers=given)

    assert answer.status_code == status
    assert headers[0][0] in answer.json()["detail"]


def test_an_address_with_one_slash_too_many_leads_nowhere(client: TestClient) -> None:
    answer = client.get("/v1/jobs/", follow_redirects=False)

    assert answer.status_code == 404
    assert "location" not in answer.headers
