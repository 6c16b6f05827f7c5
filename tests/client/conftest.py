from collections.abc import Iterator
from pathlib import Path

import pytest

from client import Retry, Stillroom
from tests.client.fake import World, serving

SOON = Retry(limit_s=1.0, contact_s=0.2, first_s=0.01, most_s=0.05)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    with serving(world):
        yield world


@pytest.fixture
def client(world: World, tmp_path: Path) -> Iterator[Stillroom]:
    with Stillroom(world.url, retry=SOON, cache_dir=tmp_path / "cache") as client:
        yield client
