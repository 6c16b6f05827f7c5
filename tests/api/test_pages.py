import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from starlette.testclient import TestClient

from api.pages.jobs import EVENTS_SHOWN
from api.pages.render import chunks
from core.jobs import events
from tests.api.conftest import ECHO, context_of, pairs, upload

PAGES = ["/", "/submit", "/submit?kind=echo", "/upload", "/docs"]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def check_page(answer: Any, status: int = 200) -> Tags:
    """Nothing inline, nothing from elsewhere, strict headers."""
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    tags = Tags(answer.text)
    for tag, attributes in tags.found:
        assert tag != "style"
        assert tag != "script" or (attributes.get("src") or "").startswith("/static/")
        assert not [name for name in attributes if name == "style" or name.startswith("on")]
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "/").startswith("/")
    return tags


@pytest.mark.parametrize("path", PAGES)
def test_pages_load_nothing_inline_or_foreign(client: TestClient, path: str) -> None:
    tags = check_page(client.get(path))

    for tag, attributes in tags.found:
        for name in ("src", "href"):
            if tag in ("script", "link", "img") and name in attributes:
                assert client.get(attributes[name] or "").status_code == 200


def test_job_page_shows_progress_artifacts_and_spec(
    client: TestClient, done: dict[str, Any]
) -> None:
    answer = client.get(f"/jobs/{done['id']}")

    check_page(answer)
    assert f"/v1/jobs/{done['id']}/artifacts/text/content" in answer.text
    assert "100.0 % · 2 of 2 chunks" in answer.text
    assert "Cancel" not in answer.text
    assert f"/jobs/{done['id']}" in client.get("/?state=succeeded&kind=echo").text


def test_hostile_texts_are_shown_not_run(client: TestClient) -> None:
    spec = {**ECHO, "name": HOSTILE, "text": HOSTILE, "labels": {"k": HOSTILE[:60]}}
    job_id = client.post("/v1/jobs", json=spec).json()["id"]

    for path in ("/", f"/jobs/{job_id}"):
        answer = client.get(path)
        check_page(answer)
        assert "<script>alert" not in answer.text
        assert "onerror=alert(1)&gt;" in answer.text


def test_cancel_button_cancels_once(client: TestClient) -> None:
    job_id = client.post("/v1/jobs", json=ECHO).json()["id"]
    assert "Cancel" in client.get(f"/jobs/{job_id}").text

    answer = client.post(f"/jobs/{job_id}/cancel")

    assert (answer.status_code, answer.headers["location"]) == (303, f"/jobs/{job_id}")
    assert client.get(f"/v1/jobs/{job_id}").json()["state"] == "cancelled"
    check_page(client.post(f"/jobs/{job_id}/cancel"), 409)


def test_unknown_job_is_a_page_too(client: TestClient) -> None:
    check_page(client.get("/jobs/nothing"), 404)


def test_form_submits_the_spec(client: TestClient) -> None:
    answer = client.post("/submit", data={"spec": '{"kind": "echo", "text": "Größe"}'})

    assert answer.status_code == 303
    job_id = answer.headers["location"].rpartition("/")[2]
    assert client.get(f"/v1/jobs/{job_id}").json()["spec"]["text"] == "Größe"


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "nested"),
        ('{"kind": "echo", "text": ""}', "/text"),
        ('{"kind": "echo", "text": "a", "times": NaN}', "NaN"),
        ('{"kind": "echo", "text": "a", "times": true}', "/times"),
        ('{"kind": "echo", "text": "a", "text": "b"}', "twice"),
        ('{"kind": ["echo"]}', "/kind"),
        ("[]", "dictionary"),
        ("</textarea><script>alert(1)</script>", "not JSON"),
    ],
)
def test_wrong_spec_comes_back_with_what_is_wrong(client: TestClient, spec: str, told: str) -> None:
    answer = client.post("/submit", data={"spec": spec})

    check_page(answer, 422)
    assert told in answer.text


def test_form_that_is_not_a_form_is_refused(client: TestClient) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}

    assert client.post("/submit", content=b"\xff\xfe", headers=headers).status_code == 400
    assert client.post("/submit", content=b"a=1&" * 200, headers=headers).status_code == 400
    assert client.post("/submit", content=b"spec=%ff", headers=headers).status_code == 422


def test_an_input_is_filled_in_from_the_link(client: TestClient) -> None:
    answer = client.get(f"/submit?kind=cache_targets&input=model:{'ab' * 32}")

    check_page(answer)
    assert f"&#34;model&#34;: &#34;{'ab' * 32}&#34;" in answer.text


def test_links_lead_from_an_output_to_the_kinds_that_read_it(alone: TestClient) -> None:
    artifact = alone.post(f"{upload(alone, pairs())}/complete").json()
    uses = [tag.get("data-uses") for _, tag in check_page(alone.get("/upload")).found]
    (found,) = [json.loads(text) for text in uses if text]

    assert ["fit_federated", "pairs"] in found[artifact["format"]]
    for kind, field in found[artifact["format"]]:
        check_page(alone.get(f"/submit?kind={kind}&input={field}:{artifact['sha256']}"))


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/?state=gone", "waiting"),
        ("/?kind=<b>", "allowed: benchmark, build_codebook"),
        ("/?cursor=x", "cursor"),
        ("/?status=failed", "allowed: cursor, kind, state"),
        ("/submit?kind=<x>", "allowed: benchmark, build_codebook"),
        ("/submit?kind=echo&input=model:x", "echo reads no model"),
        ("/submit?kind=echo&input=x", "key:value"),
    ],
)
def test_mistaken_links_are_told_on_a_page(client: TestClient, path: str, told: str) -> None:
    answer = client.get(path)

    check_page(answer, 422)
    assert told in answer.text


@pytest.mark.parametrize(
    ("done", "told"), [(9.0, "9"), (8.5, "8.5"), (8.96, "8.9"), (0.0, "0"), (123456.7, "123456.7")]
)
def test_chunks_are_told_without_decimals_when_whole(done: float, told: str) -> None:
    assert chunks(done) == told


def test_filters_of_the_list_may_be_empty(client: TestClient) -> None:
    check_page(client.get("/?state=&kind="))
    check_page(client.get("/?state=queued&kind=echo"))


def test_reference_tells_every_documented_call(client: TestClient) -> None:
    text = client.get("/docs").text

    for path in client.get("/openapi.json").json()["paths"]:
        assert path in text
    assert 'id="spec_invalid"' in text


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/estimate"])
def test_the_body_of_a_job_is_one_of_the_kinds_told_apart_by_name(
    client: TestClient, path: str
) -> None:
    document = client.get("/openapi.json").json()
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema, schemas = body["schema"], document["components"]["schemas"]

    mapping = schema["discriminator"]["mapping"]
    assert schema["discriminator"]["propertyName"] == "kind"
    assert [{"$ref": found} for found in mapping.values()] == schema["oneOf"]
    for name, found in mapping.items():
        spec = schemas[found.removeprefix("#/components/schemas/")]
        assert spec["properties"]["kind"]["const"] == name
        example = body["examples"][name]["value"]
        Draft202012Validator({**spec, "components": document["components"]}).validate(example)


def test_openapi_is_complete(client: TestClient) -> None:
    document = client.get("/openapi.json").json()

    references = set(re.findall(r'"#/components/schemas/([^"]+)"', str(document).replace("'", '"')))
    assert references <= set(document["components"]["schemas"])
    body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]
    kinds = {kind["kind"] for kind in client.get("/v1/kinds").json()["items"]}
    assert set(body["schema"]["discriminator"]["mapping"]) == kinds
    assert body["examples"].keys() == kinds
    for path, calls in document["paths"].items():
        for call in calls.values():
            assert call["summary"]
            if path.startswith("/v1"):
                assert "default" in call["responses"]
                assert call["security"]


def test_of_many_events_the_latest_are_shown(client: TestClient) -> None:
    job_id = client.post("/v1/jobs", json=ECHO).json()["id"]
    ctx = context_of(client)
    with ctx.transaction() as session:
        for number in range(EVENTS_SHOWN):
            events.record(session, job_id, "chunk.done", now=ctx.clock(), index=number)
    client.post(f"/v1/jobs/{job_id}/cancel")
    again = client.post(f"/v1/jobs/{job_id}/retry").json()["id"]

    shown = client.get(f"/jobs/{job_id}").text

    assert "job.cancelled" in shown
    assert "job.submitted" not in shown
    assert again in shown, "what goes on with it is known however much happened since"
