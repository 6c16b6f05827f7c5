"""Keeps one worker process per device alive. Its stdin closes with this process: then it ends."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.settings import Settings

log = logging.getLogger("stillroom.embedded")
FIRST_WAIT_S = 0.2
MOST_WAIT_S = 10.0
STEADY_S = 30.0
"""A worker that lived so long starts again at once."""
STOP_S = 5.0
_OWN = frozenset(
    {"host", "port", "api_key", "key_secret", "metrics_key", "broker_url", "devices", "threads"}
)
"""Settings of the server alone: a worker gets neither a key nor the address."""


def devices_of(settings: Settings, *, dev: Path = Path("/dev")) -> tuple[str, ...]:
    """Return the devices to run on: those asked for, else every GPU, else the CPU."""
    gpus = sum(1 for path in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    # Counted, not read from the names: a container may see only nvidia3, which CUDA calls 0.
    return settings.devices or tuple(f"cuda:{index}" for index in range(gpus)) or ("cpu",)


def worker_env(settings: Settings, threads: int) -> dict[str, str]:
    """Return a worker's environment: this process's own, and every setting said outright."""
    inherited = dict(os.environ)  # noqa: TID251 - handed on whole, nothing is read from it
    env = {name: value for name, value in inherited.items() if not name.startswith("STILL_")}
    for name, value in settings.model_dump(mode="json", exclude=set(_OWN)).items():
        if value is not None:
            env[f"STILL_{name.upper()}"] = value if isinstance(value, str) else json.dumps(value)
    env["STILL_THREADS"] = env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(threads)
    # Threads that spin while they wait make every process on a busy machine many times slower.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


class Embedded:
    """The worker processes of an embedded server."""

    def __init__(self, commands: Sequence[Sequence[str]], env: Mapping[str, str]) -> None:
        self._keepers = [_Keeper(command, env) for command in commands]

    @classmethod
    def of(cls, settings: Settings) -> "Embedded":
        """Plan one worker per device, the cores shared among them."""
        devices = devices_of(settings)
        threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // len(devices))
        # -P as this process: a folder named workers in the current directory is not ours.
        python = [sys.executable, *(["-P"] if sys.flags.safe_path else [])]
        command = [*python, "-m", "workers", "--embedded", "--device"]
        commands = [[*command, device] for device in devices]
        return cls(commands, worker_env(settings, threads))

    def start(self) -> None:
        """Start every worker."""
        for keeper in self._keepers:
            keeper.start()

    def stop(self, *, limit_s: float = STOP_S) -> None:
        """Close every worker's stdin, wait, and kill what is left."""
        for keeper in self._keepers:
            keeper.ask_to_stop()
        until = time.monotonic() + limit_s
        for keeper in self._keepers:
            keeper.stop(max(0.0, until - time.monotonic()))


class _Keeper:
    """Starts one worker again whenever it ends, ever more slowly if it ends at once."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._command = list(command)
        self._env = dict(env)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask_to_stop(self) -> None:
        self._stopping.set()
        with self._lock:
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()

    def stop(self, limit_s: float) -> None:
        self._thread.join(limit_s)
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                log.warning("killing worker %s: it did not stop", self._process.pid)
                self._process.kill()
        self._thread.join()

    def _keep(self) -> None:
        wait_s = FIRST_WAIT_S
        while not self._stopping.is_set():
            born = time.monotonic()
            status = self._run_once()
            if self._stopping.is_set():
                return
            if time.monotonic() - born > STEADY_S:
                wait_s = FIRST_WAIT_S
            log.error("worker ended with status %s; next start in %.1f s", status, wait_s)
            self._stopping.wait(wait_s)
            wait_s = min(2 * wait_s, MOST_WAIT_S)

    def _run_once(self) -> int | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            try:
                process = subprocess.Popen(self._command, stdin=subprocess.PIPE, env=self._env)
            except OSError:
                log.exception("cannot start a worker")
                return None
            self._process = process
        log.info("worker %s started: %s", process.pid, " ".join(self._command[1:]))
        status = process.wait()
        if process.stdin is not None:
            process.stdin.close()
        return status
