"""Processes that never outlive who started them, each with a log of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from scripts.guard import MARK

GUARD = Path(__file__).with_name("guard.py")
TAIL_LINES = 25
POLL_S = 0.05


class TeamFailed(RuntimeError):
    """A process of the team did not do what it was started for; tells what its log said last."""


class Guard:
    """Ends every process started through it when it closes, or when this process dies."""

    def __init__(self, *folders: Path) -> None:
        """Take charge of ``folders`` too: they are removed at the end."""
        self.mark = uuid.uuid4().hex
        self.started: list[subprocess.Popen[bytes]] = []
        command = [sys.executable, "-I", str(GUARD), self.mark, *map(str, folders)]
        # A session of its own: what ends a terminal's foreground must not end the guard first.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def take(self, process: subprocess.Popen[bytes]) -> None:
        """Take charge of a process that was just started."""
        self.started.append(process)
        if self._process.stdin is not None:
            self._process.stdin.write(f"{process.pid}\n".encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """End what is left; return when nothing is."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        for process in self.started:
            process.wait()


class Process:
    """One command that can be started again and again, with the same log and environment."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path,
        guard: Guard,
        user: str | None = None,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.env = dict(env)
        self.log = log
        self.wanted = False
        """Whether it should run: false once somebody ended it on purpose."""
        self._guard = guard
        self._user = user
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it; it must not be running."""
        assert not self.alive, f"{self.name} runs already"
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.env, MARK: self._guard.mark},
                cwd="/" if self._user else None,
                user=self._user,
                group=self._user,
                extra_groups=[] if self._user else None,
                start_new_session=True,
            )
        self._guard.take(self._popen)
        self.wanted = True
        return self

    @property
    def pid(self) -> int:
        """The process id of the present run, or of the last."""
        assert self._popen is not None, f"{self.name} was never started"
        return self._popen.pid

    @property
    def alive(self) -> bool:
        """Whether it runs now."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def status(self) -> int | None:
        """The exit status of the last run; negative: the signal that ended it."""
        return None if self._popen is None else self._popen.poll()

    def send(self, number: int) -> None:
        """Send a signal to the process itself; to one that has ended, do nothing."""
        if self._popen is not None:
            self._popen.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, *, limit_s: float = 15.0) -> int:
        """Ask it to end, kill it after ``limit_s``; return the exit status."""
        self.wanted = False
        if self._popen is None:
            return 0
        self._popen.send_signal(number)
        try:
            return self._popen.wait(limit_s)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """Kill it with all that is in its session's group, as ``kill -9`` does."""
        self.wanted = False
        if self._popen is None:
            return 0
        if self._popen.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
        return self._popen.wait()

    def tail(self) -> str:
        """Return the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-TAIL_LINES:])

    def failed(self, what: str) -> TeamFailed:
        """Return the error that says what went wrong, and what the log says."""
        return TeamFailed(f"{self.name} {what} ({self.log}):\n{self.tail()}")

    def wait_until(self, ready: Callable[[], bool], *, limit_s: float = 60.0) -> None:
        """Return once ``ready``; raise TeamFailed if it ends before, or is late."""
        until = time.monotonic() + limit_s
        while not ready():
            if not self.alive:
                raise self.failed(f"ended with status {self.status}")
            if time.monotonic() > until:
                raise self.failed(f"was not ready within {limit_s:.0f} s")
            time.sleep(POLL_S)


def free_port() -> int:
    """Return a loopback port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
