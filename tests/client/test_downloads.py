import random
from pathlib import Path

import pytest

from client import ApiError, BadReference, FileInTheWay, HashMismatch, Stillroom
from client.errors import NoSuchArtifact
from tests.client.fake import Fault, World
from tests.client.samples import JOB, UNKNOWN

CONTENT = random.Random(0).randbytes(300_000)


def parts(folder: Path) -> list[Path]:
    return list(folder.glob(".*.part"))


def test_a_dropped_download_goes_on_from_its_part(
    client: Stillroom, world: World, tmp_path: Path
) -> None:
    sha256 = world.put(CONTENT)
    world.faults += [Fault("GET", "content", "cut", at=100_000), Fault("GET", "content", "503")]
    world.faults += [Fault("GET", "content", "cut", at=50_000), Fault("GET", "content", "drop")]
    seen: list[tuple[int, int | None]] = []

    path = client.download(
        sha256, tmp_path / "model.pt", on_progress=lambda done, total: seen.append((done, total))
    )

    assert path.read_bytes() == CONTENT
    ranges = [headers.get("range") for headers in world.requests("GET", "content")]
    assert ranges[0] is None
    assert ranges[-1] == "bytes=150000-"
    assert seen[-1] == (300_000, 300_000)
    assert seen == sorted(seen)
    assert parts(tmp_path) == []


def test_a_new_process_goes_on_from_the_part_of_the_old(
    client: Stillroom, world: World, tmp_path: Path
) -> None:
    sha256 = world.put(CONTENT)
    (tmp_path / f".model.pt.{sha256[:16]}.part").write_bytes(CONTENT[:200_000])

    client.download(sha256, tmp_path / "model.pt")

    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert world.requests("GET", "content")[0]["range"] == "bytes=200000-"


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"more", b"x" * 1000, b"x" * 400_000])
def test_whatever_the_part_holds_the_file_is_right(
    client: Stillroom, world: World, tmp_path: Path, left: bytes
) -> None:
    sha256 = world.put(CONTENT)
    (tmp_path / f".model.pt.{sha256[:16]}.part").write_bytes(left)

    client.download(sha256, tmp_path / "model.pt")

    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert parts(tmp_path) == []


def test_wrong_bytes_are_fetched_once_more_from_the_start(
    client: Stillroom, world: World, tmp_path: Path
) -> None:
    sha256 = world.put(CONTENT)
    world.faults.append(Fault("GET", "content", "wrong"))

    assert client.download(sha256, tmp_path / "m").read_bytes() == CONTENT
    assert len(world.requests("GET", "content")) == 2


def test_wrong_bytes_never_become_the_file(client: Stillroom, world: World, tmp_path: Path) -> None:
    sha256 = world.put(CONTENT)
    world.faults.append(Fault("GET", "content", "wrong", times=9))
    (tmp_path / "m").write_bytes(b"old")

    with pytest.raises(HashMismatch):
        client.download(sha256, tmp_path / "m", overwrite=True)

    assert (tmp_path / "m").read_bytes() == b"old"
    assert parts(tmp_path) == []


def test_another_file_is_not_overwritten_unasked(
    client: Stillroom, world: World, tmp_path: Path
) -> None:
    sha256 = world.put(CONTENT)
    (tmp_path / "m").write_bytes(b"mine")

    with pytest.raises(FileInTheWay):
        client.download(sha256, tmp_path / "m")
    assert world.seen == []
    with pytest.raises(FileInTheWay, match="folder"):
        client.download(sha256, tmp_path, overwrite=True)
    client.download(sha256, tmp_path / "m", overwrite=True)
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_a_file_that_is_there_is_not_fetched_again(
    client: Stillroom, world: World, tmp_path: Path
) -> None:
    sha256 = world.put(CONTENT)
    client.download(sha256, tmp_path / "m")
    client.download(sha256, tmp_path / "m")
    assert len(world.requests("GET", "content")) == 1


def test_an_artifact_is_found_by_job_and_name(
    client: Stillroom, world: World, tmp_path: Path
) -> None:
    world.offer("text", b"hello\n")

    assert client.download(f"{JOB}/text", tmp_path / "t").read_bytes() == b"hello\n"
    with pytest.raises(NoSuchArtifact, match="it has: text"):
        client.download(f"{JOB}/other", tmp_path / "o")
    with pytest.raises(ApiError, match="no job"):
        client.download(f"{UNKNOWN}/text", tmp_path / "o")


@pytest.mark.parametrize("source", ["", "..", "A" * 64, "a" * 63, "../text", "/text", JOB])
def test_what_is_no_sha256_is_never_asked_for(
    client: Stillroom, world: World, tmp_path: Path, source: str
) -> None:
    with pytest.raises(BadReference):
        client.download(source, tmp_path / "o")
    assert world.seen == []


def test_an_empty_artifact_is_an_empty_file(
    client: Stillroom, world: World, tmp_path: Path
) -> None:
    assert client.download(world.put(b""), tmp_path / "e").read_bytes() == b""
