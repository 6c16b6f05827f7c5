"""Targets in a file: used where they are of this teacher and these queries, computed where not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.distill.target_cache import cached_targets
from core.errors import Conflict, DataInvalid
from tests.core.artifacts.federated_files import npz
from tests.core.distill._make import answers, make_model, make_teacher, some_queries

INTERVAL = 30
CHILD = """
import os, signal, sys
from pathlib import Path
from core.distill.target_cache import cached_targets
from tests.core.distill._make import make_model, make_teacher
left = int(sys.argv[2])
def report(done, total):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
asked, path = make_model().queries, Path(sys.argv[1])
cached_targets(make_teacher(), asked, path=path, checkpoint_interval=30, report=report)
"""


def queries() -> Any:
    return make_model().queries


def fill(path: Path, asked: Any = None, **options: Any) -> Any:
    asked = queries() if asked is None else asked
    return cached_targets(make_teacher(), asked, path=path, checkpoint_interval=INTERVAL, **options)


def counted(path: Path, asked: Any) -> tuple[Any, int]:
    """The targets, and how many of them were there when the call began to compute."""
    seen: list[int] = []
    found = fill(path, asked, report=lambda done, total: seen.append(done))
    return found, seen[0]


def test_the_targets_are_the_teachers(tmp_path: Path) -> None:
    found = fill(tmp_path / "t.npz")

    np.testing.assert_allclose(found, answers(make_teacher()).numpy(), atol=1e-6)
    with np.load(tmp_path / "t.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["targets"], found)
        assert str(file["fingerprint"]) == make_teacher().fingerprint()
        assert file["query_digests"].shape == (len(queries()), 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".t.npz.lock", "t.npz"]


def test_a_full_file_is_read_in_any_order_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    first = fill(path)
    before = path.stat().st_mtime_ns

    again, there = counted(path, queries()[::-1])

    np.testing.assert_array_equal(again, first[::-1])
    assert there == len(queries())
    assert path.stat().st_mtime_ns == before


def test_only_missing_rows_are_computed_and_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    some = fill(path, queries()[:70])
    fresh = some_queries(20).numpy()

    found, there = counted(path, np.concatenate([fresh, queries()[50:70]]))

    assert there == 20
    np.testing.assert_array_equal(found[20:], some[50:])
    _, there = counted(path, np.concatenate([queries()[:70], fresh]))
    assert there == 90, "those asked for earlier are in the file still"


@pytest.mark.parametrize("reports", [1, 2, 4])
def test_killed_at_any_point_it_goes_on_to_the_same_bytes(tmp_path: Path, reports: int) -> None:
    path = tmp_path / "t.npz"
    fill(tmp_path / "whole.npz")

    ended = subprocess.run([sys.executable, "-c", CHILD, str(path), str(reports)], check=False)

    assert ended.returncode == -signal.SIGKILL
    assert not path.exists()
    _, there = counted(path, queries())
    # The first report says what is there; the n-th comes before the (n - 1)-th block is saved.
    assert there == INTERVAL * max(0, reports - 2)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_checkpoint_left_by_a_kill_after_the_file_was_written_goes(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    subprocess.run([sys.executable, "-c", CHILD, str(path), "4"], check=False)
    left = {part: part.read_bytes() for part in tmp_path.glob("*checkpoint*")}
    assert len(left) == 2
    fill(path)
    for part, data in left.items():
        part.write_bytes(data)

    fill(path)

    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_half_written_file_is_never_taken(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    path.with_name(".t.npz.part").write_bytes(b"half")
    path.with_name(".t_checkpoint-000000000.npz.part").write_bytes(b"half")

    _, there = counted(path, queries())

    assert there == 0
    assert not list(tmp_path.glob(".*part"))


def test_another_teachers_file_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "t.npz")
    other = make_teacher("legacy")

    with pytest.raises(DataInvalid, match=r"t\.npz: targets of teacher .* model or settings"):
        cached_targets(other, queries(), path=tmp_path / "t.npz")


def test_a_file_of_other_queries_alone_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "t.npz")

    with pytest.raises(DataInvalid, match="128 other queries and of none of these 50"):
        fill(tmp_path / "t.npz", some_queries().numpy())


def test_a_file_that_says_nothing_of_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(npz({"targets": answers(make_teacher()).numpy()}))

    with pytest.raises(DataInvalid, match="has no fingerprint, so nothing tells"):
        fill(tmp_path / "t.npz")


def test_a_checkpoint_of_other_queries_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    subprocess.run([sys.executable, "-c", CHILD, str(path), "3"], check=False)

    with pytest.raises(DataInvalid, match=r"t_checkpoint-000000000\.npz: a checkpoint of other"):
        fill(path, some_queries().numpy())


@pytest.mark.parametrize("cut", [10, 200, -40])
def test_a_damaged_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "t.npz"
    fill(path)
    path.write_bytes(path.read_bytes()[:cut])

    with pytest.raises(DataInvalid, match=r"t\.npz: truncated or damaged"):
        fill(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    fill(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(DataInvalid, match="truncated or damaged"):
        fill(path)


def test_two_processes_do_not_fill_one_file(tmp_path: Path) -> None:
    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(Conflict, match="another process"):
            fill(tmp_path / "t.npz")

    fill(tmp_path / "t.npz", report=meanwhile)


def test_an_interval_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_interval 0"):
        cached_targets(make_teacher(), queries(), path=tmp_path / "t.npz", checkpoint_interval=0)
