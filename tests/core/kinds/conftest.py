"""Services without HTTP, on the database of the run and on their own, and models to take in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sqlalchemy import Engine

from bench._tiny_models import save_folder, tiny_model
from core.db.session import make_engine, upgrade
from tests.conftest import Clock
from tests.core.kinds.shelf import Shelf
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


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tiny_model("llama"), tmp_path_factory.mktemp("plain") / "m")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "m"
    return save_folder(tiny_model("llama"), folder, shard_bytes=30_000)


@pytest.fixture
def m(shelf: Shelf, plain: Path) -> Path:
    """A good folder, named m, to be spoilt."""
    return Path(shutil.copytree(plain, shelf.root / "m"))


@pytest.fixture
def shards(shelf: Shelf, sharded: Path) -> Path:
    return Path(shutil.copytree(sharded, shelf.root / "m"))
