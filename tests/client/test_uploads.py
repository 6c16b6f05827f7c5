import hashlib
import os
import random
import tarfile
from pathlib import Path

import pytest

from client import ApiError, Stillroom, StillroomError
from client.errors import NotUploadable
from client.packing import packed
from tests.client.conftest import SOON
from tests.client.fake import Fault, World, serving

CONTENT = random.Random(1).randbytes(4_500)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.npz"
    path.write_bytes(CONTENT)
    return path


def offsets(world: World) -> list[int]:
    return [int(headers["upload-offset"]) for headers in world.requests("PATCH", "uploads")]


def test_a_file_is_sent_in_parts(client: Stillroom, world: World, file: Path) -> None:
    seen: list[tuple[int, int | None]] = []

    artifact = client.upload(file, on_progress=lambda done, total: seen.append((done, total)))

    assert bytes(world.bytes_of["up_0"]) == CONTENT
    assert world.uploads["up_0"]["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert artifact["sha256"] == hashlib.sha256(b"canonical " + CONTENT).hexdigest()
    assert offsets(world) == [0, 1000, 2000, 3000, 4000]
    assert seen[0] == (0, 4500)
    assert seen[-1] == (4500, 4500)


@pytest.mark.parametrize("kept", [0, 1, 999])
def test_a_broken_part_goes_on_where_the_server_stands(
    client: Stillroom, world: World, file: Path, kept: int
) -> None:
    world.faults += [Fault("PATCH", "up_0", "cut", times=3, at=kept)]
    world.faults += [Fault("PATCH", "up_0", "503"), Fault("GET", "up_0", "drop", times=2)]

    client.upload(file)

    assert bytes(world.bytes_of["up_0"]) == CONTENT
    assert 3 * kept in offsets(world)


def test_an_answer_lost_is_no_part_sent_twice(client: Stillroom, world: World, file: Path) -> None:
    world.faults.append(Fault("PATCH", "up_0", "cut", at=1000))
    client.upload(file)
    assert bytes(world.bytes_of["up_0"]) == CONTENT


def test_a_new_process_goes_on_with_the_old_ones_upload(
    world: World, file: Path, tmp_path: Path
) -> None:
    world.faults.append(Fault("PATCH", "up_0", "cut", at=500, times=1))
    world.faults.append(Fault("GET", "up_0", "drop", times=10_000))
    with (
        Stillroom(world.url, retry=SOON, cache_dir=tmp_path / "c") as first,
        pytest.raises(StillroomError),
    ):
        first.upload(file)
    world.faults.clear()

    with Stillroom(world.url, retry=SOON, cache_dir=tmp_path / "c") as second:
        second.upload(file)

    assert list(world.uploads) == ["up_0"]
    assert offsets(world)[:2] == [0, 500]


def test_bytes_the_server_has_are_not_sent_again(
    client: Stillroom, world: World, file: Path
) -> None:
    first = client.upload(file)
    sent = len(offsets(world))

    assert client.upload(file)["sha256"] == first["sha256"]
    assert len(offsets(world)) == sent
    assert list(world.uploads) == ["up_0"]


def test_an_upload_the_server_forgot_begins_anew(
    client: Stillroom, world: World, file: Path
) -> None:
    client.upload(file)
    del world.uploads["up_0"]
    world.uploads["other"] = {}
    world.bytes_of["other"] = bytearray()

    client.upload(file)

    assert bytes(world.bytes_of["up_1" if "up_1" in world.bytes_of else "up_2"]) == CONTENT


def test_another_server_gets_its_own_upload(world: World, file: Path, tmp_path: Path) -> None:
    other = World()
    with serving(other):
        for url in (world.url, other.url):
            with Stillroom(url, retry=SOON, cache_dir=tmp_path / "c") as client:
                client.upload(file)
    assert bytes(other.bytes_of["up_0"]) == CONTENT


def test_an_answer_of_complete_that_was_lost_is_asked_for_again(
    client: Stillroom, world: World, file: Path
) -> None:
    world.faults.append(Fault("POST", "complete", "cut"))
    assert client.upload(file)["format"] == "pairs"


@pytest.mark.parametrize("lost", [False, True])
def test_refused_content_says_why_and_is_forgotten(
    client: Stillroom, world: World, file: Path, *, lost: bool
) -> None:
    world.refuse = "row 3 holds NaN"
    if lost:
        world.faults.append(Fault("POST", "complete", "cut"))

    with pytest.raises(ApiError, match="row 3 holds NaN"):
        client.upload(file)
    world.refuse = None
    client.upload(file)

    assert [upload["state"] for upload in world.uploads.values()] == ["failed", "complete"]


def test_a_cache_that_cannot_be_written_is_no_error(
    world: World, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "c").write_text("a file where the folder should be")
    with Stillroom(world.url, retry=SOON, cache_dir=tmp_path / "c") as client:
        assert client.upload(file)["format"] == "pairs"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.pkl").write_bytes(b"pickle")
    (tmp_path / "model" / "clusters").mkdir(parents=True)
    for name in ("b.npz", "a.npz"):
        (tmp_path / "model" / "clusters" / name).write_bytes(name.encode())
    return tmp_path / "model.pkl"


def test_a_pickle_goes_with_its_folder(client: Stillroom, world: World, model: Path) -> None:
    client.upload(model)
    client.upload(model.with_suffix(""))

    assert list(world.uploads) == ["up_0"], "the .tar is the same from either end"
    assert world.uploads["up_0"]["file_name"] == "model.tar"


def test_a_tar_depends_on_names_and_bytes_alone(model: Path) -> None:
    with packed(model) as tar:
        first = tar.read_bytes()
        with tarfile.open(tar) as archive:
            names = archive.getnames()
    os.utime(model, (1, 1))
    model.chmod(0o600)
    with packed(model.with_suffix("")) as tar:
        assert tar.read_bytes() == first
    assert names == ["model.pkl", "model/clusters/a.npz", "model/clusters/b.npz"]
    assert not tar.exists()


def test_a_pickle_alone_goes_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "m.pkl").write_bytes(b"x")
    with packed(tmp_path / "m.pkl") as file:
        assert file == tmp_path / "m.pkl"


def test_a_folder_without_its_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(NotUploadable, match=r"m\.pkl"), packed(tmp_path / "m"):
        pass
