"""Looks into a shard of a language model: its header, and whether all numbers are finite.

Numbers are read in blocks of BLOCK_BYTES, whatever the size of a weight. Torch-free, so bfloat16
too is looked at by its bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from core.architectures.shape import ModelShape
from core.errors import DataInvalid

MOST_HEADER_BYTES = 8 << 20
BLOCK_BYTES = 16 << 20
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_EXPONENTS: dict[str, tuple[Any, int]] = {
    "float64": (np.dtype("<u8"), 0x7FF0_0000_0000_0000),
    "float32": (np.dtype("<u4"), 0x7F80_0000),
    "float16": (np.dtype("<u2"), 0x7C00),
    "bfloat16": (np.dtype("<u2"), 0x7F80),
}
"""The bits of a number's exponent: all set in what is infinite or not a number."""
BUFFER = "rotary_emb.inv_freq"
"""How a weight's name ends that older files hold and transformers passes over."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file."""

    name: str
    dtype: str
    """``bfloat16``; as in the file's own words where it is none that weights may have."""
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""
    stop: int


def read_header(path: Path) -> tuple[Entry, ...]:
    """Return a file's tensors in the order of their bytes.

    Raises:
        DataInvalid: not a whole safetensors file, its header is too long or names a tensor twice.
    """
    with path.open("rb") as file:
        told = int.from_bytes(file.read(8), "little")
        if not 2 <= told <= MOST_HEADER_BYTES:
            raise DataInvalid(
                f"{path.name}: a header of {told} bytes; allowed: 2 to {MOST_HEADER_BYTES}"
            )
        text = file.read(told)
    try:
        with safe_open(str(path), framework="numpy"):  # offsets, sizes, holes, the file's length
            header = json.loads(text, object_pairs_hook=_once)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise DataInvalid(f"{path.name}: not a readable .safetensors file: {error}") from error
    header.pop("__metadata__", None)
    entries = [_entry(name, facts, 8 + told) for name, facts in header.items()]
    return tuple(sorted(entries, key=lambda entry: (entry.start, entry.name)))


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("the header names a key twice")
    return found


def _entry(name: str, facts: dict[str, Any], first: int) -> Entry:
    start, stop = facts["data_offsets"]
    dtype = _DTYPES.get(facts["dtype"], facts["dtype"])
    return Entry(name, dtype, tuple(facts["shape"]), first + start, first + stop)


def is_passed_over(name: str, shape: ModelShape) -> bool:
    """Whether transformers passes a tensor over: the head of tied embeddings, a buffer of RoPE."""
    return (shape.tied and name == shape.table.head) or name.endswith(f".{BUFFER}")


def check_shard(name: str, entries: Sequence[Entry], shape: ModelShape) -> tuple[str, ...]:
    """Return the weights that a shard holds, in its order, without what is passed over.

    Raises:
        DataInvalid: a tensor is none of the model's, or of another shape or dtype.
    """
    wanted, held = shape.tensors(), []
    for entry in entries:
        if is_passed_over(entry.name, shape):
            continue
        if entry.name not in wanted:
            raise DataInvalid(
                f"{name}: {entry.name[:100]!r} is no weight of a {shape.family} model of "
                f"{shape.layers} layers as its config.json describes it"
            )
        if entry.shape != wanted[entry.name]:
            raise DataInvalid(
                f"{name}: {entry.name}: shape {list(entry.shape)}; needed "
                f"{list(wanted[entry.name])}, as config.json says"
            )
        if entry.dtype != shape.dtype:
            raise DataInvalid(
                f"{name}: {entry.name}: dtype {entry.dtype}; needed {shape.dtype}, as config.json "
                "says"
            )
        held.append(entry.name)
    return tuple(held)


def check_finite(path: Path, entries: Sequence[Entry], report: Callable[[int], None]) -> None:
    """Read every number of these tensors.

    Args:
        path: the file.
        entries: of floating dtypes.
        report: called with the number of bytes just read.

    Raises:
        DataInvalid: one is infinite or not a number.
    """
    for entry in entries:
        bits, mask = _EXPONENTS[entry.dtype]
        place = 0
        for block in _blocks(path, entry):
            numbers = np.frombuffer(block, bits)
            bad = (numbers & mask) == mask
            if bad.any():
                at = np.unravel_index(place + int(bad.argmax()), entry.shape)
                where = ", ".join(str(index) for index in at)
                raise DataInvalid(f"{path.name}: {entry.name}[{where}] is not a finite number")
            place += len(numbers)
            report(len(block))


def digest(path: Path, entry: Entry) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    sha256 = hashlib.sha256()
    for block in _blocks(path, entry):
        sha256.update(block)
    return sha256.hexdigest()


def _blocks(path: Path, entry: Entry) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(entry.start)
        left = entry.stop - entry.start
        while left:
            block = file.read(min(left, BLOCK_BYTES))
            if not block:
                raise DataInvalid(f"{path.name}: {entry.name}: the file ends too soon")
            left -= len(block)
            yield block
