import io
import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select

from core import logs
from core.artifacts.store import LocalStore
from core.db.models import Chunk
from core.db.session import reading, transaction
from core.jobs import service
from core.jobs.projects import FIRST_PROJECT
from core.kinds.echo import Spec
from core.settings import Settings
from tests.conftest import Clock, make_runner

STILL_KEY = "still_4fq0zk8w2mxv_7rtypks9dhcj6bngqe1a4fq0zk8w2mxv7rtypks9d"
DATABASE = "postgresql+psycopg://still:pa%40ss-of-the-database@db.example/still"
BROKER = "redis://:the-broker-password@redis.example:6379/0"


def team(folder: Path) -> Settings:
    return Settings(
        data_dir=folder,
        database_url=DATABASE,
        broker_url=BROKER,
        api_key="the-operators-own-key",
        key_secret="k" * 40,
        metrics_key="only-for-the-metrics",
    )


class Lines:
    """What is written to a logger: its own, or the one named."""

    def __init__(self, formatter: logging.Formatter, log: logging.Logger | None = None) -> None:
        self._stream = io.StringIO()
        self.handler = logging.StreamHandler(self._stream)
        self.handler.setFormatter(formatter)
        self.log = log or logging.Logger("test", logging.INFO)
        self.log.addHandler(self.handler)

    def __call__(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._stream.getvalue().splitlines()]

    @property
    def text(self) -> str:
        return self._stream.getvalue()


@pytest.fixture
def lines() -> Lines:
    return Lines(logs.JsonLines(process={"process": "worker"}))


def test_facts_stand_on_every_record_inside_and_on_none_after(lines: Lines) -> None:
    with logs.about(job="job_1", chunk=7, request_id=None):
        lines.log.info("one")
        with logs.about(attempt=2, chunk=8):
            lines.log.info("two")
        lines.log.info("three")
    lines.log.info("four")

    shown = [{k: line.get(k) for k in ("job", "chunk", "attempt")} for line in lines()]
    assert shown == [
        {"job": "job_1", "chunk": 7, "attempt": None},
        {"job": "job_1", "chunk": 8, "attempt": 2},
        {"job": "job_1", "chunk": 7, "attempt": None},
        {"job": None, "chunk": None, "attempt": None},
    ]
    assert all(line["process"] == "worker" for line in lines())
    assert "request_id" not in lines()[0]


def test_facts_are_left_behind_by_an_error(lines: Lines) -> None:
    with pytest.raises(ValueError, match="no"), logs.about(job="job_1"):
        raise ValueError("no")

    lines.log.info("after")
    assert "job" not in lines()[0]


def test_a_carried_thread_keeps_the_facts_it_was_started_with(lines: Lines) -> None:
    go = threading.Event()

    def beat() -> None:
        go.wait(10)
        lines.log.info("beat")

    with logs.about(job="job_1"):
        carried = threading.Thread(target=logs.carried(beat))
        bare = threading.Thread(target=beat)
    for thread in (carried, bare):
        thread.start()
    with logs.about(job="job_2"):
        go.set()
        for thread in (carried, bare):
            thread.join()

    assert sorted(str(line.get("job")) for line in lines()) == ["None", "job_1"]


def test_facts_of_other_threads_stay_apart(lines: Lines) -> None:
    together = threading.Barrier(8)

    def work(number: int) -> None:
        with logs.about(job=f"job_{number}"):
            together.wait(10)
            lines.log.info("%s", number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {(line["job"], line["message"]) for line in lines()} == {
        (f"job_{number}", str(number)) for number in range(8)
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (DATABASE, "postgresql+psycopg://still:***@db.example/still"),
        (f"cannot reach {BROKER}, again", "cannot reach redis://:***@redis.example:6379/0, again"),
        ("rediss://u:p@ss/w:rd@h:1/0", "rediss://u:***@h:1/0"),
        (f"key {STILL_KEY} is unknown", "key still_4fq0zk8w2mxv_*** is unknown"),
        (f"?key%3D{STILL_KEY}", "?key%3Dstill_4fq0zk8w2mxv_***"),
        ("still_" + "x" * 30, "still_***"),
        (f"Authorization: Bearer {STILL_KEY}", "Authorization: Bearer ***"),
        ("host=db password=hunter2 user=still", "host=db password=*** user=still"),
        ("http://c:4318/v1?token=abc&x=1", "http://c:4318/v1?token=***&x=1"),
    ],
)
def test_a_secret_is_known_by_its_shape(text: str, shown: str) -> None:
    assert logs.redacted(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "serving http://127.0.0.1:8321",
        "GET /v1/jobs/job_01arz3ndektsv4rrffq69g5fav 200",
        "sqlite:////srv/stillroom/stillroom.db",
        "still_running: 3 of 4 chunks",
        "postgresql+psycopg://still@db/still",
        "send `Authorization: Bearer KEY` with the service's key",
        "mail@example.org wrote",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert logs.redacted(text) == text


def test_no_setting_that_is_a_secret_is_ever_written(tmp_path: Path) -> None:
    settings = team(tmp_path)
    lines = Lines(logs.JsonLines(secrets=logs.secrets_of(settings)))
    secrets = [
        *("the-operators-own-key", "k" * 40, "only-for-the-metrics"),
        *("pa%40ss-of-the-database", "pa@ss-of-the-database", "the-broker-password", STILL_KEY),
    ]

    for secret in secrets:
        with logs.about(job=secret):
            lines.log.info("given: '%s'", secret, extra={"path": f"/x/{secret}"})
        try:
            raise RuntimeError(f"login with {secret} failed")
        except RuntimeError:
            lines.log.exception("failed")

    assert len(lines()) == 2 * len(secrets)
    assert [secret for secret in secrets if secret in lines.text] == []
    assert "login with ***" in lines()[1]["traceback"]


def test_a_setting_hides_itself() -> None:
    settings = Settings(api_key="the-operators-own-key", metrics_key="only-for-the-metrics")

    assert "own-key" not in repr(settings)
    assert "the-metrics" not in repr(settings)


@pytest.mark.parametrize("piece", ["a://b:", "a.", "://", "still_", "password=", "a://b:c@"])
def test_hostile_text_is_read_in_linear_time(piece: str) -> None:
    text = piece * (1 << 17)

    began = time.perf_counter()
    logs.redacted(text)

    assert time.perf_counter() - began < 5


def test_what_json_cannot_say_is_said_in_words(lines: Lines) -> None:
    with logs.about(path=Path("/srv"), share=float("0.5"), ok=True):
        lines.log.info("line one\nline two \ud800")

    [line] = lines()
    assert (line["path"], line["share"], line["ok"]) == ("/srv", 0.5, True)
    assert line["message"] == "line one\nline two \ud800"
    assert lines.text.count("\n") == 1


class FullDisk(LocalStore):
    def put(self, path: Path) -> Any:
        raise OSError(28, "No space left on device")


def test_what_is_logged_while_a_chunk_runs_says_which_chunk(
    engine: Engine, clock: Clock, tmp_path: Path
) -> None:
    with transaction(engine) as session:
        spec = Spec(text="hi")
        job = service.submit(session, spec, project=FIRST_PROJECT, by="local", now=clock())
    runner = make_runner(engine, FullDisk(tmp_path / "store"), clock, tmp_path)
    lines = Lines(logs.JsonLines(), logging.getLogger("core.jobs"))

    runner.run_one()
    lines.log.removeHandler(lines.handler)

    assert any("No space left" in line.get("traceback", "") for line in lines())
    with reading(engine) as session:
        chunk_id = session.scalar(select(Chunk.id))
    told = {(line.get("job"), line.get("chunk"), line.get("attempt")) for line in lines()}
    assert told == {(job.id, chunk_id, 1)}
    assert logs.facts() == {}


PROGRAM = """
import logging, sys, threading, warnings
from core import logs
from core.settings import Settings

logs.set_up(Settings(api_key="the-operators-own-key"), process="worker", worker="w1")
logging.getLogger("stillroom.x").info("said")
logging.getLogger("alembic.runtime").info("of no interest")
logging.getLogger("celery.worker.strategy").info("of no interest")
warnings.warn("old", DeprecationWarning, stacklevel=1)
thread = threading.Thread(target=lambda: 1 / 0, name="beat")
thread.start()
thread.join()
raise RuntimeError("wrong: the-operators-own-key")
"""


def test_every_line_of_a_process_is_json_to_the_last() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "default", "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
    )

    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert run.returncode == 1
    assert [(line["level"], line["logger"]) for line in lines] == [
        ("info", "stillroom.x"),
        ("warning", "py.warnings"),
        ("critical", "stillroom"),
        ("critical", "stillroom"),
    ]
    assert [line["message"] for line in lines[2:]] == [
        "thread beat ended: ZeroDivisionError",
        "the process ends: RuntimeError",
    ]
    assert lines[3]["traceback"].endswith("RuntimeError: wrong: ***")
    assert {(line["process"], line["worker"]) for line in lines} == {("worker", "w1")}
