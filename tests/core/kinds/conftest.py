"""Services without HTTP: one on the database of the run, one of its own beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine

from core.db.session import make_engine, upgrade
from tests.conftest import Clock
from tests.core.kinds.world import World


@pytest.fixture
def world(engine: Engine, tmp_path: Path, clock: Clock) -> World:
    return World(engine, tmp_path, clock)


@pytest.fixture
def other_world(tmp_path: Path) -> World:
    folder = tmp_path / "other"
    folder.mkdir()
    engine = make_engine(f"sqlite:///{folder / 'other.db'}")
    upgrade(engine)
    return World(engine, folder, Clock())
