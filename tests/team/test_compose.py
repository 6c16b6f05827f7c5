"""The very commands of docker-compose.yml, as processes, against real PostgreSQL and Redis.

Only what a container has of its own is changed: host names, ports, and where the volume lies. The
code is that of the wheel which the Dockerfile builds.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client import ApiError, Stillroom, StillroomError
from scripts.processes import Guard, Process, free_port
from scripts.servers import Postgres
from tests.team.compose import image_env, put_in, read_compose

SERVICES: dict[str, Any] = read_compose()["services"]
KEY = "operator-of-the-test"
pytestmark = pytest.mark.chaos


@dataclass
class Machine:
    """What Docker would be: services by name, and their health."""

    folder: Path
    guard: Guard
    postgres: Postgres
    secrets: dict[str, str]
    replaced: dict[str, str]
    code: Path
    processes: dict[str, Process] = field(default_factory=dict)

    def local(self, text: str) -> str:
        """Put the variables in, and this machine's places for those of containers."""
        places = "|".join(map(re.escape, self.replaced))
        return re.sub(places, lambda match: self.replaced[match[0]], put_in(text, self.secrets))

    def env(self, service: str) -> dict[str, str]:
        """What the container's process would see: the image's variables and the service's."""
        found = SERVICES[service]
        target = found.get("build", {}).get("target")
        asked = {**(image_env(target) if target else {}), **found["environment"]}
        programs = [Path(sys.executable).parent, self.postgres.bin, *os.get_exec_path()]
        own = {"PATH": ":".join(map(str, programs)), "PYTHONPATH": str(self.code)}
        tmp = self.folder / f"tmp-{service}"
        tmp.mkdir(exist_ok=True)
        return {
            **{name: self.local(value) for name, value in asked.items() if value is not None},
            **own,
            **({"HOME": str(tmp), "MPLCONFIGDIR": str(tmp)} if target else {}),
            "TMPDIR": str(tmp),
        }

    def up(self, service: str) -> Process:
        """Start the service's own command."""
        process = self.processes[service] = Process(
            service,
            [self.local(word) for word in SERVICES[service]["command"]],
            env=self.env(service),
            log=self.folder / f"{service}.log",
            guard=self.guard,
        ).start()
        return process

    def check(self, service: str) -> subprocess.CompletedProcess[str]:
        """Run the service's own health check."""
        how, *words = map(self.local, SERVICES[service]["healthcheck"]["test"])
        return subprocess.run(
            ["sh", "-c", *words] if how == "CMD-SHELL" else words,
            env=self.env(service),
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    def healthy(self, service: str) -> bool:
        return self.check(service).returncode == 0


def build(folder: Path) -> Path:
    """Return a folder with the files of the wheel, as the image has them."""
    source = folder / "source"
    root = Path(__file__).resolve().parents[2]
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("api", "client", "core", "migrations", "workers"):
        shutil.copytree(root / name, source / name, ignore=ignored)
    for name in ("constraints.txt", "pyproject.toml", "README.md"):
        shutil.copy(root / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True, capture_output=True)
    [wheel] = folder.glob("stillroom-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "code")
    return folder / "code"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Every service up and healthy, in the order that depends_on asks for."""
    folder = tmp_path_factory.mktemp("machine")
    place = Path(tempfile.mkdtemp(prefix="stillroom-postgres-"))
    place.chmod(0o755)
    guard = Guard(place)
    try:
        inherited = {"PATH": os.defpath}
        postgres = Postgres(place / "data", folder / "postgres.log", guard, env=inherited)
        postgres.wait()
        found = Machine(folder, guard, postgres, *places(folder, postgres), build(folder))
        start(found)
        yield found
    finally:
        guard.close()


def places(folder: Path, postgres: Postgres) -> tuple[dict[str, str], dict[str, str]]:
    """The .env of an operator; and what stands here for what containers have."""
    secrets = {
        "POSTGRES_PASSWORD": postgres.password,
        "REDIS_PASSWORD": "a-password-of-redis",
        "STILL_OPERATOR_KEY": KEY,
        "STILL_KEY_SECRET": "0123456789abcdef0123456789abcdef",
    }
    redis = str(free_port())
    replaced = {
        "postgres:5432": f"127.0.0.1:{postgres.port}",
        "redis:6379": f"127.0.0.1:{redis}",
        "port 6379": f"bind 127.0.0.1\nport {redis}",  # a container has a network of its own
        "5432": str(postgres.port),
        "6379": redis,
        "8321": str(free_port()),
        "0.0.0.0": "127.0.0.1",
        "/var/lib/stillroom": str(folder / "volume"),
    }
    return secrets, replaced


def start(machine: Machine) -> None:
    (machine.folder / "volume").mkdir()
    assert machine.healthy("postgres"), machine.check("postgres")
    for service in ("redis", "api", "worker", "beat"):
        machine.up(service).wait_until(lambda name=service: machine.healthy(name), limit_s=90)


@pytest.fixture
def client(machine: Machine) -> Iterator[Stillroom]:
    url = machine.local("http://127.0.0.1:8321")
    with Stillroom(url, api_key=KEY) as found:
        yield found


def test_every_health_check_succeeds_on_a_service_that_is_well(machine: Machine) -> None:
    for service in ("postgres", "redis", "api", "worker", "beat"):
        done = machine.check(service)
        assert done.returncode == 0, (service, done.stderr)


def test_a_job_over_http_is_done_by_a_worker(machine: Machine, client: Stillroom) -> None:
    job = client.submit({"kind": "echo", "text": "team", "times": 3})
    ended = client.wait(job["id"])

    assert ended["state"] == "succeeded"
    path = client.download(ended["artifacts"]["text"], machine.folder / "echo.txt")
    assert path.read_text() == "team\n" * 3


def test_the_api_asks_for_its_key(machine: Machine) -> None:
    with (
        Stillroom(machine.local("http://127.0.0.1:8321"), api_key="somebody-else's") as stranger,
        pytest.raises(ApiError) as refused,
    ):
        stranger.submit({"kind": "echo", "text": "no"})
    assert refused.value.status == 401


def test_redis_asks_for_its_password_and_shows_it_nowhere(machine: Machine) -> None:
    redis = machine.processes["redis"]
    password = machine.secrets["REDIS_PASSWORD"]
    command = Path(f"/proc/{redis.pid}/cmdline").read_bytes().decode()
    stranger = machine.local("redis-cli -p 6379 ping").split()

    assert "redis-server" in command
    assert password not in command
    assert "NOAUTH" in subprocess.run(stranger, capture_output=True, text=True, check=False).stdout


def test_api_and_beat_never_load_torch(machine: Machine) -> None:
    for service in ("api", "beat"):
        maps = Path(f"/proc/{machine.processes[service].pid}/maps").read_text()
        assert "libtorch" not in maps
        assert "python" in maps


@pytest.mark.parametrize("service", ["api", "worker", "beat"])
def test_a_service_told_to_stop_ends_well_and_its_health_check_fails(
    machine: Machine, client: Stillroom, service: str
) -> None:
    status = machine.processes[service].stop(signal.SIGTERM, limit_s=20)

    assert status == 0, machine.processes[service].tail()
    if service != "beat":  # which is known by the age of its last tick
        assert not machine.healthy(service)
    machine.up(service).wait_until(lambda: machine.healthy(service), limit_s=60)
    job = client.submit({"kind": "echo", "text": service})
    assert client.wait(job["id"])["state"] == "succeeded"


def test_an_api_without_its_database_is_unhealthy_and_recovers(machine: Machine) -> None:
    machine.postgres.process.stop(signal.SIGQUIT)
    try:
        assert not machine.healthy("postgres")
        assert not machine.healthy("api")
    finally:
        machine.postgres.process.start()
        machine.postgres.wait()
    machine.processes["api"].wait_until(lambda: machine.healthy("api"))
    with Stillroom(machine.local("http://127.0.0.1:8321"), api_key=KEY) as client:
        assert _eventually_done(client)


def _eventually_done(client: Stillroom) -> bool:
    try:
        job = client.submit({"kind": "echo", "text": "after the outage"})
        return client.wait(job["id"])["state"] == "succeeded"
    except StillroomError as error:
        pytest.fail(str(error))
