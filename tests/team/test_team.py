"""The team that tests and benches start: nothing of it outlives them, and it can be hurt."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from client import Stillroom
from scripts import guard, team
from scripts.processes import Guard, Process, TeamFailed
from scripts.servers import REDIS_MISSING, Postgres, Redis, StopMode
from scripts.team import Options, Team

ROOT = Path(__file__).resolve().parents[2]
OWNER = """
import sys, time
from scripts.team import Options, Team
with Team(Options(workers=1)) as team:
    pids = [process.pid for process in team.processes.values()]
    print(team._guard.mark, team.folder, *pids, flush=True)
    time.sleep(600)
"""


def until(true: Callable[[], bool], *, limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    # A folder that pytest keeps: the logs say why a test failed.
    with Team(Options(apis=2, workers=2, folder=tmp_path_factory.mktemp("team"))) as found:
        yield found


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Redis, Postgres]]:
    place = Path(team.tempfile.mkdtemp(prefix="stillroom-postgres-"))
    place.chmod(0o755)
    keeper, env = Guard(place), team._inherited()
    found = Redis(tmp_path, keeper, env=env)
    database = Postgres(place / "data", tmp_path / "postgres.log", keeper, env=env)
    found.wait()
    database.wait()
    yield found, database
    keeper.close()
    assert not list(guard.members(keeper.mark))
    assert not place.exists()


def ask(database: Postgres, text: str) -> list[tuple[object, ...]]:
    address = database.url.replace("+psycopg", "")
    with psycopg.connect(address, autocommit=True) as connection:
        cursor = connection.execute(text.encode())
        return cursor.fetchall() if cursor.description else []


@pytest.mark.parametrize("mode", ["fast", "immediate", "crash"])
def test_postgres_comes_back_with_its_data_at_the_same_place(
    servers: tuple[Redis, Postgres], mode: StopMode
) -> None:
    _, database = servers
    ask(database, "CREATE TABLE kept (text text)")
    ask(database, "INSERT INTO kept VALUES ('yes')")
    before = database.process.pid

    database.restart(mode)

    assert database.process.pid != before
    assert ask(database, "SELECT text FROM kept") == [("yes",)]


def test_servers_ask_for_their_passwords(servers: tuple[Redis, Postgres]) -> None:
    queue, database = servers

    with (
        redis.Redis(port=queue.port) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()
    wrong = database.url.replace("+psycopg", "").replace(database.password, "wrong")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong)


def test_flushed_redis_is_empty(servers: tuple[Redis, Postgres]) -> None:
    queue, _ = servers
    with redis.Redis.from_url(queue.url) as client:
        client.set("hint", "cpu")
        queue.flush()
        assert client.dbsize() == 0


def test_missing_redis_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Guard()
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(TeamFailed, match=REDIS_MISSING):
        Redis(tmp_path, keeper, env={})
    keeper.close()


def test_a_process_that_ends_too_soon_tells_the_end_of_its_log(tmp_path: Path) -> None:
    keeper = Guard()
    code = "import sys; sys.exit('no port left')"
    process = Process(
        "api-1", [sys.executable, "-c", code], env={}, log=tmp_path / "api.log", guard=keeper
    ).start()

    with pytest.raises(TeamFailed, match=r"(?s)api-1 ended with status 1 .*no port left"):
        process.wait_until(lambda: False)
    keeper.close()


def test_the_guard_ends_grandchildren_in_sessions_of_their_own(tmp_path: Path) -> None:
    keeper = Guard()
    code = (
        "import subprocess, sys, time;"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True); time.sleep(600)"
    )
    Process(
        "parent", [sys.executable, "-c", code], env={}, log=tmp_path / "log", guard=keeper
    ).start()
    until(lambda: len(list(guard.members(keeper.mark))) == 2)

    keeper.close()

    assert not list(guard.members(keeper.mark))


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_process_that_started_the_team(number: int) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert owner.stdout is not None
    mark, folder, *pids = owner.stdout.readline().split()
    told = {int(pid): guard.born(int(pid)) for pid in pids}
    assert len(told) == 5
    assert told.keys() <= set(guard.members(mark, told))

    owner.send_signal(number)
    owner.wait(60)
    owner.stdout.close()

    until(lambda: not list(guard.members(mark, told)))
    until(lambda: not Path(folder).exists())


@pytest.mark.chaos
def test_the_demo_ends_with_the_command_that_started_it() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-m", "scripts.team"], stdout=subprocess.DEVNULL, cwd=ROOT
    )

    def children() -> list[int]:
        listed = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
        return [int(pid) for pid in listed if b"demo.py" in command_of(pid)]

    try:
        until(lambda: bool(children()), limit_s=120)
        [demo] = children()
    finally:
        owner.kill()
        owner.wait(60)

    until(lambda: b"demo.py" not in command_of(demo))


def command_of(pid: int | str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.chaos
def test_every_api_serves_the_same_jobs(running: Team) -> None:
    first, second = running.urls
    with (
        Stillroom(first, api_key=running.api_key) as here,
        Stillroom(second, api_key=running.api_key) as there,
    ):
        job = here.submit({"kind": "echo", "text": "hi"})
        assert there.wait(job["id"])["state"] == "succeeded"


@pytest.mark.chaos
def test_workers_are_places_of_their_own_and_come_back(running: Team) -> None:
    running.restart("worker-1")
    extra = running.start_worker()
    running.wait_workers(3)
    running.kill(extra)

    with running.client() as client:
        alive = {worker["device"] for worker in client.ready()["workers"] if worker["alive"]}
    assert alive == {"cpu"}
    assert not running.processes[extra].alive
    assert running.revive() == [], "killed on purpose"


@pytest.mark.chaos
def test_work_goes_on_after_every_server_was_restarted(running: Team) -> None:
    running.flush_redis()
    running.restart_postgres("immediate")
    running.restart("redis")
    running.restart("api-1")

    with running.client() as client:
        job = client.submit({"kind": "echo", "text": "still here"})
        assert client.wait(job["id"])["state"] == "succeeded"


@pytest.mark.chaos
def test_no_worker_gets_a_key(running: Team) -> None:
    for name in (*running.names("worker"), *running.names("beat")):
        process = running.processes[name]
        assert running.api_key not in process.env.values()
        assert not {"STILL_API_KEY", "STILL_KEY_SECRET"} & process.env.keys()
