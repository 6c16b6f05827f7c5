"""Over 180 hostile files: none is executed, each is refused, nothing is left behind."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.artifacts.importers import restricted_pickle
from core.artifacts.limits import MIB, Limits
from core.errors import DataInvalid, TooLarge
from tests.core.artifacts import hostile_files, hostile_pickles
from tests.core.artifacts.conftest import read_sandboxed
from tests.core.artifacts.federated_files import model, zipped

LOAD_ALL = """
import pickle, sys, time
from pathlib import Path
for path in sorted(Path(sys.argv[1]).glob("*.pkl")):
    with path.open("rb") as file:
        try:
            while True:
                pickle.load(file)
        except BaseException:
            pass
time.sleep(0.5)
"""
LIMITS = Limits(
    memory_bytes=1024 * MIB,
    cpu_seconds=20,
    wall_seconds=60,
    pickle_opcodes=500_000,
    ratio_floor_bytes=4 * MIB,
)


def packed(evil: bytes) -> bytes:
    """Return a sound model's archive whose .pkl is ``evil``."""
    return zipped({**model().files(), "toy.pkl": evil})


def corpus(marker: str) -> dict[str, bytes]:
    pickles = {**hostile_pickles.armed(marker), **hostile_pickles.quiet(marker)}
    return {
        **{f"pickle, {name}": packed(evil) for name, evil in pickles.items()},
        **hostile_files.arrays(marker),
        **hostile_files.caches(marker),
        **hostile_files.zips(marker),
        **hostile_files.tars(marker),
        **hostile_files.tensors(marker),
        **hostile_files.texts(marker),
        **hostile_files.others(marker),
    }


def complaint(data: bytes, folder: Path) -> str | None:
    """Return what is wrong with how ``data`` was refused, or nothing."""
    folder.mkdir()
    try:
        read_sandboxed(data, folder, limits=LIMITS)
    except (DataInvalid, TooLarge) as error:
        # Refused for what it is, not because reading it fell over.
        if "the file is damaged (" in error.message or "stopped by" in error.message:
            return f"refused by accident: {error.message}"
    else:
        return "accepted"
    left = sorted(path.name for path in folder.rglob("*"))
    return None if left == ["upload", "work"] else f"left behind: {left}"


def test_hostile_files_are_refused_unexecuted_and_leave_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    files = corpus(str(marker))
    assert len(files) >= 180

    # Most of an import is waiting for its process.
    with ThreadPoolExecutor(4) as pool:
        folders = [tmp_path / f"{number}" for number in range(len(files))]
        found = dict(zip(files, pool.map(complaint, files.values(), folders), strict=True))

    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    assert not marker.exists()


def test_the_armed_pickles_would_have_run(tmp_path: Path) -> None:
    names = sorted(hostile_pickles.armed("x"))
    for number, name in enumerate(names):
        evil = hostile_pickles.armed(str(tmp_path / f"executed-{number}"))[name]
        (tmp_path / f"{number}.pkl").write_bytes(evil)

    subprocess.run(
        [sys.executable, "-c", LOAD_ALL, str(tmp_path)], check=False, capture_output=True
    )

    ran = {name for number, name in enumerate(names) if (tmp_path / f"executed-{number}").exists()}
    assert ran == set(names)


@pytest.mark.parametrize("name", sorted(hostile_pickles.armed("x")))
def test_the_reader_alone_refuses_the_armed_pickles(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "executed"

    with pytest.raises(DataInvalid):
        restricted_pickle.loads(hostile_pickles.armed(str(marker))[name], limits=LIMITS)
    assert not marker.exists()


def test_a_forbidden_global_is_named() -> None:
    with pytest.raises(DataInvalid, match=r"asks for 'posix\.system', which is forbidden; allowed"):
        restricted_pickle.loads(hostile_pickles.armed("x")["posix.system"], limits=LIMITS)
