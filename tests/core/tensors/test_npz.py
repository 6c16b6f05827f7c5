"""An .npz is written as a stream with the same bytes every time, and read in blocks."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from core.errors import DataInvalid
from core.tensors import npz, shards
from core.tensors.npz import NpzWriter, open_npz

ROWS = np.arange(35, dtype=np.float32).reshape(7, 5)


def write(path: Path, **arrays: Any) -> Path:
    with path.open("wb") as file, NpzWriter(file) as writer:
        for name, array in arrays.items():
            writer.add(name, np.asarray(array))
    return path


@given(
    array=hnp.arrays(
        st.sampled_from(["<f4", "<f8", "<f2", "|u1", "<i8", "<U7"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    )
)
def test_numpy_reads_what_is_written(tmp_path_factory: Any, array: Any) -> None:
    path = write(tmp_path_factory.mktemp("npz") / "a.npz", a=array)

    with np.load(path, allow_pickle=False) as found:
        np.testing.assert_array_equal(found["a"], array)
        assert found["a"].dtype == array.dtype


def test_blocks_write_the_bytes_of_the_whole(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.npz", targets=ROWS)
    with (tmp_path / "blocks.npz").open("wb") as file, NpzWriter(file) as writer:
        writer.add_blocks("targets", ROWS.dtype, ROWS.shape, (ROWS[i : i + 3] for i in (0, 3, 6)))

    assert (tmp_path / "blocks.npz").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("blocks", [[ROWS[:3]], [ROWS, ROWS[:1]], [ROWS.astype("f8")]])
def test_blocks_that_do_not_make_the_array_are_refused(tmp_path: Path, blocks: Any) -> None:
    with (
        (tmp_path / "a.npz").open("wb") as file,
        NpzWriter(file) as writer,
        pytest.raises(ValueError, match=r"^targets: "),
    ):
        writer.add_blocks("targets", ROWS.dtype, ROWS.shape, blocks)


def test_a_large_array_makes_the_file_zip64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write(tmp_path / "plain.npz", a=ROWS, after=ROWS)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # 2 GiB, for an array that a test can hold
    large = write(tmp_path / "large.npz", a=ROWS, after=ROWS)

    assert large.stat().st_size > plain.stat().st_size
    with open_npz(large) as found:
        np.testing.assert_array_equal(found.rows("after", 2, 4), ROWS[2:4])
        np.testing.assert_array_equal(found.array("a", most_bytes=1000), ROWS)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_numpy_writes_is_read_in_blocks(tmp_path: Path, save: Any, order: Any) -> None:
    save(tmp_path / "a.npz", a=np.asarray(ROWS.astype(">f8"), order=order))

    with open_npz(tmp_path / "a.npz") as found:
        blocks = list(found.blocks("a", block_bytes=2 * 40))
        assert found.array("a", most_bytes=1000).shape == (7, 5)
    assert [len(block) for block in blocks] == ([2, 2, 2, 1] if order == "C" else [7])
    np.testing.assert_array_equal(np.concatenate(blocks), ROWS)
    assert blocks[0].dtype == np.dtype("=f8")


@given(start=st.integers(0, 6), count=st.integers(1, 7))
def test_some_rows_are_read_alone(tmp_path_factory: Any, start: int, count: int) -> None:
    path = write(tmp_path_factory.mktemp("npz") / "a.npz", first=np.zeros(3), a=ROWS)

    with open_npz(path) as found:
        if start + count <= 7:
            np.testing.assert_array_equal(
                found.rows("a", start, start + count), ROWS[start : start + count]
            )
        else:
            with pytest.raises(DataInvalid, match=r"a\.npz: a: shape \[7, 5\]"):
                found.rows("a", start, start + count)


def test_a_broken_file_is_told_as_such(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", a=ROWS)
    data = bytearray(path.read_bytes())
    data[200] ^= 1  # inside the array
    path.write_bytes(data)
    with (
        open_npz(path) as found,
        pytest.raises(DataInvalid, match=r"a\.npz: a: truncated or damaged .*CRC"),
    ):
        list(found.blocks("a", block_bytes=40))
    path.write_bytes(data[:-30])
    with pytest.raises(DataInvalid, match="truncated or damaged"), open_npz(path):
        pass
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.pkl", b"")
    with pytest.raises(DataInvalid, match=r"member 'a\.pkl'"), open_npz(path):
        pass


def test_what_is_missing_too_large_or_packed_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=ROWS)

    with open_npz(tmp_path / "a.npz") as found:
        with pytest.raises(DataInvalid, match="b: missing; the file holds a"):
            found.array("b", most_bytes=10)
        with pytest.raises(DataInvalid, match="a: 268 bytes; at most 100"):
            found.array("a", most_bytes=100)
        with pytest.raises(DataInvalid, match="packed"):
            found.rows("a", 0, 1)


def test_streamed_tensors_have_the_bytes_of_saved_ones(tmp_path: Path) -> None:
    tensors = {
        "b": ROWS,
        "a": ROWS.astype("f8"),
        "digests": np.arange(48, dtype=np.uint8).reshape(3, 16),
        "offsets": np.arange(4),
        "half": ROWS.astype("f2"),
    }
    manifest = {"format": "x", "word": "é"}
    shards.save(tmp_path / "saved", tensors, manifest)

    streams = {
        name: shards.Stream(array.dtype, array.shape, iter([array[:2], array[2:]]))
        for name, array in tensors.items()
    }
    shards.save_streams(tmp_path / "streamed", streams, manifest)

    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "saved").read_bytes()
    short = {"b": shards.Stream(ROWS.dtype, ROWS.shape, [ROWS[:2]])}
    with pytest.raises(ValueError, match=r"^b: the blocks miss"):
        shards.save_streams(tmp_path / "streamed", short, {})


def test_the_newest_date_of_a_file_is_1980(tmp_path: Path) -> None:
    with zipfile.ZipFile(write(tmp_path / "a.npz", a=ROWS)) as archive:
        assert {info.date_time for info in archive.infolist()} == {npz._EPOCH}
