import base64
import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from api.downloads import clean_name, disposition
from core.db.models import Artifact, Chunk, Output, Upload
from core.db.session import transaction
from core.jobs.projects import FIRST_PROJECT
from tests.api.conftest import ECHO, context_of, problem_of

TEXT = b"hello\nhello\n"
SHA = hashlib.sha256(TEXT).hexdigest()
URL = f"/v1/artifacts/{SHA}/content"


@pytest.fixture(autouse=True)
def made(done: dict[str, Any]) -> dict[str, Any]:
    assert done["artifacts"] == {"text": SHA}
    return done


def test_whole_file_comes_with_digest_validator_and_honest_name(client: TestClient) -> None:
    answer = client.get(URL)

    digest = base64.b64encode(hashlib.sha256(TEXT).digest()).decode()
    assert answer.content == TEXT
    assert answer.headers["etag"] == f'"{SHA}"'
    assert answer.headers["content-digest"] == f"sha-256=:{digest}:"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-length"] == "12"
    assert answer.headers["content-type"] == "text/plain"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert 'filename="echo.txt"' in answer.headers["content-disposition"]
    assert answer.headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=2-5", 2, 6),
        ("bytes=6-", 6, 12),
        ("bytes=6-999", 6, 12),
        ("bytes=-4", 8, 12),
        ("bytes=-999", 0, 12),
        ("BYTES = 1-2", 1, 3),
    ],
)
def test_range_is_206(client: TestClient, asked: str, start: int, end: int) -> None:
    answer = client.get(URL, headers={"Range": asked})

    assert answer.status_code == 206
    assert answer.content == TEXT[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/12"
    assert answer.headers["content-length"] == str(end - start)
    assert "content-digest" not in answer.headers  # it would be of the part, not of the whole
    assert "repr-digest" in answer.headers


@pytest.mark.parametrize("asked", ["bytes=12-", "bytes=99-100", "bytes=-0", f"bytes={'9' * 18}-"])
def test_range_outside_is_416_with_the_size(client: TestClient, asked: str) -> None:
    answer = client.get(URL, headers={"Range": asked})

    problem_of(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == "bytes */12"


@pytest.mark.parametrize(
    "asked", ["bytes=5-2", "bytes=-", "lines=0-1", "bytes=0-1,4-5", "x", f"bytes={'9' * 400}-"]
)
def test_range_that_cannot_be_read_is_ignored(client: TestClient, asked: str) -> None:
    answer = client.get(URL, headers={"Range": asked})

    assert answer.status_code == 200
    assert answer.content == TEXT


@pytest.mark.parametrize(
    ("condition", "status"),
    [
        (f'"{SHA}"', 206),
        ('"other"', 200),
        (f'W/"{SHA}"', 200),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 200),
    ],
)
def test_if_range_guards_a_resumed_download(
    client: TestClient, condition: str, status: int
) -> None:
    answer = client.get(URL, headers={"Range": "bytes=1-2", "If-Range": condition})

    assert answer.status_code == status


@pytest.mark.parametrize(
    ("mark", "status"),
    [(f'"{SHA}"', 304), (f'W/"{SHA}"', 304), ("*", 304), (f'"x", "{SHA}"', 304), ('"x"', 200)],
)
def test_if_none_match(client: TestClient, mark: str, status: int) -> None:
    answer = client.get(URL, headers={"If-None-Match": mark})

    assert answer.status_code == status
    assert answer.headers["etag"] == f'"{SHA}"'


def test_head_tells_all_but_the_bytes(client: TestClient, made: dict[str, Any]) -> None:
    for url in (URL, f"/v1/jobs/{made['id']}/artifacts/text/content"):
        head, whole = client.head(url), client.get(url)
        assert head.status_code == 200
        assert head.content == b""
        for name in ("content-length", "etag", "content-digest", "content-disposition"):
            assert head.headers[name] == whole.headers[name]
    assert client.head(URL, headers={"Range": "bytes=0-3"}).headers["content-length"] == "4"
    assert client.head(URL, headers={"Range": "bytes=99-"}).status_code == 416


def test_job_output_by_name_is_the_same_bytes(client: TestClient, made: dict[str, Any]) -> None:
    assert client.get(f"/v1/jobs/{made['id']}/artifacts/text/content").content == TEXT
    answer = client.get(f"/v1/jobs/{made['id']}/artifacts/model/content")
    assert "text" in problem_of(answer, 404, "not_found")["detail"]


def test_artifact_shows_its_lineage(client: TestClient, made: dict[str, Any]) -> None:
    shown = client.get(f"/v1/artifacts/{SHA}").json()

    assert shown["sha256"] == SHA
    assert shown["meta"] == {"lines": 2}
    assert shown["uploaded_as"] == []
    by = {one["job_id"]: one for one in shown["produced_by"]}[made["id"]]
    expected = {"kind": "echo", "output": "text", "stage": "lines", "chunk": 1, "inputs": {}}
    assert by == {"job_id": made["id"], **expected}


def test_row_without_its_blob_is_404_and_a_strange_media_type_is_plain_bytes(
    client: TestClient,
) -> None:
    context = context_of(client)
    content = b"<script>"
    path = context.settings.data_dir / "made-by-hand"
    path.write_bytes(content)
    blob = context.store.put(path)
    job_id = client.post("/v1/jobs", json=ECHO).json()["id"]
    row = {"size_bytes": 8, "format": "x", "meta": {}, "created_at": context.clock()}
    with transaction(context.engine) as session:
        named = '../../etc/\r\nX-Evil: 1/pass"wd\u202e.html'
        media_type = "text/html\r\nX-Evil: 1"
        session.add(Artifact(sha256=blob.sha256, file_name="x", media_type=media_type, **row))
        session.add(Artifact(sha256="f" * 64, file_name="gone", media_type="a/b", **row))
        session.flush()
        for sha256 in (blob.sha256, "f" * 64):
            sent = {"id": f"up_{sha256[:9]}", "file_name": "x", "size_bytes": 8, "sha256": sha256}
            at = {"created_at": context.clock(), "updated_at": context.clock()}
            mine = {"project_id": FIRST_PROJECT, "state": "complete", "artifact": sha256}
            session.add(Upload(**sent, **at, **mine))
        chunk = session.query(Chunk).filter_by(job_id=job_id, index=0).one()
        made = {"job_id": job_id, "name": "x", "role": "artifact", "sha256": blob.sha256}
        about = {"cached": False, "created_at": context.clock()}  # "made" goes before "sent"
        session.add(Output(chunk_id=chunk.id, file_name=named, **made, **about))

    problem_of(client.get(f"/v1/artifacts/{'f' * 64}/content"), 404, "not_found")
    answer = client.get(f"/v1/artifacts/{blob.sha256}/content")
    assert answer.content == content
    assert answer.headers["content-type"] == "application/octet-stream"
    assert "x-evil" not in answer.headers
    assert "sandbox" in answer.headers["content-security-policy"]
    named = answer.headers["content-disposition"]
    assert named == "attachment; filename=\"pass_wd.html\"; filename*=UTF-8''pass%22wd.html"


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("model.safetensors", "model.safetensors"),
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\x.npz", "x.npz"),
        ("..", "download"),
        ("", "download"),
        (".bashrc", "bashrc"),
        ("a\r\nb", "ab"),
        ("a\u202egpj.exe", "agpj.exe"),
        ("\ud800.txt", "txt"),
        ("Größe.npz", "Größe.npz"),
        ("x" * 999, "x" * 150),
    ],
)
def test_file_names_are_cleaned(name: str, cleaned: str) -> None:
    assert clean_name(name) == cleaned


@given(st.text(st.characters()))
def test_any_file_name_makes_a_safe_header(name: str) -> None:
    header = disposition(name)

    assert header.isascii()
    assert header.isprintable()
    assert header.count('"') == 2
