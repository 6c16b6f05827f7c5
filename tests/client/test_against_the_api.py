"""The client against the real service, started as a user starts it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench._tiny_models import reload, save_folder, tiny_model
from client import ApiError, Retry, Stillroom
from tests.client.service import Service, still

PAIRS = Path(__file__).parents[2] / "examples" / "wordnet" / "embeddings.npz"
ECHO = {"kind": "echo", "text": "hello"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    (folder / "models").mkdir()
    service = Service(folder, STILL_MODEL_ROOTS=json.dumps([str(folder / "models")]))
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture
def client(service: Service, tmp_path: Path) -> Iterator[Stillroom]:
    retry = Retry(limit_s=30, contact_s=10, first_s=0.05, most_s=0.5)
    with Stillroom(service.url, retry=retry, cache_dir=tmp_path / "cache") as client:
        yield client


def test_a_job_is_submitted_watched_and_fetched(
    client: Stillroom, service: Service, tmp_path: Path
) -> None:
    job = client.submit({**ECHO, "times": 3, "labels": {"case": "whole"}})

    ended = client.wait(job["id"])

    assert ended["state"] == "succeeded"
    assert [j["id"] for j in client.list(labels={"case": "whole"})] == [job["id"]]
    assert client.metrics(job["id"])["lines"] == [[0, 1.0], [1, 2.0], [2, 3.0]]
    path = client.download(f"{job['id']}/text", tmp_path / "echo.txt")
    assert path.read_text() == "hello\n" * 3
    assert client.artifact(ended["artifacts"]["text"])["produced_by"][0]["job_id"] == job["id"]
    events = [event.type for event in client.events(job["id"])]
    assert events[-1] == "job.succeeded"


def test_a_download_is_taken_up_in_the_middle(client: Stillroom, tmp_path: Path) -> None:
    job = client.submit({**ECHO, "text": "z" * 200, "times": 40})
    sha256 = client.wait(job["id"])["artifacts"]["text"]
    whole = ("z" * 200 + "\n").encode() * 40
    assert hashlib.sha256(whole).hexdigest() == sha256
    (tmp_path / f".out.{sha256[:16]}.part").write_bytes(whole[:5000])
    seen: list[int] = []

    client.download(sha256, tmp_path / "out", on_progress=lambda done, _: seen.append(done))

    assert (tmp_path / "out").read_bytes() == whole
    assert min(seen) > 5000


def test_a_model_comes_in_and_leaves_as_a_folder_that_loads(
    client: Stillroom, service: Service, tmp_path: Path
) -> None:
    model = tiny_model("qwen3")
    save_folder(model, service.folder / "models" / "tiny", shard_bytes=30_000)
    job = client.submit({"kind": "import_model", "folder": "tiny"})
    ended = client.wait(job["id"])
    assert ended["state"] == "succeeded", ended["error"]

    ran = still(service, "get", job["id"], "-o", str(tmp_path))

    assert ran.returncode == 0, ran.stderr
    ids = torch.tensor([[256, 1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(reload(tmp_path / "model")(ids).logits, model(ids).logits)
    left = client.artifact(ended["artifacts"]["model"])
    assert left["meta"]["shards"] == len(list((tmp_path / "model").glob("*.safetensors")))
    refused = client.wait(client.submit({"kind": "import_model", "folder": "absent"})["id"])
    assert refused["error"] is not None
    assert refused["error"]["code"] == "spec_invalid"
    assert str(service.folder) not in refused["error"]["message"]


def test_pairs_are_uploaded_and_not_sent_twice(client: Stillroom) -> None:
    first = client.upload(PAIRS)
    seen: list[int] = []

    again = client.upload(PAIRS, on_progress=lambda done, _: seen.append(done))

    assert first["format"] == "pairs"
    assert first["meta"]["rows"] == 6000
    assert again["sha256"] == first["sha256"]
    assert seen == [PAIRS.stat().st_size]


def test_bad_pairs_are_refused_with_the_reason(client: Stillroom, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ApiError) as caught:
        client.upload(tmp_path / "bad.npz")
    assert caught.value.code == "data_invalid"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["kinds"], 0),
        (["ls"], 0),
        (["submit", "echo", "--text", "hi", "--times", "2", "--watch"], 0),
        (["submit", "echo", "--text", "", "--watch"], 1),
        (["submit", "echo", "--times", "0", "--text", "x"], 2),
        (["show", "job_00000000000000000000000000"], 1),
    ],
)
def test_exit_codes(service: Service, arguments: list[str], code: int) -> None:
    ran = still(service, *arguments)
    assert ran.returncode == code, ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_schema_of_every_kind_makes_a_command(service: Service, client: Stillroom) -> None:
    for kind in client.kinds():
        ran = still(service, "submit", kind["kind"], "--help")
        assert ran.returncode == 0, ran.stderr
        assert "--priority" in ran.stdout
        assert "(for legacy)" not in ran.stdout, "an option is no alternative"


def test_a_cancelled_job_ends_watch_with_3(service: Service, client: Stillroom) -> None:
    job = client.submit({**ECHO, "times": 1000})
    assert client.cancel(job["id"])["state"] in {"cancelling", "cancelled"}
    assert still(service, "watch", job["id"]).returncode == 3


def test_watch_lives_through_a_killed_server(tmp_path: Path) -> None:
    service = Service(tmp_path)
    try:
        submit = still(service, "submit", "echo", "--text", "on", "--times", "80", "--json")
        job = json.loads(submit.stdout)
        watch = subprocess.Popen(
            [sys.executable, "-m", "client", "--url", service.url, "watch", job["id"]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert watch.stdout is not None
        watch.stdout.readline()
        service.stop(signal.SIGKILL)
        time.sleep(0.5)
        service.start()
        out, err = watch.communicate(timeout=60)
    finally:
        service.stop()

    assert watch.returncode == 0, err
    assert "succeeded" in out
    assert "trying again" in err


def test_ctrl_c_in_a_terminal_leaves_the_job(service: Service, client: Stillroom) -> None:
    job = client.submit({**ECHO, "times": 1000})
    # Tests that a shell runs in the background ignore Ctrl-C, and so would what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watch = subprocess.Popen(
        [sys.executable, "-m", "client", "--url", service.url, "watch", job["id"]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watch.stdout is not None
    watch.stdout.readline()
    os.kill(watch.pid, signal.SIGINT)
    _, err = watch.communicate(timeout=20)

    assert watch.returncode == 130, err
    assert "keeps running" in err
    assert client.get(job["id"])["state"] in {"queued", "running"}
    client.cancel(job["id"])
