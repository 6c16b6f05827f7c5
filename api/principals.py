"""Who asks: a key or a cookie becomes a Principal, remembered for two seconds and no longer."""

import hashlib
import hmac
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from http.cookies import CookieError, SimpleCookie

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers

from core.db.session import reading, transaction
from core.errors import Unauthorized
from core.jobs import keys
from core.jobs.keys import Principal, Scope
from core.jobs.projects import FIRST_PROJECT
from core.settings import Settings

log = logging.getLogger("stillroom.api")
REMEMBERED_FOR = timedelta(seconds=2)
"""So long after its revocation a key may still open: the price of a poll without a query."""
REMEMBERED = 4096
COOKIE = "stillroom"
COOKIE_FOR = timedelta(days=7)
OPERATOR, LOCAL = "operator", "local"
METRICS = "metrics"
"""The scope of the metrics key; no other key has it."""
EVERYTHING = frozenset(Scope)
NO_KEY = "send `Authorization: Bearer KEY`, with the operator's key or one of a project"


@dataclass(frozen=True)
class Proof:
    """What a request shows of itself."""

    bearer: str | None = None
    cookie: str | None = None

    @classmethod
    def of(cls, headers: Headers) -> "Proof":
        """Read the headers; a bearer key decides alone."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return cls(bearer=given.strip())
        return cls(cookie=_cookie(headers))

    def name(self) -> str:
        """Return what it is remembered under: not the key itself."""
        text = f"{self.bearer is not None} {self.bearer or self.cookie or ''}"
        return hashlib.sha256(text.encode(errors="replace")).hexdigest()


class Principals:
    """Resolves proofs. Thread-safe."""

    def __init__(
        self,
        *,
        engine: Engine,
        settings: Settings,
        secret: bytes,
        clock: Callable[[], datetime],
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._secret = secret
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Principal, datetime]] = {}
        self._noted: dict[str, datetime] = {}

    @property
    def secret(self) -> bytes:
        """What keys are hashed under."""
        return self._secret

    def recall(self, proof: Proof) -> Principal | None:
        """Return whom a proof stands for where that takes no database; else None."""
        if proof.bearer is not None:
            if _same(proof.bearer, self._settings.api_key):
                return Principal(FIRST_PROJECT, EVERYTHING, OPERATOR)
            if _same(proof.bearer, self._settings.metrics_key):
                return Principal(FIRST_PROJECT, frozenset({METRICS}), METRICS)
        elif proof.cookie is None and self._open:
            return Principal(FIRST_PROJECT, EVERYTHING, LOCAL)
        return self._remembered(proof.name())

    @property
    def _open(self) -> bool:
        """Whether no key is needed: settings allow that for an embedded server on loopback."""
        return self._settings.api_key is None

    def find(self, proof: Proof) -> Principal:
        """Return whom a proof stands for; may ask the database.

        Raises:
            Unauthorized: for nobody.
        """
        found = self.recall(proof)
        if found is not None:
            return found
        try:
            found = self._look_up(proof)
        except Unauthorized:
            if proof.bearer is None and self._open:
                return Principal(FIRST_PROJECT, EVERYTHING, LOCAL)  # a cookie of another server
            raise
        self._remember(proof.name(), found)
        self._note_use(found)
        return found

    def _look_up(self, proof: Proof) -> Principal:
        now = self._clock()
        if proof.bearer is not None:
            keys.parse(proof.bearer)  # before the database is asked
            with reading(self._engine) as session:
                return keys.verify(session, proof.bearer, now=now, secret=self._secret)
        actor = self._read_cookie(proof.cookie or "")
        if actor is None:
            raise Unauthorized(NO_KEY)
        return self._by_actor(actor)

    def _by_actor(self, actor: str) -> Principal:
        if actor in (OPERATOR, LOCAL):
            return Principal(FIRST_PROJECT, EVERYTHING, actor)
        with reading(self._engine) as session:
            return keys.principal_of(session, actor, now=self._clock())

    def again(self, principal: Principal) -> None:
        """Check that a principal may go on, as a stream does that lasts.

        Raises:
            Unauthorized: its key was revoked or is over.
        """
        if not self.knows(principal):
            self._remember(_name_of(principal), self._by_actor(principal.actor))

    def knows(self, principal: Principal) -> bool:
        """Whether a principal may go on, as far as is known without asking the database."""
        keyless = principal.actor in (OPERATOR, LOCAL)
        return keyless or self._remembered(_name_of(principal)) is not None

    def _remembered(self, name: str) -> Principal | None:
        with self._lock:
            principal, at = self._known.get(name, (None, None))
        fresh = at is not None and timedelta(0) <= self._clock() - at < REMEMBERED_FOR
        return principal if fresh else None

    def _remember(self, name: str, principal: Principal) -> None:
        with self._lock:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[name] = (principal, self._clock())

    def _note_use(self, principal: Principal) -> None:
        """Write when a key was last used, once a minute; a key works without that."""
        if not principal.actor.startswith("key_"):
            return
        now = self._clock()
        with self._lock:
            last = self._noted.get(principal.actor)
            if last is not None and timedelta(0) <= now - last < keys.USED_EVERY:
                return
            if len(self._noted) >= REMEMBERED:
                self._noted.clear()
            self._noted[principal.actor] = now
        try:
            with transaction(self._engine) as session:
                keys.used(session, principal.actor, now=now)
        except SQLAlchemyError as error:
            log.warning("cannot note the use of %s: %s", principal.actor, type(error).__name__)

    def cookie_for(self, principal: Principal) -> str:
        """Return a value that proves the key was known, without holding it."""
        until = str(int((self._clock() + COOKIE_FOR).timestamp()))
        return f"{principal.actor}.{until}.{self._sign(principal.actor, until)}"

    def _read_cookie(self, value: str) -> str | None:
        """Return whose cookie this is, None where it is forged or too old."""
        actor, _, rest = value.partition(".")
        until, _, signature = rest.partition(".")
        if not (until.isascii() and until.isdigit() and len(until) < 16):
            return None
        good = hmac.compare_digest(
            signature.encode(errors="replace"), self._sign(actor, until).encode()
        )
        return actor if good and int(until) > self._clock().timestamp() else None

    def _sign(self, actor: str, until: str) -> str:
        """Sign under the key secret; the operator's cookies end with the operator's key."""
        with_key = ""
        if actor == OPERATOR and self._settings.api_key is not None:
            with_key = self._settings.api_key.get_secret_value()
        text = "\0".join(("dashboard", actor, until, with_key))
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


def _name_of(principal: Principal) -> str:
    return f"actor {principal.actor}"


def _same(given: str, secret: object) -> bool:
    """Compare with a setting, in constant time."""
    if secret is None:
        return False
    value: str = secret.get_secret_value()  # type: ignore[attr-defined]
    return hmac.compare_digest(given.encode(errors="replace"), value.encode())


def _cookie(headers: Headers) -> str | None:
    jar: SimpleCookie = SimpleCookie()
    try:
        jar.load(headers.get("cookie", ""))
    except CookieError:
        return None
    return jar[COOKIE].value if COOKIE in jar else None
