"""Services without HTTP: one on the database of the run, others with one of their own."""

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
    return _on_sqlite(tmp_path / "other")


@pytest.fixture
def third_world(tmp_path: Path) -> World:
    return _on_sqlite(tmp_path / "third")


def _on_sqlite(folder: Path) -> World:
    folder.mkdir()
    engine = make_engine(f"sqlite:///{folder / 'other.db'}")
    upgrade(engine)
    return World(engine, folder, Clock())
