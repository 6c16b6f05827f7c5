"""Walks every route there is: none is open by mistake, none serves a key of too little scope."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.testclient import TestClient

from api.guard import OPEN_FOLDERS, OPEN_PATHS
from tests.api.conftest import KEY, SCOPES, key_of, make_settings, problem_of, serving
from tests.api.walk import APP, ROUTES, every_leaf
from tests.conftest import Clock

METRICS_KEY = "a-key-for-metrics-alone"
CHANGES_NOTHING = {"GET", "HEAD"}
FREE_OF_SCOPE = {"/logout"}
"""Changes nothing but the browser's own cookie."""
CLOSED = [(method, path, scopes) for method, path, scopes in ROUTES if path not in OPEN_PATHS]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder: Path = tmp_path_factory.mktemp("walked")
    settings = make_settings(folder, api_key=KEY, metrics_key=METRICS_KEY)
    with serving(settings, Clock()) as server:
        yield server


@pytest.fixture(scope="module")
def keys(server: TestClient) -> dict[str, dict[str, str]]:
    """The header of a key with every scope but one."""
    lacking = {scope: [one for one in SCOPES if one != scope] for scope in SCOPES}
    return {scope: key_of(server, "prj_default", *held) for scope, held in lacking.items()}


def send(
    server: TestClient, method: str, path: str, headers: dict[str, str], accept: str = "*/*"
) -> tuple[int, str]:
    """Send the right media type: what is refused must be refused for the key alone."""
    form = method == "POST" and not path.startswith("/v1")
    kind = "application/x-www-form-urlencoded" if form else "application/json"
    more = {"Content-Type": kind, "Accept": accept, "Upload-Offset": "0"}
    answer = server.request(method, path, headers={**more, **headers})
    if answer.status_code in (401, 403) and accept == "*/*" and path.startswith("/v1"):
        code = {401: "unauthorized", 403: "forbidden"}[answer.status_code]
        return answer.status_code, "" if method == "HEAD" else str(
            problem_of(answer, answer.status_code, code)["detail"]
        )
    return answer.status_code, answer.text


def test_nothing_but_routes_and_the_static_folder_is_served() -> None:
    others = [leaf for leaf in every_leaf() if not isinstance(leaf, APIRoute)]

    (static,) = others
    assert isinstance(static, Mount)
    assert (static.path, type(static.app)) == ("/static", StaticFiles)
    assert OPEN_FOLDERS == ("/static/",)
    assert len(ROUTES) > 35


def test_what_is_open_is_a_closed_list() -> None:
    assert {"/healthz", "/readyz", "/login"} == OPEN_PATHS
    assert {path for _, path, _ in ROUTES} >= OPEN_PATHS


@pytest.mark.parametrize(("method", "path", "scopes"), ROUTES)
def test_every_route_declares_its_scope(method: str, path: str, scopes: tuple[str, ...]) -> None:
    if path in OPEN_PATHS:
        assert not scopes
        return
    assert scopes, f"{method} {path} asks for no scope: give it a dependency of api.deps"
    if method not in CHANGES_NOTHING and path not in FREE_OF_SCOPE:
        assert scopes in (("submit",), ("admin",))


def test_the_document_names_the_scope_of_every_call() -> None:
    document = APP.openapi()

    known = {(method, path): scopes for method, path, scopes in ROUTES}
    for path, calls in document["paths"].items():
        for method, call in calls.items():
            told = tuple(one["HTTPBearer"][0] for one in call.get("security", ()))
            assert told == known[method.upper(), path]


@pytest.mark.parametrize(("method", "path", "scopes"), CLOSED)
def test_without_a_key_every_route_is_401(
    server: TestClient, method: str, path: str, scopes: tuple[str, ...]
) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "stillroom=operator.9.x"}):
        status, _ = send(server, method, path, headers)
        assert status == 401

    status, _ = send(server, method, path, {}, accept="text/html")
    assert status == (401 if path.startswith("/v1") else 303)


@pytest.mark.parametrize(("method", "path", "scopes"), CLOSED)
def test_a_key_without_the_scope_is_403_and_told_which(
    server: TestClient,
    keys: dict[str, dict[str, str]],
    method: str,
    path: str,
    scopes: tuple[str, ...],
) -> None:
    metrics = {"Authorization": f"Bearer {METRICS_KEY}"}
    lacking = [metrics] if len(scopes) > 1 else [metrics, keys[scopes[0]]]
    if "metrics" in scopes:
        lacking = [keys["admin"]]

    for headers in lacking:
        status, detail = send(server, method, path, headers)
        assert status == 403
        if method != "HEAD":
            assert f"this needs the scope {' or '.join(scopes)}; the key has: " in detail


@pytest.mark.parametrize(("method", "path", "scopes"), CLOSED)
def test_a_key_with_the_scope_gets_past_the_door(
    server: TestClient, method: str, path: str, scopes: tuple[str, ...]
) -> None:
    headers = key_of(server, "prj_default", *(one for one in scopes if one in SCOPES))

    status, text = send(server, method, path, headers)

    assert status not in (401, 403), text
    assert status < 500, text


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_open_routes_answer_everybody(server: TestClient, path: str) -> None:
    assert server.get(path).status_code == 200
    assert server.get("/static/style.css").status_code == 200
    assert server.get("/static/../v1/jobs").status_code in (401, 404)
    assert server.get("/static/%2e%2e/v1/jobs").status_code in (401, 404)
