"""A language model comes as a folder, whole and checked, and never where the server likes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from client import BadManifest, FileInTheWay, Stillroom
from client.folders import read_manifest
from tests.client.conftest import Run
from tests.client.fake import Fault, World
from tests.client.samples import JOB

FILES = {"config.json": b"{}", "model.safetensors": b"w" * 200_000, "tokenizer.json": b"[]"}


def manifest(files: dict[str, bytes], **more: Any) -> bytes:
    listed = [
        {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
        for name, data in files.items()
    ]
    return json.dumps({"format": "language_model", "files": listed, **more}).encode()


def offer(world: World, files: dict[str, bytes] = FILES, name: str = "model") -> str:
    for data in files.values():
        world.put(data)
    sha256 = world.offer(name, manifest(files), "model.json")
    world.outputs[-1]["format"] = "language_model"
    return sha256


def there(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_get_makes_the_folder(run: Run, world: World, tmp_path: Path) -> None:
    sha256 = offer(world)
    world.offer("report", b"{}", "report.json")

    told = run("get", JOB, "-o", "out")

    assert told.exit_code == 0, told.output
    assert there(tmp_path / "out" / "model") == FILES
    assert (tmp_path / "out" / "report.json").read_bytes() == b"{}"
    assert f"out/model\t195.3 KiB\t{sha256}" in told.stdout
    rows = json.loads(run("get", JOB, "model", "-o", "out", "--json").stdout)
    assert rows == [
        {
            "name": "model",
            "sha256": sha256,
            "path": "out/model",
            "size_bytes": 200_004,
            "files": sorted(FILES),
        }
    ]


def test_get_of_the_manifest_alone(run: Run, world: World, tmp_path: Path) -> None:
    offer(world)
    assert run("get", JOB, "--manifest", "-o", "out").exit_code == 0
    assert there(tmp_path / "out") == {"model.json": manifest(FILES)}


def test_a_broken_fetch_goes_on_where_it_stopped(run: Run, world: World, tmp_path: Path) -> None:
    offer(world)
    shard = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    world.faults += [Fault("GET", shard, "cut", at=50_000), Fault("GET", shard, "503", times=99)]

    assert run("get", JOB, "-o", "out").exit_code == 1
    assert there(tmp_path / "out" / "model").keys() >= {"config.json"}
    world.faults.clear()
    assert run("get", JOB, "-o", "out").exit_code == 0

    assert there(tmp_path / "out" / "model") == FILES
    assert world.requests("GET", shard)[-1]["range"] == "bytes=50000-"
    config = hashlib.sha256(FILES["config.json"]).hexdigest()
    assert len(world.requests("GET", config)) == 1, "what is there is not fetched again"


def test_a_file_of_the_users_is_not_overwritten_unasked(
    run: Run, world: World, tmp_path: Path
) -> None:
    offer(world)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"mine")
    (folder / "notes").write_bytes(b"mine too")

    told = run("get", JOB)
    assert told.exit_code == 1
    assert "config.json exists" in told.stderr
    assert run("get", JOB, "--force").exit_code == 0
    assert there(folder) == {**FILES, "notes": b"mine too"}


def test_a_file_in_place_of_the_folder_is_left_alone(
    client: Stillroom, world: World, tmp_path: Path
) -> None:
    sha256 = offer(world)
    (tmp_path / "m").write_bytes(b"mine")
    with pytest.raises(FileInTheWay, match="is a file"):
        client.download_folder(sha256, tmp_path / "m", overwrite=True)
    made = client.download_folder(f"{JOB}/model", tmp_path / "n")
    assert [path.name for path in made] == sorted(FILES)


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "a/b", "a\\b", "..", ".hidden", "", "a\x1b", "a:b", "a" * 201, "ä"],
)
def test_a_name_that_leads_elsewhere_is_refused(
    client: Stillroom, world: World, tmp_path: Path, name: str
) -> None:
    sha256 = offer(world, {"config.json": b"{}", name: b"evil"})
    with pytest.raises(BadManifest, match="file name"):
        client.download_folder(sha256, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "evil").exists()


SOUND: dict[str, Any] = {"name": "a", "sha256": "0" * 64, "size_bytes": 1}


@pytest.mark.parametrize(
    "told",
    [
        [],
        {"files": [SOUND]},
        {"format": "pairs", "files": [SOUND]},
        {"format": "language_model"},
        {"format": "language_model", "files": []},
        {"format": "language_model", "files": [SOUND, SOUND]},
        {"format": "language_model", "files": [SOUND, {**SOUND, "name": "A"}]},
        {"format": "language_model", "files": [{**SOUND, "sha256": "../" + "0" * 61}]},
        {"format": "language_model", "files": [{**SOUND, "sha256": 3}]},
        {"format": "language_model", "files": [{**SOUND, "size_bytes": -1}]},
        {"format": "language_model", "files": [{**SOUND, "name": 3}]},
        {"format": "language_model", "files": [SOUND] * 10_001},
        {"format": "language_model", "files": ["a"]},
    ],
)
def test_what_is_no_list_of_files_is_refused(told: Any) -> None:
    with pytest.raises(BadManifest):
        read_manifest(json.dumps(told).encode())


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b"{}"])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(BadManifest):
        read_manifest(data)
