"""``python -m api``: the whole service from one command, set by STILL_* variables."""

import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_settings import SettingsError

from api.access import JsonLines
from api.app import create_app
from api.lock import DataDirBusy, only_server
from core.settings import Settings

USAGE_ERROR = 2


class Server(uvicorn.Server):
    """Tells the event streams to end as soon as a signal comes, so that shutdown never waits."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note the signal."""
        app = self.config.app
        context = getattr(app.state, "context", None) if isinstance(app, FastAPI) else None
        if context is not None:
            context.stopping.set()
        super().handle_exit(sig, frame)


def main() -> int:
    """Serve until a signal; return the exit status."""
    try:
        settings = Settings()
        listener = _listen(settings.host, settings.port)
        with only_server(settings.data_dir):
            pass  # told here in one line; the application takes the lock for good
    except (ValidationError, SettingsError, DataDirBusy, OSError) as error:
        sys.stderr.write(f"stillroom: {_one_line(error)}\n")
        return USAGE_ERROR
    _set_up_logs()
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=10,
        server_header=False,
        date_header=True,
    )
    server = Server(config)
    # uvicorn raises the signal again once it is down: ending on request is success.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    logging.getLogger("stillroom").info("serving http://%s:%s", host, settings.port)
    server.run(sockets=[listener])
    return 0 if server.started else 1


def _listen(host: str, port: int) -> socket.socket:
    """Bind before anything starts, so that a busy port is told at once."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot serve on {host}:{port}: {error.strerror}; set STILL_PORT") from error
    return listener


def _one_line(error: Exception) -> str:
    """Name the variable, the value and what was allowed; a secret's value stays unsaid."""
    if isinstance(error, SettingsError):
        return f"{error}; write it as JSON"
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    told = []
    for wrong in error.errors(include_url=False):
        name = "_".join(str(step) for step in wrong["loc"][:1]).upper()
        message = wrong["msg"].removeprefix("Value error, ")
        if not name:
            told.append(message)
        elif name == "API_KEY":
            told.append(f"STILL_{name}: {message}")
        else:
            told.append(f"STILL_{name}: {message}; got {wrong['input']!r}")
    return "; ".join(told)


def _set_up_logs() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
