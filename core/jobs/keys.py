"""Keys that prove who asks: shown once when made, kept as an HMAC only, never as themselves."""

import hashlib
import hmac
import os
import re
import secrets
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path

from pydantic import SecretStr
from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from core.db.models import ApiKey, Project
from core.errors import Conflict, NotFound, SpecInvalid, Unauthorized

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_ID, _SECRET, _CHECK = 12, 33, 7
"""Characters of 5 bits each: 60 to find the key by, 165 that nobody guesses, a CRC-32."""
_FORM = re.compile(
    rf"(still_([{_ALPHABET}]{{{_ID}}})_[{_ALPHABET}]{{{_SECRET}}})([{_ALPHABET}]{{{_CHECK}}})"
)
_LEAST_SECRET_BYTES = 32
USED_EVERY = timedelta(minutes=1)
UNKNOWN = "no such key"


class Scope(StrEnum):
    """What a key may do; none includes another."""

    READ = "read"
    """Look at its own project."""
    SUBMIT = "submit"
    """Submit and steer jobs, send files."""
    ADMIN = "admin"
    """Projects, keys, the pool and the audit log."""


@dataclass(frozen=True)
class Principal:
    """Who asks, for which project, and what they may."""

    project_id: str
    scopes: frozenset[str]
    actor: str
    """The id of a key, ``operator`` or ``local``."""


def load_secret(given: SecretStr | None, *, folder: Path) -> bytes:
    """Return what keys are hashed under: the one given, else one made once in ``folder``.

    Raises:
        Conflict: the file does not hold a secret.
    """
    if given is not None:
        return given.get_secret_value().encode()
    path = folder / "key.secret"
    if not path.exists():
        _make_secret(path)
    found = path.read_bytes().strip()
    if len(found) < _LEAST_SECRET_BYTES:
        raise Conflict(f"{path} is damaged: put it back, or set STILL_KEY_SECRET")
    return found


def _make_secret(path: Path) -> None:
    """Write a secret whole or not at all; of several processes the first one's stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_hex(_LEAST_SECRET_BYTES).encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def create(
    session: Session,
    *,
    project: str,
    name: str,
    scopes: Collection[str],
    expires_at: datetime | None,
    now: datetime,
    secret: bytes,
) -> tuple[ApiKey, str]:
    """Make a key for a project; return its row and the key itself, which nobody sees again.

    Raises:
        SpecInvalid: there is no such project or scope, or the key would have ended already.
    """
    if session.get(Project, project) is None:
        raise SpecInvalid(f"no project {project}", pointer="/project")
    if not scopes or not set(scopes) <= set(Scope):
        told = f"scopes: {sorted(scopes)}; allowed: one or more of {', '.join(Scope)}"
        raise SpecInvalid(told, pointer="/scopes")
    if expires_at is not None and expires_at <= now:
        raise SpecInvalid(f"expires_at: {expires_at} is not in the future", pointer="/expires_at")
    text = make_text()
    row = ApiKey(
        id=parse(text),
        project_id=project,
        name=name,
        prefix=text.rpartition("_")[0],
        digest=digest(text, secret=secret),
        scopes=[scope for scope in Scope if scope in scopes],
        created_at=now,
        expires_at=expires_at,
    )
    session.add(row)
    session.flush()
    return row, text


def make_text() -> str:
    """Return a new key: ``still_<id part>_<secret><checksum>``."""
    head = f"still_{_random(_ID)}_{_random(_SECRET)}"
    return head + _checksum(head)


def _random(count: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(count))


def _checksum(head: str) -> str:
    """CRC-32 in base 32: finds every single wrong or swapped character."""
    left, digits = zlib.crc32(head.encode()), []
    for _ in range(_CHECK):
        left, digit = divmod(left, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def parse(text: str) -> str:
    """Return the id that a key carries; asks no database.

    Raises:
        Unauthorized: that is no key, or a character of it is wrong.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise Unauthorized(f"that is no key; keys look like still_{'x' * _ID}_...")
    if found[3] != _checksum(found[1]):
        raise Unauthorized("the key is mistyped: its last characters do not fit the others")
    return f"key_{found[2]}"


def digest(text: str, *, secret: bytes) -> str:
    """Return what is stored of a key."""
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def verify(session: Session, text: str, *, now: datetime, secret: bytes) -> Principal:
    """Return whom a key stands for.

    Raises:
        Unauthorized: it is no key, unknown, revoked or over.
    """
    row = session.get(ApiKey, parse(text))
    stored = row.digest if row is not None else ""
    if not hmac.compare_digest(stored, digest(text, secret=secret)) or row is None:
        raise Unauthorized(UNKNOWN)
    return _principal(row, now=now)


def principal_of(session: Session, key_id: str, *, now: datetime) -> Principal:
    """Return whom a key stands for that was proven before, as by a cookie.

    Raises:
        Unauthorized: it is unknown, revoked or over.
    """
    row = session.get(ApiKey, key_id)
    if row is None:
        raise Unauthorized(UNKNOWN)
    return _principal(row, now=now)


def _principal(row: ApiKey, *, now: datetime) -> Principal:
    if row.revoked_at is not None:
        raise Unauthorized(f"the key {row.prefix}_... was revoked")
    if row.expires_at is not None and row.expires_at <= now:
        raise Unauthorized(f"the key {row.prefix}_... ended at {row.expires_at.isoformat()}")
    return Principal(row.project_id, frozenset(row.scopes), row.id)


def used(session: Session, key_id: str, *, now: datetime) -> None:
    """Note that a key is in use, at most once a minute."""
    due = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at <= now - USED_EVERY)
    session.execute(update(ApiKey).where(ApiKey.id == key_id, due).values(last_used_at=now))


def get(session: Session, key_id: str) -> ApiKey:
    """Return a key's row or raise NotFound."""
    row = session.get(ApiKey, key_id)
    if row is None:
        raise NotFound(f"no key {key_id}")
    return row


def revoke(session: Session, key_id: str, *, now: datetime) -> ApiKey:
    """End a key for good; again changes nothing."""
    row = get(session, key_id)
    if row.revoked_at is None:
        row.revoked_at = now
    return row


def list_keys(session: Session, *, project: str | None = None) -> Sequence[ApiKey]:
    """Return keys, newest first: of one project, or all."""
    query = select(ApiKey).order_by(ApiKey.created_at.desc(), ApiKey.id)
    if project is not None:
        query = query.where(ApiKey.project_id == project)
    return session.scalars(query).all()
