"""kill -9 of the server in the middle of the demo's chain changes no byte of any result."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from sqlalchemy import select

from client import Retry, Stillroom, StillroomError
from core.db.models import Chunk, Job, Output
from core.db.session import make_engine, reading

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "wordnet" / "demo.py"
ROWS = 1_500
"""Of the demo's 6,000 pairs: as many chunks, a quarter of the work in most of them."""


class Server:
    """``python -m api`` on one port and data folder, started again after each kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = Stillroom(self.url, retry=Retry(limit_s=120))
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # noqa: TID251
        own = {"STILL_DATA_DIR": str(self.folder / "data"), "STILL_PORT": str(self.port)}
        with (self.folder / "server.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "api"],
                env={**env, **own, "STILL_DEVICES": '["cpu"]'},
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + 60
        while True:
            try:
                self.client.ready()
            except StillroomError:
                assert process.poll() is None, (self.folder / "server.log").read_text()
                assert time.monotonic() < until, "the server never became ready"
                time.sleep(0.1)
            else:
                return process

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.process = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.client.close()


def write_pairs(path: Path) -> Path:
    with np.load(DEMO.with_name("embeddings.npz")) as whole:
        np.savez(path, **{name: whole[name][:ROWS] for name in whole.files})
    return path


@contextmanager
def running_demo(server: Server) -> Iterator[subprocess.Popen[bytes]]:
    """The demo against a server, as a person would start it; gone when the context ends."""
    output, listing = str(server.folder / "output"), str(server.folder / "listing.json")
    some = str(write_pairs(server.folder / "pairs.npz"))
    command = [sys.executable, str(DEMO), "--url", server.url, "--pairs", some]
    with (server.folder / "demo.log").open("wb") as log:
        demo = subprocess.Popen(
            [*command, "--output-dir", output, "--json", listing], stdout=log, stderr=log
        )
        try:
            yield demo
        finally:
            demo.kill()
            demo.wait()


def finish_demo(server: Server, demo: subprocess.Popen[bytes]) -> dict[str, Any]:
    status = demo.wait(600)
    said = (server.folder / "demo.log").read_text()
    log = (server.folder / "server.log").read_text()[-4000:]
    assert status == 0, f"{said}\n{log}"
    listing: dict[str, Any] = json.loads((server.folder / "listing.json").read_text())
    return listing


def facts(server: Server) -> tuple[dict[tuple[str, str, int, str], str], int, int]:
    """Every stored file of every chunk by where it came from; chunks, and attempts at them."""
    engine = make_engine(f"sqlite:///{server.folder / 'data' / 'stillroom.db'}")
    with reading(engine) as session:
        query = (
            select(Job.kind, Chunk.stage, Chunk.index, Output.name, Output.sha256)
            .join(Chunk, Chunk.id == Output.chunk_id)
            .join(Job, Job.id == Output.job_id)
        )
        files = {(row[0], row[1], row[2], row[3]): row[4] for row in session.execute(query)}
        attempts = session.scalars(select(Chunk.attempt)).all()
    engine.dispose()
    return files, len(attempts), sum(attempts)


def wait_until(server: Server, true: Callable[[dict[str, dict[str, Any]]], bool]) -> None:
    """Poll the jobs, by kind, until the moment has come."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        jobs = {job["kind"]: dict(job) for job in server.client.list()}
        if len(jobs) == 4 and true(jobs):
            return
        time.sleep(0.05)
    raise TimeoutError("the moment never came")


def in_stage(kind: str, stage: str, done: float) -> Callable[[dict[str, dict[str, Any]]], bool]:
    """The job has ``done`` chunks behind it and works on ``stage``, or is already past that."""

    def reached(jobs: dict[str, dict[str, Any]]) -> bool:
        job = jobs[kind]
        if job["state"] == "succeeded":
            return True
        progress = job["progress"]
        return progress["stage"] == stage and progress["done"] >= done

    return reached


MOMENTS = [
    ("fit_federated", "score", 2.0),
    ("cache_targets", "bivectors", 1.0),
    ("distill", "train", 1.0),
    ("distill", "train", 4.0),
    ("evaluate", "judge", 2.0),
]


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    with Server(calm) as first, Server(killed) as second:
        yield first, second


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_kill_9_of_the_server_changes_no_byte(servers: tuple[Server, Server]) -> None:
    calm, killed = servers
    with running_demo(calm) as demo:
        undisturbed = finish_demo(calm, demo)

    with running_demo(killed) as demo:
        for kind, stage, done in MOMENTS:
            wait_until(killed, in_stage(kind, stage, done))
            killed.restart()
        survived = finish_demo(killed, demo)

    assert survived == undisturbed
    files, chunks, attempts = facts(killed)
    wanted, calm_chunks, calm_attempts = facts(calm)
    assert files == wanted
    assert chunks == calm_chunks == calm_attempts
    assert attempts <= chunks + len(MOMENTS), "a kill costs at most one chunk"
    assert attempts >= chunks + 3, "most kills hit running work"
    assert list((killed.folder / "data" / "scratch").iterdir()) == []
    print(
        f"{len(MOMENTS)} kills, {attempts - chunks} of {chunks} chunks run again, "
        f"{len(files)} files with equal SHA-256"
    )
