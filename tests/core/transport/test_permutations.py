from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench._tiny_models import tiny_model
from core.architectures.shape import ModelShape
from core.errors import DataInvalid
from core.transport.permutations import (
    LayerPermutation,
    check,
    dump,
    identity,
    load_permutations,
)

SHAPE = ModelShape.of(tiny_model(intermediate_size=5).config.to_dict())
"""3 layers, 4 heads in 2 groups, 5 neurons."""
TURNED = LayerPermutation(1, (1, 0), (3, 2, 0, 1), (4, 0, 1, 3, 2))


def _saved(folder: Path, **change: Any) -> Path:
    told = {**dump({1: TURNED, 0: identity(0, SHAPE)}, SHAPE, [{"layer": 1}]), **change}
    path = folder / "permutations.json"
    path.write_text(json.dumps(told))
    return path


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    found = load_permutations(_saved(tmp_path), SHAPE)

    assert found == {0: identity(0, SHAPE), 1: TURNED}
    assert list(found) == [0, 1]


@given(st.permutations(range(5)))
def test_an_order_and_its_inverse_move_nothing(order: list[int]) -> None:
    one = LayerPermutation(0, neurons=tuple(order))
    back = one.inverse().neurons

    assert back is not None
    assert [order[at] for at in back] == list(range(5))
    assert one.inverse().inverse() == one


def test_the_inverse_keeps_groups_together() -> None:
    check(TURNED.inverse(), SHAPE)
    assert TURNED.inverse().heads == (2, 3, 1, 0)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (LayerPermutation(3), "layer 3; the model has 0 to 2"),
        (LayerPermutation(0, neurons=(0, 1, 2, 3, 3)), "neurons of layer 0 must hold each of 0"),
        (LayerPermutation(0, neurons=(0, 1, 2)), "each of 0 to 4 once"),
        (LayerPermutation(0, (0, 1), (0, 2, 1, 3)), "head 2 at place 1 is of group 1"),
        (LayerPermutation(0, (1, 0), (0, 1, 2, 3)), "group 1 stands there"),
        (LayerPermutation(0, heads=(0, 1, 2, 3)), "both heads and kv_heads"),
        (LayerPermutation(0, neurons=(0, 1, 2, True, 4)), "each of 0 to 4 once"),
    ],
)
def test_orders_that_do_not_fit_are_refused(broken: LayerPermutation, said: str) -> None:
    with pytest.raises(DataInvalid, match=said):
        check(broken, SHAPE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "codebook"}, "needed format 'permutations'"),
        ({"version": 2}, "version 1"),
        ({"neurons": 7}, "neurons 7; the model has 5"),
        ({"permutations": {}}, "needed a list"),
        ({"permutations": [{"layer": 0}]}, "needed entries of layer"),
        (
            {"permutations": [{"layer": 0, "kv_heads": None, "heads": None, "neurons": "01234"}]},
            "neurons '01234'; needed a list or null",
        ),
        (
            {"permutations": [{"layer": 0, "kv_heads": None, "heads": None, "neurons": None}] * 2},
            "layer 0 stands twice",
        ),
        (
            {"permutations": [{"layer": "0", "kv_heads": None, "heads": None, "neurons": None}]},
            "layer '0'",
        ),
        (
            {"permutations": [{"layer": 0, "kv_heads": None, "heads": None, "neurons": [[]] * 5}]},
            "neurons of layer 0",
        ),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(DataInvalid, match=said):
        load_permutations(_saved(tmp_path, **change), SHAPE)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "permutations.json"
    for text in ["{", "[1]", "[" * 100_000]:
        path.write_text(text)
        with pytest.raises(DataInvalid):
            load_permutations(path, SHAPE)


def test_a_permutation_under_another_layer_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="stands under 2"):
        dump({2: TURNED}, SHAPE)
