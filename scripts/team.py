"""The whole team mode on this machine, as processes: PostgreSQL, Redis, API, beat and workers.

``make team`` runs the demo through it. Tests and benches use ``Team``: whatever happens to their
process, none of the team's outlives it.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import click

from client import Stillroom, StillroomError
from scripts.guard import MARK
from scripts.processes import Guard, Process, TeamFailed, free_port
from scripts.servers import Postgres, Redis, StopMode
from workers.device import machine_memory

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "wordnet" / "demo.py"
READY_S = 90.0
MODULES = {"api": ["api"], "beat": ["workers", "--beat"], "worker": ["workers", "--device"]}
_ONLY_API = frozenset({"STILL_API_KEY", "STILL_KEY_SECRET", "STILL_METRICS_KEY"})
"""A worker gets no key, as in docker-compose.yml."""


@dataclass(frozen=True)
class Options:
    """What runs, and with which settings."""

    apis: int = 1
    beats: int = 1
    workers: int = 2
    device: str = "cpu"
    threads: int = 1
    """Of each worker."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """More STILL_* variables, for every process."""
    own: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Variables of one process or one sort: ``{"worker-1": {...}, "api": {...}}``."""
    folder: Path | None = None
    """Logs and the store; null: a temporary one, gone at the end."""


class Team:
    """A running team; leaving the context ends every process.

    Processes are named ``redis``, ``postgres``, ``api-1``, ``beat-1``, ``worker-1`` and so on. Each
    worker is a node of the pool by that name.
    """

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.api_key = f"operator-{secrets.token_hex(16)}"
        self.processes: dict[str, Process] = {}
        self.urls: list[str] = []
        self._end = ExitStack()

    def __enter__(self) -> Self:
        """Start everything and wait until the workers have said hello."""
        try:
            self._start()
        except BaseException:
            self._end.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End everything: what computes first, the servers last."""
        self._end.close()

    @property
    def url(self) -> str:
        """Where the first API answers."""
        return self.urls[0]

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL."""
        return self._postgres.url

    @property
    def broker_url(self) -> str:
        """Redis, with its password."""
        return self._redis.url

    @property
    def env(self) -> dict[str, str]:
        """The settings that every process of the service shares, without keys."""
        return {
            "STILL_DATABASE_URL": self.database_url,
            "STILL_BROKER_URL": self.broker_url,
            "STILL_DATA_DIR": str(self.folder / "data"),
            **self.options.settings,
        }

    @property
    def mark(self) -> str:
        """What marks a process as one of the team's, so that it ends with it."""
        return self._guard.mark

    def client(self) -> Stillroom:
        """Open a client with the operator's key; the caller closes it."""
        return Stillroom(self.url, api_key=self.api_key)

    def start_api(self, *, env: Mapping[str, str] | None = None) -> str:
        """Start one more API and wait for it; return its name."""
        port = free_port()
        own = {
            "STILL_PORT": str(port),
            "STILL_API_KEY": self.api_key,
            "STILL_KEY_SECRET": self._key_secret,
        }
        name = self._launch("api", [], {**own, **(env or {})})
        self.urls.append(f"http://127.0.0.1:{port}")
        self._wait_api(name)
        return name

    def start_worker(
        self, *, device: str | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        """Start one more worker; return its name. It joins the pool when it is ready."""
        threads = str(self.options.threads)
        own = {"STILL_THREADS": threads, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if (device or self.options.device) == "cpu":
            # Together they offer what there is, not each of them all of it.
            own["STILL_MEMORY_BYTES"] = str(machine_memory() // max(1, self.options.workers))
        return self._launch("worker", [device or self.options.device], {**own, **(env or {})})

    def start_beat(self, *, env: Mapping[str, str] | None = None) -> str:
        """Start one more beat; two do no harm."""
        return self._launch("beat", [], env or {})

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal; after SIGKILL the process is gone when this returns."""
        process = self.processes[name]
        if number == signal.SIGKILL:
            process.kill()
        else:
            process.wanted = False
            process.send(number)

    def restart(self, name: str, number: int = signal.SIGKILL, *, limit_s: float = 15.0) -> None:
        """End a process by a signal and start it again; of an API, wait until it answers."""
        process = self.processes[name]
        process.stop(number, limit_s=limit_s)
        process.start()
        if name.startswith("api-"):
            self._wait_api(name)
        elif name == "redis":
            self._redis.wait()
        elif name == "postgres":
            self._postgres.wait()

    def restart_postgres(self, mode: StopMode = "fast") -> None:
        """Restart PostgreSQL in place, as ``pg_ctl -m`` fast or immediate, or by kill -9."""
        self._postgres.restart(mode)

    def flush_redis(self) -> None:
        """Lose every message and everything else in Redis."""
        self._redis.flush()

    def revive(self) -> list[str]:
        """Start again what ended by itself; return the names."""
        ended = [p for p in self.processes.values() if p.wanted and not p.alive]
        for process in ended:
            process.start()
        return [process.name for process in ended]

    def names(self, sort: str) -> list[str]:
        """Return the names of all ``api``, ``beat`` or ``worker`` processes."""
        return [name for name in self.processes if name.startswith(f"{sort}-")]

    def wait_workers(self, count: int, *, limit_s: float = READY_S) -> None:
        """Return once the pool counts ``count`` workers that are this team's and run now."""
        until = time.monotonic() + limit_s
        while self._alive() < count:
            for name in self.names("worker"):
                process = self.processes[name]
                if process.wanted and not process.alive:
                    raise process.failed(f"ended with status {process.status}")
            if time.monotonic() > until:
                last = self.processes[self.names("worker")[-1]]
                raise last.failed(f"and others: not {count} workers within {limit_s:.0f} s")
            time.sleep(0.1)

    def _start(self) -> None:
        options = self.options
        # PostgreSQL's data lie elsewhere: as root it runs as a user who may not enter ours.
        postgres = Path(tempfile.mkdtemp(prefix="stillroom-postgres-"))
        postgres.chmod(0o755)
        temporary = [postgres]
        if options.folder is None:
            temporary.append(Path(tempfile.mkdtemp(prefix="stillroom-team-")))
        self.folder = options.folder or temporary[-1]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._key_secret = secrets.token_hex(32)
        self._guard = Guard(*temporary)
        self._end.callback(self._guard.close)
        self._end.callback(self._stop)
        self._start_servers(postgres)
        for _ in range(options.apis):
            self.start_api()
        for _ in range(options.beats):
            self.start_beat()
        for _ in range(options.workers):
            self.start_worker()
        self.wait_workers(options.workers)

    def _start_servers(self, postgres: Path) -> None:
        env, log = _inherited(), self.folder / "postgres.log"
        self._redis = Redis(self.folder, self._guard, env=env)
        self.processes["redis"] = self._redis.process
        self._postgres = Postgres(postgres / "data", log, self._guard, env=env)
        self.processes["postgres"] = self._postgres.process
        self._redis.wait()
        self._postgres.wait()

    def _launch(self, sort: str, arguments: list[str], env: Mapping[str, str]) -> str:
        name = f"{sort}-{len(self.names(sort)) + 1}"
        own = self.options.own
        mine = {"STILL_NODE": name, **env, **own.get(sort, {}), **own.get(name, {})}
        if sort != "api":
            mine = {key: value for key, value in mine.items() if key not in _ONLY_API}
        # -P: a folder named api or workers in the current directory is not the service.
        command = [sys.executable, "-P", "-m", *MODULES[sort], *arguments]
        self.processes[name] = Process(
            name,
            command,
            env={**_inherited(), **self.env, **mine},
            log=self.folder / f"{name}.log",
            guard=self._guard,
        ).start()
        return name

    def _wait_api(self, name: str) -> None:
        url = self.urls[self.names("api").index(name)]
        with Stillroom(url, api_key=self.api_key) as client:
            self.processes[name].wait_until(lambda: _ready(client), limit_s=READY_S)

    def _alive(self) -> int:
        for url in self.urls:
            with Stillroom(url, api_key=self.api_key) as client, suppress(StillroomError):
                there = {int(one["id"].split(":")[2]) for one in client.ready()["workers"]}
                mine = (self.processes[name] for name in self.names("worker"))
                return sum(process.alive and process.pid in there for process in mine)
        return 0

    def _stop(self) -> None:
        """End in order; all of one sort are asked at once, so that they end together."""
        for sort in ("worker", "beat", "api"):
            for name in self.names(sort):
                self.processes[name].send(signal.SIGTERM)
            for name in self.names(sort):
                self.processes[name].stop(limit_s=10)
        for name, number in (("postgres", signal.SIGINT), ("redis", signal.SIGTERM)):
            if name in self.processes:
                self.processes[name].stop(number)


def _inherited() -> dict[str, str]:
    """Return this process's environment without any setting of the service."""
    inherited = dict(os.environ)  # noqa: TID251 - handed on, nothing is read from it
    env = {name: value for name, value in inherited.items() if not name.startswith("STILL_")}
    # Threads that spin while they wait make every process on a busy machine many times slower.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


def _ready(client: Stillroom) -> bool:
    try:
        client.ready()
    except StillroomError:
        return False
    return True


def run_demo(team: Team) -> int:
    """Run the example's chain through the team; return its exit status."""
    env = {**_inherited(), "STILL_API_KEY": team.api_key, MARK: team.mark}
    return subprocess.run(
        [sys.executable, DEMO, "--url", team.url], env=env, check=False
    ).returncode


def stay(team: Team) -> None:
    """Say where the team is and keep its processes alive until Ctrl-C."""
    click.echo(f"\nexport STILL_URL={team.url} STILL_API_KEY={team.api_key}")
    click.echo(f"logs: {team.folder}; the team runs until Ctrl-C")
    with suppress(KeyboardInterrupt):
        while True:
            for name in team.revive():
                click.echo(f"{name} had ended and was started again", err=True)
            time.sleep(1.0)


@click.command()
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1, 64))
@click.option("--apis", default=1, show_default=True, type=click.IntRange(1, 8))
@click.option("--device", default="cpu", show_default=True, help="Of every worker: cpu or cuda:N.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Per worker.")
@click.option("--demo/--no-demo", default=True, show_default=True, help="Run the example's chain.")
@click.option("--stay", "stays", is_flag=True, help="Then stay up, and say url and key.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Logs and results. [default: a temporary one]",
)
def main(
    workers: int,
    apis: int,
    device: str,
    threads: int,
    folder: Path | None,
    *,
    demo: bool,
    stays: bool,
) -> None:
    """Start PostgreSQL, Redis, API, beat and workers; run the demo through them; stop them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Also where a shell started this in the background, and had it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = Options(apis=apis, workers=workers, device=device, threads=threads, folder=folder)
    status = 0
    try:
        with Team(options) as team:
            running = ", ".join(f"{name} ({p.pid})" for name, p in team.processes.items())
            click.echo(f"running: {running}")
            if demo:
                status = run_demo(team)
            if stays and status == 0:
                stay(team)
    except TeamFailed as error:
        raise click.ClickException(str(error)) from None
    click.echo("the team has stopped")
    sys.exit(status)


if __name__ == "__main__":
    main()
