import os
import re
import stat
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from core.db.models import ApiKey
from core.db.session import reading, transaction
from core.errors import Conflict, NotFound, SpecInvalid, Unauthorized
from core.jobs import keys
from core.jobs.keys import Principal, Scope
from core.jobs.projects import FIRST_PROJECT
from tests.conftest import Clock

SECRET = b"s" * 32
ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
SCANNED = re.compile(r"still_[0-9a-hjkmnp-tv-z]{12}_[0-9a-hjkmnp-tv-z]{40}")
"""What a secret scanner looks for."""


def make(session: Session, clock: Clock, **more: object) -> tuple[ApiKey, str]:
    asked = {"project": FIRST_PROJECT, "name": "k", "scopes": ["read"], "expires_at": None}
    return keys.create(session, **{**asked, **more}, now=clock(), secret=SECRET)  # type: ignore[arg-type]


def test_keys_have_one_form_and_carry_their_id() -> None:
    made = {keys.make_text() for _ in range(200)}

    assert len(made) == 200
    assert all(SCANNED.fullmatch(one) for one in made)
    assert {keys.parse(one) for one in made} == {f"key_{one[6:18]}" for one in made}


@given(at=st.integers(0, 58), to=st.sampled_from(ALPHABET + "_-O "))
def test_every_wrong_character_is_told_without_the_database(at: int, to: str) -> None:
    right = keys.make_text()
    wrong = right[:at] + to + right[at + 1 :]

    if wrong == right:
        return
    with pytest.raises(Unauthorized):
        keys.parse(wrong)


@given(at=st.integers(19, 57))
def test_two_swapped_characters_are_told(at: int) -> None:
    right = keys.make_text()
    wrong = right[:at] + right[at + 1] + right[at] + right[at + 2 :]

    if wrong != right:
        with pytest.raises(Unauthorized, match="mistyped"):
            keys.parse(wrong)


@given(given_text=st.text(max_size=80))
def test_strange_texts_are_no_keys(given_text: str) -> None:
    with pytest.raises(Unauthorized, match="no key"):
        keys.parse(given_text)


def test_key_opens_its_project_with_its_scopes(engine: Engine, clock: Clock) -> None:
    with transaction(engine) as session:
        row, key = make(session, clock, scopes=["submit", "read"])
    with reading(engine) as session:
        found = keys.verify(session, key, now=clock(), secret=SECRET)

    assert found == Principal(FIRST_PROJECT, frozenset({Scope.READ, Scope.SUBMIT}), row.id)


def test_what_is_stored_is_not_the_key(engine: Engine, clock: Clock) -> None:
    with transaction(engine) as session:
        row, key = make(session, clock)
        session.flush()
        stored = str(session.execute(text("SELECT * FROM api_keys")).mappings().all())

    secret_part = key.rpartition("_")[2]
    assert row.digest == keys.digest(key, secret=SECRET)
    assert key not in stored
    assert secret_part not in stored
    assert secret_part[:33] not in stored
    assert key.startswith(f"{row.prefix}_")


def test_key_of_another_secret_or_with_another_secret_part_is_nobodys(
    engine: Engine, clock: Clock
) -> None:
    with transaction(engine) as session:
        _, key = make(session, clock)
        head = key[:19] + key[19:52][::-1]
        guessed = head + keys._checksum(head)
        for tried, secret in ((key, b"t" * 32), (guessed, SECRET), (keys.make_text(), SECRET)):
            with pytest.raises(Unauthorized, match="no such key"):
                keys.verify(session, tried, now=clock(), secret=secret)


def test_expired_and_revoked_keys_open_nothing(engine: Engine, clock: Clock) -> None:
    with transaction(engine) as session:
        short, ending = make(session, clock, expires_at=clock() + timedelta(minutes=5))
        lasting, revoked = make(session, clock)
    clock.tick(minutes=5, microseconds=-1)
    with transaction(engine) as session:
        assert keys.verify(session, ending, now=clock(), secret=SECRET).actor == short.id
        keys.revoke(session, lasting.id, now=clock())
    clock.tick(microseconds=1)

    with transaction(engine) as session:
        with pytest.raises(Unauthorized, match="ended at"):
            keys.verify(session, ending, now=clock(), secret=SECRET)
        with pytest.raises(Unauthorized, match="revoked"):
            keys.verify(session, revoked, now=clock(), secret=SECRET)
        with pytest.raises(Unauthorized, match="revoked"):
            keys.principal_of(session, lasting.id, now=clock())
        before = keys.get(session, lasting.id).revoked_at
        clock.tick(hours=1)
        assert keys.revoke(session, lasting.id, now=clock()).revoked_at == before
        with pytest.raises(NotFound):
            keys.revoke(session, "key_000000000000", now=clock())


def test_use_is_noted_once_a_minute(engine: Engine, clock: Clock) -> None:
    with transaction(engine) as session:
        row, _ = make(session, clock)
    seen = []
    for _ in range(5):
        with transaction(engine) as session:
            keys.used(session, row.id, now=clock())
        with reading(engine) as session:
            seen.append(keys.get(session, row.id).last_used_at)
        clock.tick(seconds=30)

    assert len(set(seen)) == 3
    assert None not in seen


@pytest.mark.parametrize(
    ("wrong", "pointer"),
    [
        ({"project": "prj_none"}, "/project"),
        ({"scopes": []}, "/scopes"),
        ({"scopes": ["read", "write"]}, "/scopes"),
        ({"expires_at": Clock().now}, "/expires_at"),
    ],
)
def test_impossible_keys_are_refused(
    engine: Engine, clock: Clock, wrong: dict[str, object], pointer: str
) -> None:
    with transaction(engine) as session, pytest.raises(SpecInvalid) as told:
        make(session, clock, **wrong)

    assert told.value.pointer == pointer


def test_secret_is_made_once_however_many_start_at_once(tmp_path: Path) -> None:
    found: list[bytes] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        found.append(keys.load_secret(None, folder=tmp_path / "data"))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (path,) = (tmp_path / "data").iterdir()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(found[0]) >= 32
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_secret_given_wins_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    assert keys.load_secret(SecretStr("x" * 32), folder=tmp_path) == b"x" * 32
    assert not list(tmp_path.iterdir())
    (tmp_path / "key.secret").write_text("short")

    with pytest.raises(Conflict, match="STILL_KEY_SECRET"):
        keys.load_secret(None, folder=tmp_path)
