"""Pairs come in from .npz and .safetensors, or are refused with their reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from core.errors import DataInvalid
from core.tensors.formats import Pairs, load_pairs, save_pairs
from tests.core.artifacts.conftest import Reader
from tests.core.artifacts.federated_files import npz

Q = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
T = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
BOTH = {"query_embeddings": Q, "target_embeddings": T}


def changed(array: Any, at: Any, value: float) -> Any:
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_becomes_pairs(sandboxed: Reader, *, compressed: bool) -> None:
    arrays = {**BOTH, "ids": np.array(list("abcde")), "groups": np.array(["x", "é"] * 2 + ["x"])}

    found = sandboxed(npz(arrays, compressed=compressed), file_name="my pairs.npz")

    assert (found.format, found.file_name, found.notes) == ("pairs", "my pairs.safetensors", [])
    back = load_pairs(found.path)
    assert found.meta == back.meta()
    assert (found.meta["rows"], found.meta["dim"]) == (5, 4)
    np.testing.assert_array_equal(back.queries, Q)
    np.testing.assert_array_equal(back.targets, T)
    assert (back.ids, back.groups) == (list("abcde"), ["x", "é", "x", "é", "x"])


def test_pairs_come_back_byte_for_byte(sandboxed: Reader, tmp_path: Path) -> None:
    save_pairs(tmp_path / "p", Pairs(ids=list("abcde"), queries=Q, targets=T))
    data = (tmp_path / "p").read_bytes()

    found = sandboxed(data)

    assert found.format == "pairs"
    assert found.path.read_bytes() == data


def test_foreign_tensors_with_the_right_names_become_pairs(here: Reader) -> None:
    found = here(save({**BOTH, "ids": np.arange(5) * 10, "extra": Q}))

    assert load_pairs(found.path).ids == ["0", "10", "20", "30", "40"]
    assert found.notes == ["ignored, no such field: extra"]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.array([b"a", b"\xc3\xa9", b"c", b"d", b"e"]), ["a", "é", "c", "d", "e"]),
        (np.array([5, 4, 3, -2, 1]), ["5", "4", "3", "-2", "1"]),
        (np.arange(5, dtype=">u2"), ["0", "1", "2", "3", "4"]),
    ],
)
def test_ids_of_bytes_and_numbers_become_text(here: Reader, ids: Any, expected: list[str]) -> None:
    assert load_pairs(here(npz({**BOTH, "ids": ids})).path).ids == expected


def test_missing_ids_are_row_numbers_and_unknown_keys_are_noted(here: Reader) -> None:
    found = here(npz({**BOTH, "titles": np.array(["t"] * 5)}))

    assert load_pairs(found.path).ids == ["0", "1", "2", "3", "4"]
    assert found.notes == [
        "ignored, no such field: titles",
        "no ids in the file: row numbers are used",
    ]


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_float_width_and_order_is_read(here: Reader, dtype: str, order: Any) -> None:
    queries = Q.astype(dtype, order=order)

    back = load_pairs(here(npz({**BOTH, "query_embeddings": queries})).path)

    np.testing.assert_array_equal(back.queries, queries)
    assert back.queries.dtype == np.dtype(dtype).newbyteorder("=")


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no targets": ({"query_embeddings": Q}, "target_embeddings: missing from the .npz, which hol"),
    "neither": ({"x": Q}, "query_embeddings, target_embeddings: missing from the .npz.*holds x;"),
    "nan": ({**BOTH, "target_embeddings": changed(T, (2, 1), np.nan)}, "row 2 holds NaN or infin"),
    "infinite": ({**BOTH, "query_embeddings": changed(Q, (4, 0), np.inf)}, "row 4 holds NaN"),
    "zero row": ({**BOTH, "query_embeddings": changed(Q, 1, 0)}, "row 1 is all zeros"),
    "tiny row": ({**BOTH, "query_embeddings": changed(Q, 1, 1e-30)}, "largest entry of row 1 is 1"),
    "huge": ({**BOTH, "query_embeddings": changed(Q.astype("f8"), 1, 1e200)}, "row 1 is 1e"),
    "dims differ": ({**BOTH, "target_embeddings": T[:, :3]}, r"shape \[5, 3\] beside .*\[5, 4\]"),
    "rows differ": ({**BOTH, "target_embeddings": T[:3]}, r"shape \[3, 4\] beside"),
    "one axis": ({**BOTH, "query_embeddings": Q[0]}, r"shape \[4\]; needed"),
    "no axis": ({**BOTH, "query_embeddings": np.float32(1)}, r"shape \[\]; needed"),
    "three axes": ({**BOTH, "query_embeddings": Q[None]}, r"shape \[1, 5, 4\]; needed"),
    "no rows": ({"query_embeddings": Q[:0], "target_embeddings": T[:0]}, r"shape \[0, 4\]; needed"),
    "one dim": ({"query_embeddings": Q[:, :1], "target_embeddings": T[:, :1]}, r"\[5, 1\]; needed"),
    "integers": (
        {**BOTH, "query_embeddings": np.ones((5, 4), int)},
        "dtype int64; allowed: float16",
    ),
    "text": ({**BOTH, "query_embeddings": np.full((5, 4), "a")}, "dtype <U1; allowed: float16"),
    "complex": ({**BOTH, "query_embeddings": Q.astype("c8")}, "dtype '<c8'; allowed: bool"),
    "ids twice": ({**BOTH, "ids": np.array(list("abcda"))}, "'a' appears more than once .1 such"),
    "ids too few": ({**BOTH, "ids": np.array(list("abc"))}, "ids: 3 entries for 5 rows"),
    "ids of floats": ({**BOTH, "ids": np.arange(5.0)}, r"ids: float64 of shape \[5\]; needed one"),
    "ids in a column": ({**BOTH, "ids": np.arange(5)[:, None]}, r"ids: int64 of shape \[5, 1\]"),
    "ids not UTF-8": ({**BOTH, "ids": np.array([b"\xff"] * 5)}, "ids: not valid text"),
    "ids half a character": ({**BOTH, "ids": np.array(["\ud800"] * 5)}, "ids: not valid text"),
    "ids with a control character": (
        {**BOTH, "ids": np.array(["a", "b\x1b[2J", "c", "d", "e"])},
        r"ids: entry 1 \('b\\x1b\[2J'\) holds U\+001B",
    ),
    "ids with a newline": ({**BOTH, "ids": np.array([*"abcd", "\n!"])}, r"entry 4 .* U\+000A"),
    "groups of bytes with C1": ({**BOTH, "groups": np.array([b"\xc2\x9b"] * 5)}, r"U\+009B"),
    "groups too many": ({**BOTH, "groups": np.arange(6)}, "groups: 6 entries for 5 rows"),
    "object array": ({**BOTH, "ids": np.array([{}] * 5)}, "ids: an object array .Python objects"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pairs_are_refused_with_their_reason(
    here: Reader, tmp_path: Path, name: str
) -> None:
    arrays, reason = BROKEN[name]

    with pytest.raises(DataInvalid, match=reason):
        here(npz(arrays))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_npz_is_told_as_such(here: Reader, kept: float) -> None:
    data = npz(BOTH)

    with pytest.raises(DataInvalid, match="truncated or damaged"):
        here(data[: int(len(data) * kept)])


def test_half_a_character_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match=r"groups: entry 0 .* holds U\+D800"):
        save_pairs(tmp_path / "p", Pairs(list("abcde"), Q, T, groups=["\ud800"] * 5))
