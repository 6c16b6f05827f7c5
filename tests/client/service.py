"""The real service, started as a user starts it, in its own process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from client import Stillroom, StillroomError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Service:
    """``still up`` in its own process, which may be killed and started again."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder, self.port, self.settings = folder, free_port(), settings
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "client", "up", "--port", str(self.port)]
        command += ["--data-dir", str(self.folder / "data"), "--devices", "cpu", "--threads", "1"]
        with (self.folder / "log").open("ab") as log:
            env = {**os.environ, **self.settings}  # noqa: TID251 - handed on to the service
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        with Stillroom(self.url) as client:
            for _ in range(300):
                try:
                    client.ready()
                except StillroomError:
                    assert self.process.poll() is None, (self.folder / "log").read_text()
                    time.sleep(0.1)
                else:
                    return
        raise AssertionError((self.folder / "log").read_text())

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(30)


def still(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "client", "--url", service.url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
