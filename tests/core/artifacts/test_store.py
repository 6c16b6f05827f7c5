"""The local store: whole blobs or none, whatever happens."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from core.artifacts.store import Blob, LocalStore, Store
from core.errors import DataInvalid, NotFound

HOUR = timedelta(hours=1)
LATER = datetime(2100, 1, 1, tzinfo=UTC)
ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def write(folder: Path, data: bytes = b"hello", name: str = "source") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def files(store: LocalStore) -> list[Path]:
    return [path for path in store.root.rglob("*") if path.is_file() and path.name != "lock"]


def test_a_blob_is_stored_under_the_hash_of_its_bytes(store: LocalStore, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)

    blob = store.put(write(tmp_path, data))

    assert blob == Blob(hashlib.sha256(data).hexdigest(), len(data))
    place = store.path(blob.sha256)
    assert place == store.root / "blobs" / blob.sha256[:2] / blob.sha256[2:]
    assert place.read_bytes() == data
    assert place.stat().st_mode & 0o777 == 0o444
    with store.open(blob.sha256) as file:
        assert file.read() == data
    assert list((store.root / "tmp").iterdir()) == []


def test_putting_the_same_bytes_twice_keeps_one_file(store: LocalStore, tmp_path: Path) -> None:
    first = store.put(write(tmp_path))
    again = store.put(write(tmp_path, name="other"))

    assert first == again
    assert len(files(store)) == 1


def test_the_local_store_is_a_store(store: LocalStore) -> None:
    typed: Store = store
    assert not typed.has("0" * 64)


@pytest.mark.parametrize(
    "name", ["", "../etc/passwd", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "/" * 64, "0" * 64 + "\n"]
)
def test_anything_but_a_hash_is_not_found(store: LocalStore, name: str) -> None:
    for ask in (store.path, store.open, store.has, store.delete):
        with pytest.raises(NotFound):
            ask(name)


def test_an_absent_blob_is_not_found(store: LocalStore) -> None:
    for ask in (store.path, store.open):
        with pytest.raises(NotFound, match="0000"):
            ask("0" * 64)
    assert not store.has("0" * 64)


def test_delete_is_final_and_may_be_repeated(store: LocalStore, tmp_path: Path) -> None:
    blob = store.put(write(tmp_path))

    store.delete(blob.sha256)
    store.delete(blob.sha256)

    assert not store.has(blob.sha256)


def test_links_pipes_and_folders_are_not_stored(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()

    for name in ("link", "pipe", "folder"):
        with pytest.raises(DataInvalid):
            store.put(tmp_path / name)
    assert files(store) == []


def test_a_full_disk_leaves_nothing(store: LocalStore, tmp_path: Path) -> None:
    source = write(tmp_path, bytes(2_000_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            store.put(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert files(store) == []


def test_sweep_takes_old_orphans_and_stale_temps_only(store: LocalStore, tmp_path: Path) -> None:
    kept, orphan, young = (store.put(write(tmp_path, data)) for data in (b"1", b"2", b"3"))
    stale = store.root / "tmp" / "put-dead"
    stale.write_bytes(b"half")
    for path in (store.path(kept.sha256), store.path(orphan.sha256), stale):
        os.utime(path, (0, 0))
    now = datetime.fromtimestamp(time.time(), UTC)

    told = store.sweep({kept.sha256}, older_than=HOUR, now=now, dry_run=True)
    assert told == [orphan.sha256, "tmp/put-dead"]
    assert len(files(store)) == 4

    assert store.sweep({kept.sha256}, older_than=HOUR, now=now) == told
    assert store.has(kept.sha256)
    assert store.has(young.sha256)
    assert not store.has(orphan.sha256)
    assert not stale.exists()


def test_sweep_asks_again_before_it_takes(store: LocalStore, tmp_path: Path) -> None:
    blob = store.put(write(tmp_path))
    answers = iter([False, True])

    assert store.sweep(lambda _: next(answers), older_than=HOUR, now=LATER) == []
    assert store.has(blob.sha256)


def test_putting_again_protects_an_old_blob_from_the_sweep(
    store: LocalStore, tmp_path: Path
) -> None:
    blob = store.put(write(tmp_path))
    os.utime(store.path(blob.sha256), (0, 0))

    store.put(write(tmp_path))

    now = datetime.fromtimestamp(time.time(), UTC)
    assert store.sweep(set(), older_than=HOUR, now=now) == []


def test_sweep_leaves_foreign_files_alone(store: LocalStore) -> None:
    note = store.root / "blobs" / "README"
    note.write_text("mine")

    assert store.sweep(set(), older_than=HOUR, now=LATER) == []
    assert note.exists()


_KILLED = """
import os, signal, sys
from pathlib import Path
from core.artifacts import store as module
step, root, source = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
store = module.LocalStore(root)
seen = 0
def watch(event, args):
    global seen
    touched = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod")
    if touched and any(str(root) in str(arg) for arg in args) or event == "os.chmod":
        seen += 1
        if seen == step:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
store.put(source)
sys.exit(7)
"""


def test_a_kill_between_any_two_steps_leaves_no_half_blob(
    store: LocalStore, tmp_path: Path
) -> None:
    data = os.urandom(100_000)
    source = write(tmp_path, data)
    sha256 = hashlib.sha256(data).hexdigest()
    codes = []
    for step in range(1, 30):
        command = [sys.executable, "-c", _KILLED, str(step), str(store.root), str(source)]
        codes.append(subprocess.run(command, cwd=ROOT, check=False).returncode)
        for path in (store.root / "blobs").rglob("*"):
            assert path.is_dir() or path.read_bytes() == data
        if codes[-1] == 7:
            break
        store.delete(sha256)

    assert codes[-1] == 7
    assert codes.count(-signal.SIGKILL) == len(codes) - 1 >= 4
    assert store.has(sha256)
    store.sweep({sha256}, older_than=HOUR, now=LATER)
    assert files(store) == [store.path(sha256)]


def test_a_kill_while_copying_leaves_no_half_blob(store: LocalStore, tmp_path: Path) -> None:
    source = tmp_path / "big"
    with source.open("wb") as file:
        file.truncate(2_000_000_000)
    code = (
        "import sys; from pathlib import Path; from core.artifacts.store import LocalStore; "
        "LocalStore(Path(sys.argv[1])).put(Path(sys.argv[2]))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(store.root), str(source)], cwd=ROOT)
    while not list((store.root / "tmp").iterdir()):
        time.sleep(0.01)
    child.kill()
    child.wait()

    assert [path for path in (store.root / "blobs").rglob("*") if path.is_file()] == []
    assert len(store.sweep(set(), older_than=HOUR, now=LATER)) == 1
