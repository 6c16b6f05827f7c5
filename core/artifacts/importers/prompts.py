"""Prompts from JSON lines or from a table with tabs, checked and in one canonical form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.artifacts.limits import Budget
from core.errors import DataInvalid, TooLarge
from core.tensors.manifests import shown
from core.tensors.prompts import COLUMNS, MOST, Prompts, complaint, load_prompts, save_prompts

FIELDS = {
    "id": "ids",
    "text": "texts",
    "language": "languages",
    "licence": "licences",
    "license": "licences",
    "split": "splits",
}
"""What a line may say, and the column it goes into."""
NEEDED = (
    "needed one JSON object a line with 'text', or a first line that names columns, 'text' among "
    "them, with tabs between; optional: id, language, licence, split"
)
_BOM = b"\xef\xbb\xbf"
Row = Mapping[str, str]


def looks_like(head: bytes) -> bool:
    """Tell whether a file starts like JSON lines, or like a table with a column ``text``."""
    return _is_json(head) or "text" in _names(head.removeprefix(_BOM).split(b"\n")[0])


def _is_json(head: bytes) -> bool:
    return head.removeprefix(_BOM).lstrip().startswith(b"{")


def _names(line: bytes) -> list[str]:
    columns = line.rstrip(b"\r\n").decode(errors="replace").split("\t")
    return [column.strip().casefold() for column in columns]


def from_text(source: Path, target: Path, *, budget: Budget) -> tuple[dict[str, Any], list[str]]:
    """Read JSON lines or a table, write ``target``; return the meta and notes on what was left out.

    A table has no quotes: a text is what stands between two tabs.

    Raises:
        DataInvalid: a line is not UTF-8, not such an object or row; the message names the line.
        TooLarge: a line or the file is over a limit.
    """
    with source.open("rb") as file:
        read = _objects if _is_json(file.read(512)) else _table
    return _write(target, read(_lines(source, budget)))


def from_file(source: Path, target: Path) -> tuple[dict[str, Any], list[str]]:
    """Rewrite what this service wrote as ``prompts``; return its meta and no notes."""
    found = load_prompts(source)
    save_prompts(target, found)
    return found.meta(), []


def _lines(source: Path, budget: Budget) -> Iterator[tuple[int, str]]:
    """Yield line number, from 1, and text of every line that is not empty."""
    most = budget.limits.line_bytes
    with source.open("rb") as file:
        number = 0
        while line := file.readline(most + 1):
            number += 1
            if len(line) > most:
                raise TooLarge(f"line {number}: more than {most} bytes; cut the text up")
            budget.spend(len(line), f"line {number}")
            line = line.removeprefix(_BOM) if number == 1 else line
            try:
                text = line.decode().removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise DataInvalid(
                    f"line {number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
                ) from error
            if text.strip():
                yield number, text


def _objects(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Row]]:
    """Yield the fields of each line of JSON."""
    for number, line in lines:
        try:
            found = json.loads(line, object_pairs_hook=_once)
        except RecursionError as error:
            raise DataInvalid(f"line {number}: nests too deep; {NEEDED}") from error
        except ValueError as error:
            raise DataInvalid(f"line {number}: not JSON ({error}); {NEEDED}") from error
        if not isinstance(found, dict):
            raise DataInvalid(f"line {number}: {shown(found)}; {NEEDED}")
        yield (
            number,
            {
                name: _as_text(number, name, value)
                for name, value in found.items()
                if value is not None
            },
        )


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python keeps the last of equal keys; another reader may keep the first.
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("a key appears twice")
    return found


def _as_text(number: int, name: str, value: Any) -> str:
    if name not in FIELDS:
        return ""
    if isinstance(value, str):
        return value
    if name == "id" and type(value) is int:
        return str(value)
    needed = "text or a whole number" if name == "id" else "text"
    raise DataInvalid(f"line {number}: {name} is {shown(value)}; needed {needed}")


def _table(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Row]]:
    """Yield the fields of each row below the names of the columns."""
    first, header = next(lines)
    names = _names(header.encode())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataInvalid(f"line {first}: column {shown(twice[0])} appears twice")
    if "text" not in names:
        raise DataInvalid(f"line {first}: no column 'text'; {NEEDED}")
    for number, line in lines:
        values = line.split("\t")
        if len(values) != len(names):
            raise DataInvalid(
                f"line {number}: {len(values)} columns; the first line names {len(names)}. A text "
                "in a table has no tabs and no lines of its own; send JSON lines for such texts"
            )
        row = zip(names, values, strict=True)
        yield number, {name: value for name, value in row if name == "text" or value}


def _write(target: Path, rows: Iterator[tuple[int, Row]]) -> tuple[dict[str, Any], list[str]]:
    found = Prompts([], [], [], [], [])
    unknown: dict[str, None] = {}
    lines: list[int] = []
    for number, row in rows:
        if len(lines) == MOST:
            raise TooLarge(f"line {number}: more than {MOST} prompts; send several files")
        unknown |= dict.fromkeys(name for name in row if name not in FIELDS and len(unknown) < 50)
        _add(found, number, row)
        lines.append(number)
    notes = [f"ignored, no such field: {_printable(name[:100])}" for name in unknown]
    if not any(found.ids):
        found.ids[:] = [str(row) for row in range(len(lines))]
        notes.append("no ids in the file: row numbers are used")
    _check_ids(lines, found.ids)
    save_prompts(target, found)
    return found.meta(), notes


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _add(found: Prompts, number: int, row: Row) -> None:
    if "licence" in row and "license" in row:
        raise DataInvalid(f"line {number}: licence and license; say one of them")
    if "text" not in row:
        raise DataInvalid(f"line {number}: text is missing; {NEEDED}")
    for name, value in row.items():
        if name in FIELDS and (wrong := complaint(FIELDS[name], value)):
            raise DataInvalid(f"line {number}: {name}: {wrong}")
    told = {FIELDS[name]: value for name, value in row.items() if name in FIELDS}
    for column in COLUMNS:
        getattr(found, column).append(told.get(column, ""))


def _check_ids(lines: list[int], ids: list[str]) -> None:
    seen: dict[str, int] = {}
    for number, name in zip(lines, ids, strict=True):
        if not name:
            raise DataInvalid(f"line {number}: id: missing, where other lines have one")
        if name in seen:
            raise DataInvalid(
                f"line {number}: id: {shown(name)} is that of line {seen[name]}; make ids unique"
            )
        seen[name] = number
