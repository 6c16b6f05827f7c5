"""What a worker checks and waits for before it takes work."""

import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine

from api.embedded import worker_env
from core.artifacts.store import LocalStore
from core.db.session import make_engine, transaction, upgrade
from core.jobs import housekeeping, pool
from core.jobs.pool import Place
from core.settings import Settings
from tests.conftest import wait_for
from tests.workers.conftest import now
from workers import start, threads
from workers.__main__ import main
from workers.alive import AliveFile
from workers.check import check_worker
from workers.device import DeviceMissing, machine_memory, memory_of
from workers.settings import StartRefused
from workers.start import Stopped
from workers.stop import Stop

GIB = 2**30


def settings_of(engine: Engine, folder: Path, **more: object) -> Settings:
    url = engine.url.render_as_string(hide_password=False)
    return Settings.model_validate({"database_url": url, "data_dir": folder, **more})


@pytest.fixture
def bound(engine: Engine, store: LocalStore) -> Engine:
    """A database whose server has started once."""
    with transaction(engine) as session:
        housekeeping.bind_store(session, store.identity())
    return engine


def admit(
    engine: Engine, folder: Path, *, rebind: bool = False, stop: Stop | None = None, **more: object
) -> Place:
    settings = settings_of(engine, folder, **more)
    admitted = start.admit(settings, "cpu", stop=stop or Stop(), rebind=rebind)
    admitted.engine.dispose()
    return admitted.place


def test_a_worker_is_in_the_pool_with_what_it_offers(bound: Engine, store: LocalStore) -> None:
    place = admit(bound, store.root, threads=3, memory_bytes=GIB, node="mill")

    with transaction(bound) as session:
        [(worker, alive)] = pool.workers(session, now=now())
    assert place == Place("mill:cpu", "cpu", GIB, 3)
    assert (worker.node_id, worker.kind, worker.threads, alive) == ("mill:cpu", "cpu", 3, True)
    assert worker.memory_bytes == GIB
    assert str(os.getpid()) in worker.id


def test_all_cpu_workers_compute_with_the_threads_of_the_first(
    bound: Engine, store: LocalStore
) -> None:
    first = admit(bound, store.root, threads=3)
    silent = admit(bound, store.root)

    assert (first.threads, silent.threads) == (3, 3)
    with pytest.raises(StartRefused, match=r"STILL_THREADS=2, but .* with 3 threads"):
        admit(bound, store.root, threads=2)


def test_other_threads_are_taken_where_nobody_computes_with_those(
    bound: Engine, store: LocalStore
) -> None:
    admit(bound, store.root, threads=3)
    embedded = admit(bound, store.root, threads=2, rebind=True)
    with transaction(bound) as session:
        pool.forget_all(session, owner_prefix="")
    alone = admit(bound, store.root, threads=1)

    assert (embedded.threads, alone.threads) == (2, 1)
    assert admit(bound, store.root).threads == 1


def test_two_that_start_at_once_agree(bound: Engine, store: LocalStore) -> None:
    told: list[object] = []

    def one(count: int) -> None:
        try:
            told.append(admit(bound, store.root, threads=count).threads)
        except StartRefused as refused:
            told.append(refused)

    both = [threading.Thread(target=one, args=(count,)) for count in (1, 2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()

    assert sum(isinstance(word, StartRefused) for word in told) == 1


def test_a_worker_beside_another_store_is_refused(bound: Engine, tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match="STILL_DATA_DIR"):
        admit(bound, tmp_path / "elsewhere")


def test_a_data_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    engine = make_engine(f"sqlite:///{tmp_path / 'none.db'}")

    with pytest.raises(StartRefused, match="STILL_DATA_DIR"):
        admit(engine, tmp_path / "file" / "data")


def test_a_worker_waits_for_the_server_to_bind_the_store(
    engine: Engine, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    stop = Stop()
    threading.Timer(1.5, stop.tell).start()

    with pytest.raises(Stopped):
        admit(engine, store.root, stop=stop)

    waited = [m for m in caplog.messages if "waiting for the database" in m]
    assert waited == ["waiting for the database: no server has started with it yet"]


def test_a_worker_waits_for_tables_of_its_own_version(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'new.db'}")
    store = LocalStore(tmp_path / "store")
    stop, found = Stop(), []
    thread = threading.Thread(target=lambda: found.append(admit(engine, store.root, stop=stop)))
    thread.start()
    time.sleep(0.5)
    early = list(found)

    upgrade(engine)
    with transaction(engine) as session:
        housekeeping.bind_store(session, store.identity())
    thread.join(20)
    engine.dispose()

    assert early == []
    assert len(found) == 1


def test_a_database_that_is_away_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop = Stop()
    threading.Timer(0.5, stop.tell).start()
    url = "postgresql+psycopg://still:a-long-password@127.0.0.1:1/none"
    settings = Settings(database_url=url, data_dir=tmp_path)

    with pytest.raises(Stopped):
        start.open_database(settings, stop=stop)

    assert "waiting for the database" in caplog.text
    assert "a-long-password" not in caplog.text


@pytest.mark.parametrize("device", ["cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_named(device: str) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceMissing, match=f"no device {device}: torch .* sees 0 GPUs"):
        memory_of(device)


def test_a_gpu_offers_what_torch_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text(
        "__version__ = 'of this test'\n"
        "class cuda:\n"
        "    device_count = lambda: 2\n"
        "    class get_device_properties:\n"
        "        def __init__(self, index): self.total_memory = (index + 1) * 2**30\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    assert [memory_of(f"cuda:{index}") for index in range(2)] == [GIB, 2 * GIB]
    with pytest.raises(DeviceMissing, match="no device cuda:2: torch of this test sees 2 GPUs"):
        memory_of("cuda:2")


def test_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine_memory(tmp_path) == whole

    inner = tmp_path / "sys/fs/cgroup/box/inner"
    inner.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box/inner\n")
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("1048576\n")

    assert machine_memory(tmp_path) == 1 << 20


def test_old_control_groups_limit_too(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    lines = "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n"
    (tmp_path / "proc/self/cgroup").write_text(lines)
    for controller in ("memory", "cpu"):
        (tmp_path / "sys/fs/cgroup" / controller).mkdir(parents=True)
    folder = tmp_path / "sys/fs/cgroup"
    (folder / "memory/memory.limit_in_bytes").write_text("2097152")
    (folder / "cpu/cpu.cfs_quota_us").write_text("50000")
    (folder / "cpu/cpu.cfs_period_us").write_text("100000")

    assert machine_memory(tmp_path) == 2 << 20
    assert threads.cores(tmp_path) == 1


def test_cores_are_counted_by_affinity_and_quota(tmp_path: Path) -> None:
    here = len(os.sched_getaffinity(0))
    assert threads.cores(tmp_path) == here

    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    for limit, count in (("max 100000", here), ("150000 100000", min(2, here)), ("1 100000", 1)):
        (tmp_path / "sys/fs/cgroup/cpu.max").write_text(limit)
        assert threads.cores(tmp_path) == count


def test_threads_are_set_before_anything_computes() -> None:
    code = (
        "import sys, workers.__main__, workers.team, workers.beat;"
        "sys.exit(bool({'numpy', 'torch'} & set(sys.modules)))"
    )
    env = {"OMP_WAIT_POLICY": "ACTIVE"}

    threads.apply(3, env)

    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "3"
    assert env["MKL_DYNAMIC"] == "FALSE", "else a smaller machine would take fewer"
    assert env["OMP_WAIT_POLICY"] == "ACTIVE"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_check_tells_whether_the_worker_here_is_well(bound: Engine, store: LocalStore) -> None:
    settings = settings_of(bound, store.root)
    before = check_worker(settings, "cpu", now=now())
    admit(bound, store.root)

    assert before == "no worker on cpu has said hello from here"
    assert check_worker(settings, "cpu", now=now()) is None
    assert "cuda:0" in (check_worker(settings, "cuda:0", now=now()) or "")
    late = check_worker(settings, "cpu", now=now() + timedelta(minutes=1))
    assert late == "the worker on cpu was not heard of for a while"


def test_a_check_tells_whether_the_beat_is_well(tmp_path: Path) -> None:
    alive = AliveFile(tmp_path / "own" / "alive")
    assert alive.wrong() == "no tick yet"

    alive.prepare()
    alive.touch()
    assert alive.wrong() is None
    os.utime(alive.path, (time.time() - 60,) * 2)
    assert alive.wrong() == "the last tick was 60 s ago"


def test_two_beats_of_one_machine_do_not_mask_each_other(tmp_path: Path) -> None:
    def path(**more: str) -> Path:
        return AliveFile.of(Settings.model_validate({"data_dir": tmp_path, **more})).path

    assert len({path(), path(database_url="sqlite:///other"), path(node="mill")}) == 3
    assert path() == path()


def test_a_tick_follows_no_link_and_trusts_no_shared_folder(tmp_path: Path) -> None:
    alive = AliveFile(tmp_path / "own" / "alive")
    alive.prepare()
    alive.path.symlink_to(tmp_path / "aim")
    with pytest.raises(OSError, match="symbolic links"):
        alive.touch()

    alive.path.parent.chmod(0o777)
    with pytest.raises(StartRefused, match="of this user alone"):
        alive.prepare()
    assert not (tmp_path / "aim").exists()


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STILL_")}  # noqa: TID251
    return subprocess.run(
        [sys.executable, "-m", "workers", *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**clean, **env},
        timeout=60,
    )


BROKER = {"STILL_BROKER_URL": "redis://127.0.0.1:1/0"}
POSTGRES = {"STILL_DATABASE_URL": "postgresql+psycopg://still:secret-word@127.0.0.1:1/none"}


@pytest.mark.parametrize(
    ("arguments", "env", "told"),
    [
        (("--device", "cpu"), {}, "STILL_BROKER_URL is not set"),
        (("--beat",), {}, "STILL_BROKER_URL is not set"),
        (("--device", "cpu"), BROKER, "STILL_DATABASE_URL"),
        (("--device", "cpu"), {**POSTGRES, "STILL_BROKER_URL": "amqp://x"}, "redis://"),
        (("--device", "cpu"), {**BROKER, **POSTGRES, "STILL_THREADS": "x"}, "STILL_THREADS"),
        (("--device", "cuda:63"), {**BROKER, **POSTGRES}, "no device cuda:63"),
    ],
    ids=["no broker", "no broker to beat", "no database", "other broker", "threads", "device"],
)
def test_what_can_only_be_wrong_ends_in_one_line(
    arguments: tuple[str, ...], env: dict[str, str], told: str
) -> None:
    done = run(*arguments, **env)

    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.startswith("stillroom: ")
    assert done.stderr.count("\n") == 1
    assert "secret-word" not in done.stderr


@pytest.mark.parametrize("device", ["gpu", "cuda", "cpu:0", "cuda:x"])
def test_an_unknown_device_is_a_usage_error(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["workers", "--device", device])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    assert device in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_the_embedded_worker_ends_with_its_server(bound: Engine, store: LocalStore) -> None:
    settings = settings_of(bound, store.root)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STILL_")}  # noqa: TID251
    own = {"STILL_DATABASE_URL": settings.url, "STILL_DATA_DIR": str(store.root)}
    with subprocess.Popen(
        [sys.executable, "-m", "workers", "--embedded", "--device", "cpu"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**clean, **own},
    ) as worker:
        wait_for(lambda: check_worker(settings, "cpu", now=now()) is None)
        assert worker.poll() is None
        assert worker.stdin is not None
        worker.stdin.close()
        assert worker.wait(10) == 0


def test_workers_of_a_server_get_no_key(tmp_path: Path) -> None:
    secrets = {"api_key": "a" * 20, "key_secret": "b" * 40, "metrics_key": "c" * 20}
    settings = Settings.model_validate({"data_dir": tmp_path, **secrets})

    told = str(worker_env(settings, threads=1))

    assert not any(name.upper() in told or value in told for name, value in secrets.items())


def test_an_embedded_worker_needs_no_celery() -> None:
    code = "import sys; sys.modules['celery'] = sys.modules['kombu'] = None; import workers.process"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_check_loads_nothing_of_the_runner() -> None:
    code = (
        "import sys; import workers.__main__, workers.check, workers.alive\n"
        "found = {'celery', 'core.jobs.runner', 'core.kinds', 'numpy'} & set(sys.modules)\n"
        "assert not found, found"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
