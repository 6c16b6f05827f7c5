"""A block of targets reads its own queries and no more, whatever the size of the file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core.errors import DataInvalid
from core.kinds import cache_targets
from core.kinds._base import Input
from core.tensors import shards
from core.tensors.formats import save_pairs
from tests.core.distill._make import make_pairs

SPEC = cache_targets.Spec(model="0" * 64, pairs="1" * 64, rows_per_chunk=1_000_000)


def test_only_the_rows_of_the_block_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, wanted = tmp_path / "pairs.safetensors", make_pairs().queries
    save_pairs(path, make_pairs())
    monkeypatch.setattr(shards, "load", None)
    chunk: Any = SimpleNamespace(
        fetch=lambda _: path, input=lambda _: Input("1" * 64, "pairs", make_pairs().meta())
    )

    found = cache_targets._queries(SPEC, chunk, wanted[:0], 30, 50)

    assert np.array_equal(found, wanted[30:50])


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    shards.save(path, {"a": np.zeros((4, 2))}, {})

    assert shards.load_rows(path, "a", 3, 4).shape == (1, 2)
    for name, start, stop in (
        ("a", 4, 4),
        ("a", 2, 5),
        ("a", -1, 2),
        ("b", 0, 1),
    ):
        with pytest.raises(DataInvalid, match=f"^{name}: "):
            shards.load_rows(path, name, start, stop)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataInvalid, match=r"not a readable \.safetensors file"):
        shards.load_rows(path, "a", 0, 1)


def test_a_wide_block_holds_fewer_rows() -> None:
    blocks = cache_targets._blocks(SPEC, {"rows": 1_000_000, "dim": 4096})
    assert blocks[0] == (0, 4096)
    assert blocks[-1] == (999_424, 1_000_000)
