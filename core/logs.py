"""What every process logs: JSON lines, with the facts they are about; no secret gets out."""

import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime
from functools import partial
from types import MappingProxyType
from typing import Any, ParamSpec, TextIO, TypeVar
from urllib.parse import unquote, urlsplit

from core.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("stillroom")
FIELDS = ("request_id", "method", "path", "status", "millis", "client", "problem")
"""What a record may bring by ``extra``; all else comes from about()."""
QUIET: Mapping[str, int] = {
    "alembic": logging.WARNING,
    "amqp": logging.WARNING,
    "celery": logging.WARNING,
    "httpcore2": logging.WARNING,
    "httpx2": logging.WARNING,
    "kombu": logging.WARNING,
    "matplotlib": logging.WARNING,
    "onnx_ir": logging.WARNING,
    "onnxscript": logging.WARNING,
    "opentelemetry": logging.ERROR,
    "torch": logging.WARNING,
    "urllib3": logging.WARNING,
}
"""They speak of things no operator asked for."""

HIDDEN = "***"
LITERAL_FROM = 12
"""Shorter passwords are hidden only where the shape tells: as words they would hide too much."""
_SHAPES: Sequence[tuple[str, re.Pattern[str], str]] = (
    # scheme://user:password@host; greedy, for an @ may stand in a password. Bounded: linear time.
    (
        "://",
        re.compile(r"([A-Za-z][\w+.-]{0,30}://[^\s:@/\"']{0,128}):[^\s\"'<>]{0,256}@"),
        r"\1:***@",
    ),
    ("bearer", re.compile(r"(?i)\b(bearer)\s+[^\s\"',]{12,}"), r"\1 ***"),
    ("basic", re.compile(r"(?i)\b(basic)\s+[^\s\"',]{12,}"), r"\1 ***"),
    # The part that names the key stays: it tells which one to revoke.
    ("still_", re.compile(r"(?i)(still_[0-9a-z]{12}_)[0-9a-z]{16,}"), r"\1***"),
    ("still_", re.compile(r"(?i)\bstill_\w{20,}"), "still_***"),
    (
        "=",
        re.compile(r"(?i)\b(password|passwd|secret|token|api_key)=[^\s&\"',;]+"),
        r"\1=***",
    ),
)
"""What is in every such text, in small letters; its shape; what is written instead."""
_FACTS: ContextVar[Mapping[str, Any]] = ContextVar("facts", default=MappingProxyType({}))


@contextmanager
def about(**facts: object) -> Iterator[None]:
    """Put these facts (job, chunk, attempt, request_id, trace_id ...) on every record inside.

    What is None is left out. A thread begins without facts: start it with carried().
    """
    known = {name: fact for name, fact in facts.items() if fact is not None}
    before = _FACTS.set({**_FACTS.get(), **known})
    try:
        yield
    finally:
        _FACTS.reset(before)


def carried(work: Callable[P, T]) -> Callable[P, T]:
    """Return ``work`` bound to the facts, and the trace, of this moment; for one thread.

    ``Thread(target=carried(beat))``: what beat logs is about what its starter was about.
    """
    return partial(copy_context().run, work)


def facts() -> Mapping[str, Any]:
    """Return the facts in force here."""
    return _FACTS.get()


def redacted(text: str, *, secrets: Sequence[str] = ()) -> str:
    """Hide passwords in URLs, Stillroom's keys, credentials, and each of ``secrets``."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    small = text.lower()
    for mark, shape, instead in _SHAPES:
        if mark in small:
            text = shape.sub(instead, text)
    return text


def secrets_of(settings: Settings) -> tuple[str, ...]:
    """Return what must never be logged, word by word; the longest first."""
    kept = (settings.api_key, settings.key_secret, settings.metrics_key)
    found = {secret.get_secret_value() for secret in kept if secret is not None}
    broker = settings.broker_url.get_secret_value() if settings.broker_url else None
    for url in (settings.database_url, broker, settings.otel_endpoint):
        password = _password(url or "")
        found |= {password, unquote(password)}
    return tuple(sorted((s for s in found if len(s) >= LITERAL_FROM), key=len, reverse=True))


def _password(url: str) -> str:
    try:
        return urlsplit(url).password or ""
    except ValueError:
        return ""


class JsonLines(logging.Formatter):
    """One JSON object per record."""

    def __init__(self, *, secrets: Sequence[str] = (), process: Mapping[str, Any] = {}) -> None:
        super().__init__()
        self._secrets = secrets
        self._process = dict(process)

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line."""
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
            **facts(),
        }
        for name in FIELDS:
            if getattr(record, name, None) is not None:
                line[name] = getattr(record, name)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        shown = {name: self._clean(fact) for name, fact in line.items()}
        return json.dumps(shown, ensure_ascii=True)

    def _clean(self, fact: Any) -> Any:
        if fact is None or isinstance(fact, bool | int | float):
            return fact
        return redacted(str(fact), secrets=self._secrets)


def set_up(
    settings: Settings, *, process: str, stream: TextIO | None = None, **more: object
) -> None:
    """Log as JSON lines to standard error; warnings and what nobody caught become lines too.

    Args:
        settings: Whose secrets stay hidden.
        process: What this process is: api, worker or beat.
        stream: Instead of standard error.
        more: Further facts of the whole process, such as the worker's id.
    """
    handler = logging.StreamHandler(stream)
    whole = {"process": process, **more}
    handler.setFormatter(JsonLines(secrets=secrets_of(settings), process=whole))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(capture=True)
    sys.excepthook = _ended
    threading.excepthook = _thread_ended


def _ended(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, Exception):
        log.critical("the process ends: %s", kind.__name__, exc_info=(kind, error, trace))
    else:
        sys.__excepthook__(kind, error, trace)


def _thread_ended(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or args.exc_type is SystemExit:
        return
    name = args.thread.name if args.thread else "?"
    trace = (args.exc_type, args.exc_value, args.exc_traceback)
    log.critical("thread %s ended: %s", name, args.exc_type.__name__, exc_info=trace)
