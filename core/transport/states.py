"""Paired rows themselves, where they are kept: one .safetensors a chunk, and a JSON beside it.

The JSON says which rows are of which text and what the file's SHA-256 is; both are checked before
a row is read (document 002, section 16.3).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import DataInvalid
from core.transport.moments import Captured, Moments, add_rows, mirror
from core.transport.pairs import Pair, plan_batches
from core.transport.sites import layer_of

FORMAT, VERSION = "states", 1
StoredDtype = Literal["float32", "bfloat16"]
_CODES = {"float32": "F32", "bfloat16": "BF16"}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Layout:
    """What a file of states holds, known before the first row is computed."""

    sites: tuple[str, ...]
    student: int
    """Width of the student's rows."""
    teacher: int
    dtype: StoredDtype
    texts: tuple[tuple[str, int], ...]
    """Id and number of rows of each text, in the order of the file."""
    batches: tuple[int, ...]
    """Rows of each batch, as they were computed: sums over the same rows have the same bytes."""

    @property
    def rows(self) -> int:
        """Rows at every site."""
        return sum(self.batches)

    @property
    def size_bytes(self) -> int:
        """What the tensors take: rows, and a float32 weight of each, at every site."""
        row = (self.student + self.teacher) * _ITEM_BYTES[self.dtype] + 4
        return len(self.sites) * self.rows * row

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of each tensor, in the order of the file."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for site in self.sites:
            found[f"{site}.student"] = self.dtype, (self.rows, self.student)
            found[f"{site}.teacher"] = self.dtype, (self.rows, self.teacher)
            found[f"{site}.weight"] = "float32", (self.rows,)
        return found


def lay_out_states(
    pairs: Sequence[Pair],
    ids: Sequence[str],
    *,
    sites: Sequence[str],
    widths: tuple[int, int],
    batch_tokens: int,
    dtype: StoredDtype = "float32",
) -> Layout:
    """Plan the file that ``capture`` fills through a ``StateWriter``.

    Args:
        pairs: the texts, as given to ``capture``.
        ids: of the texts.
        sites: the student's.
        widths: of the student's and the teacher's stream.
        batch_tokens: as given to ``capture``.
        dtype: of the rows; bfloat16 rounds them, and so the moments made of them.
    """
    plan = plan_batches(pairs, batch_tokens=batch_tokens)
    counted = [[(ids[number], len(pairs[number].alignment)) for number in of] for of in plan]
    return Layout(
        tuple(sites),
        *widths,
        dtype,
        tuple(text for of in counted for text in of),
        tuple(sum(rows for _, rows in of) for of in counted),
    )


class StateWriter:
    """Takes rows from ``capture`` (its ``keep``) and writes each to its place in the file."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Write the header and reserve the rest."""
        self._left = dict.fromkeys(layout.tensors(), layout.rows)
        self._places: dict[str, _Place] = {}
        header: dict[str, Any] = {}
        at = 0
        for name, (dtype, shape) in layout.tensors().items():
            row_bytes = math.prod(shape[1:]) * _ITEM_BYTES[dtype]
            span = [at, at + shape[0] * row_bytes]
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": span}
            self._places[name] = _Place(at, row_bytes, getattr(torch, dtype))
            at = span[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._path = path
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(self._start + at)

    def __call__(self, site: str, start: int, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Write rows start, start + 1, ... of a site."""
        # Opened each time, so that a pass that is cancelled leaves nothing open.
        with self._path.open("r+b") as file:
            for what, rows in (("student", x), ("teacher", y), ("weight", weight)):
                name = f"{site}.{what}"
                place = self._places[name]
                stored = rows.to(device="cpu", dtype=place.dtype).contiguous()
                file.seek(self._start + place.at + start * place.row_bytes)
                file.write(stored.flatten().view(torch.uint8).numpy().data)
                self._left[name] -= len(rows)

    def close(self) -> None:
        """Raise ValueError where rows that the layout has were never written."""
        lacking = [name for name, left in self._left.items() if left]
        if lacking:
            raise ValueError(f"states: rows are lacking of {', '.join(lacking[:5])}")


@dataclass(frozen=True)
class _Place:
    at: int
    row_bytes: int
    dtype: torch.dtype


def describe(path: Path, layout: Layout, *, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the JSON beside a whole file says: texts, rows, layers, checksum.

    Args:
        path: of the file, which is read once for its SHA-256.
        layout: it was written by.
        facts: JSON values kept under ``facts``, such as the ledger's ``run_id``.
    """
    starts = itertools.accumulate((rows for _, rows in layout.texts), initial=0)
    layers = [layer for site in layout.sites if (layer := layer_of(site)) is not None]
    return {
        "format": FORMAT,
        "version": VERSION,
        "sha256": _sha256(path),
        "size_bytes": path.stat().st_size,
        "dtype": layout.dtype,
        "widths": [layout.student, layout.teacher],
        "sites": list(layout.sites),
        "layers": [min(layers), max(layers)] if layers else [],
        "tokens": layout.rows,
        "prompts": [
            {"id": name, "start": start, "tokens": rows}
            for (name, rows), start in zip(layout.texts, starts, strict=False)
        ],
        "batches": list(layout.batches),
        "facts": dict(facts),
    }


class States:
    """A checked file of states."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Take a file that ``read_states`` has checked."""
        self.path, self.layout = path, layout

    def batches(self, site: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield a site's rows batch by batch: x [P, d_s], y [P, d_t], weight [P], all float32."""
        with safe_open(str(self.path), framework="pt") as file:
            parts = [file.get_slice(f"{site}.{what}") for what in ("student", "teacher", "weight")]
            start = 0
            for rows in self.layout.batches:
                x, y, weight = (part[start : start + rows].float() for part in parts)
                yield x, y, weight
                start += rows

    def moments(self, report: Callable[[float, float], None] | None = None) -> Captured:
        """Sum the moments as ``capture`` did: of float32 states they are equal to the last bit.

        Args:
            report: told sites done and to do.

        Raises:
            DataInvalid: a number is not finite.
        """
        found: dict[str, Moments] = {}
        for done, site in enumerate(self.layout.sites):
            if report is not None:
                report(done, len(self.layout.sites))
            sums = Moments.zeros(
                self.layout.student, self.layout.teacher, device=torch.device("cpu")
            )
            for x, y, weight in self.batches(site):
                add_rows(sums, x, y, weight)
            mirror(sums)
            found[site] = sums
        captured = Captured(found, {}, {})
        captured.check_finite()
        return captured


def read_states(path: Path, beside: Path) -> States:
    """Check a file against the JSON beside it, before anything is made of its rows.

    Args:
        path: the .safetensors.
        beside: the JSON.

    Raises:
        DataInvalid: the JSON is not readable, the checksum is another, or tensors and texts are
            not those it names.
    """
    try:
        told = json.loads(beside.read_text(encoding="utf-8"))
        layout, checksum = _parse(told), told["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataInvalid(f"states: not a readable JSON beside a shard: {error!r}") from error
    found = _sha256(path)
    if found != checksum:
        raise DataInvalid(
            f"states: SHA-256 {found}; needed {str(checksum)[:64]}: the shard is corrupt, or the "
            "JSON is another's; run the capture again"
        )
    _check_tensors(path, layout)
    return States(path, layout)


def _parse(told: Mapping[str, Any]) -> Layout:
    if (told["format"], told["version"]) != (FORMAT, VERSION):
        raise DataInvalid(f"states: needed format {FORMAT!r}, version {VERSION}")
    student, teacher = map(int, told["widths"])
    layout = Layout(
        tuple(map(str, told["sites"])),
        student,
        teacher,
        told["dtype"],
        tuple((str(text["id"]), int(text["tokens"])) for text in told["prompts"]),
        tuple(map(int, told["batches"])),
    )
    if layout.dtype not in _CODES:
        raise DataInvalid(f"states: dtype {str(layout.dtype)[:40]}; allowed: {', '.join(_CODES)}")
    rows = sum(count for _, count in layout.texts)
    if not rows == layout.rows == told["tokens"] or min(layout.batches, default=0) < 1:
        raise DataInvalid(
            f"states: {rows} tokens of texts, {layout.rows} of batches, {told['tokens']} said"
        )
    return layout


def _check_tensors(path: Path, layout: Layout) -> None:
    try:
        with safe_open(str(path), framework="pt") as file:
            wanted = layout.tensors()
            if set(file.keys()) != set(wanted):
                raise DataInvalid("states: the shard's tensors are not those of the JSON's sites")
            for name, (dtype, shape) in wanted.items():
                part = file.get_slice(name)
                has = part.get_dtype(), tuple(part.get_shape())
                if has != (_CODES[dtype], shape):
                    raise DataInvalid(f"{name}: {has}; the JSON says {(_CODES[dtype], shape)}")
    except SafetensorError as error:
        raise DataInvalid(f"states: not a readable .safetensors file: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
