"""Safetensors of torch's dtypes, read by rows and written block by block: nothing is mapped.

A mapped file counts as memory once it is touched; what is read here takes what was asked for.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import DataInvalid

CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What the format calls the dtypes that are read and written."""


@dataclass(frozen=True)
class Layout:
    """Of one tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    """Its first byte in the file."""

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFile:
    """A file open for reading.

    Raises:
        DataInvalid: not safetensors, cut off, or a tensor is of another dtype than CODES names.
    """

    def __init__(self, path: Path) -> None:
        self.layouts: Mapping[str, Layout] = _layouts(path)
        """By name, in the order of the file."""
        self._file: BinaryIO = path.open("rb", buffering=0)

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def rows(
        self,
        name: str,
        start: int,
        stop: int,
        *,
        order: Tensor | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """Read rows ``order[start:stop]`` of a tensor; one of a single axis is one row.

        Args:
            name: of the tensor.
            start: first row.
            stop: the row after the last.
            order: [rows] int64; None: as they lie.
            into: [stop - start, last axis], contiguous, of the tensor's dtype; None: new memory.

        Returns:
            [stop - start, last axis], as stored.

        Raises:
            DataInvalid: the file has become shorter since it was opened.
        """
        layout = self.layouts[name]
        last = layout.shape[-1] if layout.shape else 1
        made = torch.empty(stop - start, last, dtype=layout.dtype) if into is None else into
        width = last * layout.dtype.itemsize
        view = made.view(-1).view(torch.uint8).numpy().data
        for at, first, count in _runs(start, stop, order):
            self._read(view[at * width : (at + count) * width], layout.start + first * width)
        return made

    def _read(self, into: memoryview, offset: int) -> None:
        while len(into):
            got = os.preadv(self._file.fileno(), [into], offset)
            if not got:
                raise DataInvalid("a file of weights ends before its last tensor does")
            into, offset = into[got:], offset + got


def _runs(start: int, stop: int, order: Tensor | None) -> Iterator[tuple[int, int, int]]:
    """Yield where it goes, first row and count of rows that lie together in the file."""
    if order is None:
        yield 0, start, stop - start
        return
    wanted = order[start:stop]
    if not len(wanted):
        return
    breaks = ((wanted[1:] != wanted[:-1] + 1).nonzero().flatten() + 1).tolist()
    edges = [0, *breaks, stop - start]
    for at, end in itertools.pairwise(edges):
        yield at, int(wanted[at]), end - at


def _layouts(path: Path) -> dict[str, Layout]:
    try:
        with safe_open(str(path), framework="pt") as file:  # it checks the header and the sizes
            names = set(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise DataInvalid(f"not a readable .safetensors file: {error}") from error
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    found = {}
    for name in sorted(names, key=lambda name: (header[name]["data_offsets"][0], name)):
        code = header[name]["dtype"]
        if code not in CODES:
            raise DataInvalid(f"{name[:200]}: dtype {code}; allowed: {', '.join(CODES)}")
        start = 8 + length + header[name]["data_offsets"][0]
        found[name] = Layout(CODES[code], tuple(header[name]["shape"]), start)
    return found


def write_weights(
    path: Path,
    tensors: Mapping[str, Layout],
    blocks: Callable[[str], Iterator[Tensor]],
    *,
    report: Callable[[float, float], None],
) -> None:
    """Write a file that transformers loads; equal arguments give equal bytes.

    Args:
        path: written over.
        tensors: what stands in it.
        blocks: from a name to consecutive blocks of its rows, in its dtype; one is held at a time.
        report: told bytes done and in all, after every block.

    Raises:
        ValueError: the blocks of a tensor are of another dtype, or do not fill its shape.
    """
    # The widest dtype first, as the library does: every tensor then starts on a multiple of it.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    total = sum(layout.size_bytes for layout in tensors.values())
    text = _header(ordered, tensors)
    done = 0
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            left = tensors[name].size_bytes
            for block in blocks(name):
                if block.dtype != tensors[name].dtype:
                    raise ValueError(f"{name}: a block of {block.dtype}")
                left -= _write(file, block)
                report(float(done + tensors[name].size_bytes - left), float(total))
            if left:
                raise ValueError(f"{name}: the blocks miss {tensors[name].shape} by {left} bytes")
            done += tensors[name].size_bytes


def _header(ordered: Sequence[str], tensors: Mapping[str, Layout]) -> bytes:
    codes = {dtype: code for code, dtype in CODES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in ordered:
        layout = tensors[name]
        span = [at, at + layout.size_bytes]
        header[name] = {
            "dtype": codes[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": span,
        }
        at = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _write(file: BinaryIO, block: Tensor) -> int:
    raw = block.contiguous().view(-1).view(torch.uint8).numpy().data
    size = len(raw)
    while len(raw):
        raw = raw[file.write(raw) :]
    return size
