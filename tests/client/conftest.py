from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from client import Retry, Stillroom
from client.cli import still
from tests.client.fake import World, serving

Run = Callable[..., Result]
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


@pytest.fixture
def run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        env = {"STILL_URL": world.url, "STILL_CACHE_DIR": str(tmp_path / "cache")}
        env |= {"STILL_PATIENCE": "0.5", "STILL_API_KEY": world.api_key}
        result = CliRunner().invoke(still, arguments, env=env, input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        assert "Traceback" not in result.output
        return result

    return invoke
