"""Stored embeddings: their one file, what they tell a plan, and what makes them invalid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.embeddings import (
    Embeddings,
    check_stored,
    load_embeddings,
    save_embeddings,
    whole,
)


def rows(*integers: int) -> Any:
    return np.array(integers, np.int64)


def some(**changes: Any) -> Embeddings:
    random = np.random.default_rng(0)
    made = Embeddings(
        ids=["a", "b", "c", "d"],
        embeddings=random.normal(size=(4, 6)).astype(np.float32),
        inputs=random.normal(size=(4, 3)),
        groups=["x", "y", "x", "é"],
        texts=["one", "two\nlines\tand tabs", "", "vier"],
        train_rows=rows(0, 2, 3),
        held_out_rows=rows(1),
        manifest={"pairs": "a" * 64, "split": "query", "seed": 3, "test_fraction": 0.25},
    )
    return replace(made, **changes)


def same(one: Embeddings, other: Embeddings) -> bool:
    for name in ("embeddings", "inputs", "train_rows", "held_out_rows"):
        a, b = getattr(one, name), getattr(other, name)
        if (a is None) != (b is None) or (a is not None and (a.dtype != b.dtype or (a != b).any())):
            return False
    return all(getattr(one, name) == getattr(other, name) for name in ("ids", "groups", "texts"))


def test_they_come_back_and_equal_ones_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        save_embeddings(tmp_path / name, some())

    back = load_embeddings(tmp_path / "one")

    assert same(back, some())
    assert back.manifest == some().manifest
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    save_embeddings(tmp_path / "again", back)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "one").read_bytes()


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 9),
    text=st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8),
    seed=st.integers(0, 99),
)
def test_any_rows_come_back(
    tmp_path_factory: pytest.TempPathFactory, count: int, text: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    made = whole(
        random.normal(size=(count, 2)).astype(np.float16) + np.float16(10),
        inputs=random.normal(size=(count, 4)) if seed % 3 else None,
        texts=[text + str(row) for row in range(count)] if seed % 2 else None,
    )
    path = tmp_path_factory.mktemp("rows") / "e"

    save_embeddings(path, made)

    assert same(load_embeddings(path), made)


def test_meta_tells_what_a_plan_needs() -> None:
    assert some().meta() == {
        "rows": 3,
        "all_rows": 4,
        "dim": 3,
        "target_dim": 6,
        "held_out": 1,
        "groups": 3,
        "texts": True,
        "pairs": "a" * 64,
    }
    alone = whole(some().embeddings)
    assert alone.ids == ["0", "1", "2", "3"]
    assert alone.meta() == {
        "rows": 4,
        "all_rows": 4,
        "dim": 6,
        "target_dim": 6,
        "held_out": 0,
        "groups": 0,
        "texts": False,
        "pairs": None,
    }


def spoilt(at: Any, value: float) -> Any:
    array = some().embeddings.copy()
    array[at] = value
    return array


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"embeddings": spoilt((1, 2), np.nan)}, "embeddings: row 1 holds NaN"),
        ({"embeddings": spoilt(2, 0.0)}, "embeddings: row 2 is all zeros"),
        ({"embeddings": spoilt((0, 0), 1e30)}, "embeddings: the largest entry of row 0"),
        ({"embeddings": np.ones((4, 6), np.int32)}, "embeddings: dtype int32"),
        ({"embeddings": np.ones(4)}, r"embeddings: shape \[4\]"),
        ({"embeddings": np.ones((4, 1))}, r"embeddings: shape \[4, 1\]"),
        ({"inputs": np.ones((3, 2))}, "inputs: 3 rows for 4 embeddings"),
        ({"inputs": np.full((4, 2), np.inf)}, "inputs: row 0 holds NaN or infinity"),
        ({"ids": ["a", "b", "c"]}, "ids: 3 entries for 4 embeddings"),
        ({"ids": ["a", "b", "c", "a"]}, "ids: 'a' appears more than once"),
        ({"ids": ["a", "b\n", "c", "d"]}, r"ids: entry 1 .* holds U\+000A"),
        ({"groups": ["a"]}, "groups: 1 entries"),
        ({"texts": ["\x00", "", "", ""]}, r"texts: entry 0 .* holds U\+0000"),
        ({"train_rows": rows()}, "train_rows: none"),
        ({"train_rows": rows(0, 2)}, "needed each row from 0 to 3 once"),
        ({"train_rows": rows(0, 1, 2, 3)}, "needed each row from 0 to 3 once"),
        ({"train_rows": rows(0, 3, 2)}, "train_rows: needed ascending"),
        ({"held_out_rows": rows(1, 1)}, "held_out_rows: needed ascending"),
        ({"held_out_rows": rows(4)}, "needed each row from 0 to 3 once"),
        ({"held_out_rows": rows(-1)}, "needed each row from 0 to 3 once"),
        ({"train_rows": np.array([0, 2, 3])[:, None]}, "train_rows: int64 of shape"),
        ({"train_rows": np.array([0, 2, 3], np.int32)}, "train_rows: int32 of shape"),
        ({"manifest": {"mood": "good"}}, "manifest: 'mood' is not known"),
        ({"manifest": {"pairs": "x"}}, "pairs is 'x'; needed null or the SHA-256"),
        ({"manifest": {"seed": True}}, "seed is True; needed a whole number"),
        ({"manifest": {"test_fraction": 2}}, "test_fraction is 2; needed"),
        ({"manifest": {"split": "row"}}, "split is 'row'; needed query or cluster"),
        ({"manifest": {"given": "all"}}, "given is 'all'; needed queries, targets or stored"),
        ({"manifest": {"rows": 4}}, "rows is 4; needed 3"),
        ({"manifest": {"source": "me"}}, "source is 'me'; needed imported"),
    ],
)
def test_invalid_ones_are_named_and_never_written(tmp_path: Path, changes: Any, told: str) -> None:
    with pytest.raises(DataInvalid, match=told):
        check_stored(some(**changes))
    with pytest.raises(DataInvalid, match=told):
        save_embeddings(tmp_path / "e", some(**changes))
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("manifest", "dropped", "told"),
    [
        ({"version": 2}, (), "version 2; needed 'embeddings', version 1"),
        ({"format": "pairs"}, (), "format 'pairs'"),
        ({"all_rows": 5}, (), "all_rows is 5; needed 4"),
        ({"texts": False}, (), "texts is False; needed True"),
        ({"mood": 1}, (), "'mood' is not known"),
        ({}, ("embeddings",), "embeddings: missing; the file holds"),
        ({}, ("train_rows",), "train_rows: missing"),
        ({}, ("ids", "ids_offsets"), "ids: missing"),
        ({}, ("ids",), "ids: missing beside the other half of the packed ids"),
        ({}, ("texts_offsets",), "texts_offsets: missing beside"),
    ],
)
def test_a_file_that_is_another_or_lacks_something_is_refused(
    tmp_path: Path, manifest: Any, dropped: Any, told: str
) -> None:
    save_embeddings(tmp_path / "e", some())
    tensors, written = shards.load(tmp_path / "e")
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    shards.save(tmp_path / "e", kept, {**written, **manifest})
    with pytest.raises(DataInvalid, match=told):
        load_embeddings(tmp_path / "e")
