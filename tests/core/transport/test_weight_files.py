"""Weights are read by rows and written by blocks, as the library reads and writes them whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import DataInvalid
from core.transport.weight_files import CODES, Layout, WeightFile, write_weights


@pytest.mark.parametrize("dtype", CODES.values(), ids=list(CODES))
def test_rows_are_those_of_the_library(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.arange(60).view(12, 5).to(dtype)
    save_file({"a": torch.ones(3), "w": weight, "v": weight[:, 0].contiguous()}, tmp_path / "f")

    with WeightFile(tmp_path / "f") as file:
        order = torch.tensor([7, 8, 9, 0, 3, 2, 1, 11, 10, 6, 5, 4])
        assert torch.equal(file.rows("w", 2, 9), weight[2:9])
        assert torch.equal(file.rows("w", 1, 11, order=order), weight[order[1:11]])
        assert torch.equal(file.rows("v", 0, 1), weight[:, 0][None])
        assert file.rows("w", 3, 3).shape == (0, 5)
        assert file.layouts["w"].size_bytes == 60 * dtype.itemsize


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(9)), start=st.integers(0, 8), count=st.integers(1, 9))
def test_any_order_may_be_read(
    order: list[int], start: int, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "f"
    weight = torch.arange(18.0).view(9, 2)
    save_file({"w": weight}, path)
    stop = min(start + count, 9)

    with WeightFile(path) as file:
        assert torch.equal(
            file.rows("w", start, stop, order=torch.tensor(order)), weight[order[start:stop]]
        )


def test_blocks_make_the_file_that_the_library_makes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(6, 4).bfloat16(),
        "a": torch.randn(5),
        "c": torch.randn(3, 2, dtype=torch.float64),
        "d": torch.randn(3).half(),
    }
    told: list[float] = []

    def blocks(name: str) -> Iterator[Tensor]:
        yield from tensors[name].split(2)

    layouts = {name: Layout(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_weights(tmp_path / "f", layouts, blocks, report=lambda done, total: told.append(done))

    found = load_file(tmp_path / "f")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    save_file(tensors, tmp_path / "g", {"format": "pt"})
    with safe_open(tmp_path / "f", "pt") as ours, safe_open(tmp_path / "g", "pt") as theirs:
        assert ours.metadata() == theirs.metadata() == {"format": "pt"}
    assert (tmp_path / "f").stat().st_size == (tmp_path / "g").stat().st_size
    assert told[-1] == sum(layout.size_bytes for layout in layouts.values())


def test_blocks_that_do_not_fill_a_tensor_are_a_fault(tmp_path: Path) -> None:
    layouts = {"w": Layout(torch.float32, (4, 2))}

    with pytest.raises(ValueError, match=r"miss \(4, 2\) by 8 bytes"):
        _write(tmp_path / "f", layouts, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"a block of torch\.float64"):
        _write(tmp_path / "f", layouts, torch.zeros(4, 2).double())


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xff" * 40)
    with pytest.raises(DataInvalid, match=r"not a readable .safetensors file"):
        WeightFile(tmp_path / "f")
    with pytest.raises(DataInvalid, match=r"not a readable .safetensors file"):
        WeightFile(tmp_path / "none")


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(100, 10)}, tmp_path / "f")
    with WeightFile(tmp_path / "f") as file:
        raw = (tmp_path / "f").read_bytes()
        (tmp_path / "f").write_bytes(raw[:2000])
        with pytest.raises(DataInvalid, match="ends before its last tensor"):
            file.rows("w", 0, 100)


def _write(path: Path, layouts: dict[str, Layout], block: Tensor) -> None:
    write_weights(path, layouts, lambda name: iter([block]), report=lambda done, total: None)
