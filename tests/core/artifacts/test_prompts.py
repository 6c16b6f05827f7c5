"""Prompts come in as JSON lines or as a table, or are refused with the line and the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.artifacts.limits import Limits
from core.errors import DataInvalid, TooLarge
from core.tensors.prompts import Prompts, load_prompts, save_prompts
from tests.core.artifacts.conftest import Reader


def lines(*objects: dict[str, Any]) -> bytes:
    return "".join(json.dumps(found) + "\n" for found in objects).encode()


FULL = {"id": "a", "text": "The old\nbridge.", "language": "en", "licence": "MIT", "split": "test"}


def test_json_lines_become_prompts(sandboxed: Reader) -> None:
    found = sandboxed(lines(FULL, {"id": 7, "text": "橋"}), file_name="tour.jsonl")

    assert (found.format, found.file_name, found.notes) == ("prompts", "tour.safetensors", [])
    back = load_prompts(found.path)
    assert back == Prompts(
        ["a", "7"], ["The old\nbridge.", "橋"], ["en", ""], ["MIT", ""], ["test", ""]
    )
    assert found.meta == back.meta()


def test_a_table_becomes_prompts(sandboxed: Reader) -> None:
    data = 'Id\tText \tlicense\tplace\n1\tThe "old" bridge\tMIT\tRome\n2\t\\n 橋\t\tOslo\n'

    found = sandboxed(data.encode(), file_name="index.tsv")

    assert (found.format, found.file_name) == ("prompts", "index.safetensors")
    back = load_prompts(found.path)
    assert back.texts == ['The "old" bridge', "\\n 橋"]
    assert (back.ids, back.licences) == (["1", "2"], ["MIT", ""])
    assert found.notes == ["ignored, no such field: place"]


def test_a_table_of_texts_alone_gets_row_numbers(here: Reader) -> None:
    found = here(b"text\none\n\ntwo\n")

    assert load_prompts(found.path).ids == ["0", "1"]
    assert found.notes == ["no ids in the file: row numbers are used"]


@pytest.mark.parametrize("data", [lines(FULL), b"id\ttext\na\tx y\n"])
def test_windows_files_are_the_same_prompts(here: Reader, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "other").mkdir()
    plain = load_prompts(here(data).path)
    (tmp_path / "scratch").rmdir()

    found = here(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n") + b"\r\n")

    assert load_prompts(found.path) == plain


def test_empty_lines_and_a_missing_last_newline_do_no_harm(here: Reader) -> None:
    found = here(b"\n  \n" + lines(FULL) + b'\n{"id": "b", "text": "x", "language": null}')

    assert load_prompts(found.path).ids == ["a", "b"]


def test_prompts_come_back_byte_for_byte(sandboxed: Reader, tmp_path: Path) -> None:
    save_prompts(tmp_path / "p", Prompts(["a", "b"], ["x", "é\n"], ["", ""], ["", ""], ["", ""]))
    data = (tmp_path / "p").read_bytes()

    found = sandboxed(data)

    assert (found.format, found.notes) == ("prompts", [])
    assert found.path.read_bytes() == data


def test_unknown_fields_are_noted_once(here: Reader) -> None:
    found = here(lines({**FULL, "place": 1, "u\x1bl": []}, {**FULL, "id": "b", "place": 2}))

    assert found.notes == ["ignored, no such field: place", "ignored, no such field: u?l"]


SOUND = lines(FULL)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (SOUND + b'{"id": "b"}\n', "line 2: text is missing"),
        (SOUND + b'{"id": "b", "text": ""}', "line 2: text: is empty"),
        (SOUND + b'{"id": "b", "text": 3}', "line 2: text is 3; needed text"),
        (SOUND + b'{"id": true, "text": "x"}', "line 2: id is True; needed text or a whole number"),
        (SOUND + b'{"id": 1.5, "text": "x"}', "line 2: id is 1.5"),
        (SOUND + b'{"text": "x"}', "line 2: id: missing, where other lines have one"),
        (SOUND + b"\n" + SOUND, "line 3: id: 'a' is that of line 1; make ids unique"),
        (SOUND + b'{"id": "b", "text": "x"', r"line 2: not JSON \("),
        (SOUND + b'["x"]', "line 2: a list; needed one JSON object a line"),
        (SOUND + b'{"text": "x", "text": "y"}', "line 2: not JSON .a key appears twice"),
        (SOUND + b'{"id": "b", "text": "\xff"}', "line 2: byte 22 is not UTF-8"),
        (SOUND + b'{"id": "b", "text": "\\u0007"}', r"line 2: text: '\\x07' holds U\+0007"),
        (SOUND + b'{"id": "b", "text": "\\udc00"}', r"line 2: text: .* holds U\+DC00"),
        (lines({**FULL, "language": "en_US"}), "line 1: language: 'en_US'; needed a code"),
        (lines({**FULL, "split": "dev"}), "line 1: split: 'dev'; allowed: 'train', 'test'"),
        (lines({**FULL, "license": "MIT"}), "line 1: licence and license"),
        (b'{\n "text": "x"\n}\n', "line 1: not JSON"),
        (b"id\ttext\n1\tx\ty\n", "line 2: 3 columns; the first line names 2"),
        (b"id\ttext\n1\n", "line 2: 1 columns"),
        (b"text\ttext\nx\ty\n", "line 1: column 'text' appears twice"),
        (b"id\ttext\n1\t \n", "line 2: text: is empty"),
        (b"id\ttext\n", "texts: 0; needed 1"),
        ("id\ttext\n1\tx\n".encode("utf-16"), "text in UTF-16; save it as UTF-8"),
        (b"id,text\n1,x\n", "neither JSON lines nor a table"),
        (b"query\ttarget\nx\ty\n", "neither JSON lines nor a table"),
        (b'[{"text": "x"}]', "neither JSON lines nor a table"),
    ],
)
def test_a_wrong_line_is_told(here: Reader, data: bytes, told: str) -> None:
    with pytest.raises(DataInvalid, match=told):
        here(data)


def test_a_line_over_the_limit_is_told(here: Reader) -> None:
    with pytest.raises(TooLarge, match="line 2: more than 200 bytes"):
        here(SOUND + lines({"id": "b", "text": "x" * 200}), limits=Limits(line_bytes=200))


def test_a_file_over_the_limit_is_told(here: Reader) -> None:
    with pytest.raises(TooLarge, match="more than 150 bytes in all"):
        here(SOUND * 2, limits=Limits(inflated_bytes=150))
