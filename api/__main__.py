"""``python -m api``: the whole service from one command, set by STILL_* variables."""

import logging
import signal
import socket
import sys
from contextlib import ExitStack, nullcontext, suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_settings import SettingsError
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from api.app import DoorOpen, check_door, create_app, open_data
from api.lock import DataDirBusy, only_server
from api.rates import BadLimit, make_rates
from core import logs, tracing
from core.db.session import make_engine
from core.errors import Conflict
from core.settings import Settings, told

USAGE_ERROR = 2
DATABASES = ("sqlite", "postgresql")
EXAMPLE_URL = "postgresql+psycopg://user:password@host/name"


class Server(uvicorn.Server):
    """Says where it is once it listens, and tells the event streams to end with the signal."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start; only what is true by then is announced."""
        await super().startup(sockets)
        if self.started:
            logging.getLogger("stillroom").info("serving %s", self._url)
            with suppress(OSError):  # nobody reads: no reason to end
                sys.stdout.write(f"dashboard  {self._url}/\nAPI docs   {self._url}/docs\n")
                sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note the signal."""
        app = self.config.app
        context = getattr(app.state, "context", None) if isinstance(app, FastAPI) else None
        if context is not None:
            context.stopping.set()
        super().handle_exit(sig, frame)


def main() -> int:
    """Serve until a signal; return the exit status."""
    with ExitStack() as refused:
        try:
            settings = Settings()
            check_door(settings)
            make_rates(settings)
            listener = refused.enter_context(_listen(settings.host, settings.port))
            # The application takes the lock for good; a team's servers share the folder.
            with nullcontext() if settings.team else only_server(settings.data_dir):
                _check_database(settings.url)
                open_data(settings)[0].dispose()
            tracing.set_up(settings, "stillroom-api")
        except (
            ValidationError,
            SettingsError,
            DataDirBusy,
            DatabaseRefused,
            DoorOpen,
            BadLimit,
            tracing.TracingUnavailable,
            Conflict,
            OSError,
        ) as error:
            sys.stderr.write(f"stillroom: {_one_line(error)}\n")
            return USAGE_ERROR
        refused.pop_all()  # the listener is the server's now
    logs.set_up(settings, process="api")
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=10,
        server_header=False,
        date_header=True,
    )
    server = Server(config, _url(settings.host, settings.port))
    # uvicorn raises the signal again once it is down: ending on request is success.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    server.run(sockets=[listener])
    tracing.close()
    return 0 if server.started else 1


def _listen(host: str, port: int) -> socket.socket:
    """Bind before anything starts, so that a busy port is told at once."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # Only of a socket that says it is TCP does asyncio switch off the delay of small packets, which
    # would hold up each answer on a connection in use for 40 ms.
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot serve on {host}:{port}: {error.strerror}; set STILL_PORT") from error
    return listener


def _url(host: str, port: int) -> str:
    """Return an address that a browser on this machine can open."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


class DatabaseRefused(RuntimeError):
    """STILL_DATABASE_URL names no database that can be used; tells no password."""


def _check_database(url: str) -> None:
    """Connect once, so that a wrong URL is told in one line."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Not what was given: it may hold a password.
        raise DatabaseRefused(f"not a database URL; write it like {EXAMPLE_URL}") from None
    if parsed.get_backend_name() not in DATABASES:
        allowed = ", ".join(DATABASES)
        raise DatabaseRefused(f"{parsed.get_backend_name()} is not served; allowed: {allowed}")
    try:
        engine = make_engine(url)
    except (ArgumentError, ModuleNotFoundError) as error:
        raise DatabaseRefused(f"no driver {parsed.drivername}: {error}") from None
    try:
        with engine.connect():
            pass
    except SQLAlchemyError as error:
        told = " ".join(str(getattr(error, "orig", None) or type(error).__name__).split())
        told = told.replace(parsed.password or "\0", "***")
        raise DatabaseRefused(f"the {parsed.drivername} database does not open: {told}") from None
    finally:
        engine.dispose()


def _one_line(error: Exception) -> str:
    """Name the variable, the value and what was allowed; a secret's value stays unsaid."""
    if isinstance(error, (ValidationError, SettingsError)):
        return told(error)
    if isinstance(error, DatabaseRefused):
        return f"STILL_DATABASE_URL: {error}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
