from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.prompts import (
    COLUMNS,
    LONGEST,
    Prompts,
    check_prompts,
    load_prompts,
    save_prompts,
)

THREE = Prompts(
    ids=["a", "b", "c"],
    texts=["The old bridge.", "Die alte\n\tBrücke.", "橋"],
    languages=["en", "de", ""],
    licences=["CC-BY-4.0", "", ""],
    splits=["train", "test", ""],
)


def test_prompts_come_back_as_they_were(tmp_path: Path) -> None:
    save_prompts(tmp_path / "p", THREE)

    assert load_prompts(tmp_path / "p") == THREE


def test_equal_prompts_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        save_prompts(tmp_path / name, replace(THREE))

    one, other = ((tmp_path / name).read_bytes() for name in ("one", "other"))
    assert hashlib.sha256(one).digest() == hashlib.sha256(other).digest()


def test_meta_counts_what_a_plan_needs() -> None:
    assert THREE.meta() == {
        "prompts": 3,
        "characters": 33,
        "longest": 17,
        "held_out": 1,
        "unsplit": 1,
        "languages": {"": 1, "de": 1, "en": 1},
    }


LINES = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20)


@settings(max_examples=50, deadline=None)
@given(st.lists(LINES.map(lambda text: text + "x"), min_size=1, max_size=5, unique=True))
def test_any_printable_text_is_kept(tmp_path_factory: Any, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("prompts") / "p"
    blank = [""] * len(texts)

    save_prompts(path, Prompts(texts, texts, blank, texts, blank))

    assert load_prompts(path).texts == texts


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("ids", "", "ids: entry 1: has 0 characters; allowed: 1 to 200"),
        ("ids", "x" * 201, "ids: entry 1: has 201 characters"),
        ("ids", "a", "ids: 'a' appears more than once"),
        ("ids", "x\ny", r"ids: entry 1: 'x\\ny' holds U\+000A"),
        ("texts", "", "texts: entry 1: is empty"),
        ("texts", " \n", "texts: entry 1: is empty"),
        ("texts", "a\rb", r"texts: entry 1: 'a\\rb' holds U\+000D"),
        ("texts", "a\x00b", r"holds U\+0000"),
        ("texts", "a\ud800b", r"holds U\+D800"),
        ("texts", "x" * (LONGEST + 1), "texts: entry 1: has 1000001 characters"),
        ("languages", "en_US", "languages: entry 1: 'en_US'; needed a code such as 'en'"),
        ("languages", "x" * 36, "languages: entry 1"),
        ("licences", "x" * 201, "licences: entry 1: has 201 characters"),
        ("splits", "Train", "splits: entry 1: 'Train'; allowed: 'train', 'test', or empty"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(column: str, value: str, told: str) -> None:
    values = [*getattr(THREE, column)]
    values[1] = value

    with pytest.raises(DataInvalid, match=told):
        check_prompts(replace(THREE, **{column: values}))


def test_no_prompts_are_refused() -> None:
    with pytest.raises(DataInvalid, match="texts: 0; needed 1 to 1000000"):
        check_prompts(Prompts([], [], [], [], []))


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(DataInvalid, match="licences: 2 entries for 3 texts"):
        check_prompts(replace(THREE, licences=["", ""]))


def test_too_many_languages_are_refused() -> None:
    names = [str(number) for number in range(1001)]
    blank = [""] * 1001

    with pytest.raises(DataInvalid, match="languages: 1001 different ones; allowed: 1000"):
        check_prompts(Prompts(names, names, names, blank, blank))


def written(path: Path, *, without: str = "", **manifest: Any) -> Path:
    tensors = {}
    for name in COLUMNS:
        tensors[name], tensors[f"{name}_offsets"] = shards.pack_text(getattr(THREE, name))
    tensors.pop(without, None)
    shards.save(path, tensors, {"format": "prompts", "version": 1, **THREE.meta(), **manifest})
    return path


@pytest.mark.parametrize("name", COLUMNS)
def test_file_without_a_column_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataInvalid, match=f"{name}_offsets: missing"):
        load_prompts(written(tmp_path / "p", without=f"{name}_offsets"))


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        ({"version": 2}, "version 2; needed 'prompts', version 1"),
        ({"format": "pairs"}, "format 'pairs'"),
        ({"prompts": 4}, "prompts is 4; needed 3"),
        ({"held_out": True}, "held_out is True; needed 1"),
        ({"languages": {"": 1, "de": 1, "en": 2}}, "languages is a dict"),
        ({"more": 1}, "'more' is not known"),
    ],
)
def test_manifest_that_says_otherwise_is_refused(
    tmp_path: Path, manifest: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataInvalid, match=told):
        load_prompts(written(tmp_path / "p", **manifest))
