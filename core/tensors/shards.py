"""Safetensors files with one JSON manifest in the header. Torch-free; the same bytes every time."""

import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from core.errors import DataInvalid

Array = NDArray[Any]
_CODES = {"int64": "I64", "float64": "F64", "float32": "F32", "float16": "F16", "uint8": "U8"}
"""What the format calls the dtypes that are streamed, in the order the library writes them in."""


def save(path: Path, tensors: Mapping[str, Array], manifest: Mapping[str, Any]) -> None:
    """Write tensors and manifest; equal arguments give equal bytes."""
    header = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    path.touch()
    mode = path.stat().st_mode  # the library's own file could be read by nobody else
    # One metadata key only: the library writes several in the order of a random hash.
    save_file(contiguous, str(path), metadata={"manifest": header})
    path.chmod(mode)


@dataclass(frozen=True)
class Stream:
    """A tensor that comes in blocks along its first axis."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    blocks: Iterable[Array]

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def save_streams(path: Path, streams: Mapping[str, Stream], manifest: Mapping[str, Any]) -> None:
    """Write what ``save`` would write, byte for byte, holding one block at a time.

    Raises:
        ValueError: a block is of another dtype, or the blocks do not fill a shape.
    """
    told = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    header: dict[str, Any] = {"__metadata__": {"manifest": told}}
    ranks = list(_CODES)
    ordered = sorted(streams, key=lambda name: (ranks.index(streams[name].dtype.name), name))
    at = 0
    for name in ordered:
        stream = streams[name]
        span = [at, at + stream.size_bytes]
        code = _CODES[stream.dtype.name]
        header[name] = {"dtype": code, "shape": list(stream.shape), "data_offsets": span}
        at = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            _write_stream(file, name, streams[name])


def _write_stream(file: BinaryIO, name: str, stream: Stream) -> None:
    left = stream.size_bytes
    for block in stream.blocks:
        if block.dtype != stream.dtype:
            raise ValueError(f"{name}: a block of {block.dtype} in a tensor of {stream.dtype}")
        left -= block.nbytes
        file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    if left:
        raise ValueError(f"{name}: the blocks miss the shape {list(stream.shape)} by {left} bytes")


def names(path: Path) -> set[str]:
    """Return the names of the tensors in a file, whatever its size."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            return set(file.keys())
    except (SafetensorError, ValueError) as error:
        raise DataInvalid(f"not a readable .safetensors file: {error}") from error


def describe(path: Path, name: str) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
    """Return dtype and shape of a tensor that ``save_streams`` can write.

    Raises:
        DataInvalid: the file is not safetensors, lacks the tensor, or it is of another dtype.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            tensor = file.get_slice(name)
            code, shape = tensor.get_dtype(), tuple(tensor.get_shape())
    except (SafetensorError, ValueError) as error:
        raise DataInvalid(f"not a readable .safetensors file: {error}") from error
    known = {code: dtype for dtype, code in _CODES.items()}
    if code not in known:
        raise DataInvalid(f"{name}: dtype {code}; allowed: {', '.join(known)}")
    return np.dtype(known[code]), shape


def load(
    path: Path, *, only: Collection[str] | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read every tensor (or only some) and the manifest (empty where the file has none).

    Raises:
        DataInvalid: the file is not safetensors, is truncated, or its manifest is not JSON.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            wanted = file.keys() if only is None else only
            tensors = {name: file.get_tensor(name) for name in wanted}
            return tensors, _manifest(file.metadata())
    except (SafetensorError, ValueError, TypeError) as error:
        raise DataInvalid(f"not a readable .safetensors file: {error}") from error


def load_rows(path: Path, name: str, start: int, stop: int) -> Array:
    """Read rows start..stop-1 (at least one) of one tensor; memory and time are theirs alone.

    Raises:
        DataInvalid: the file is not safetensors, lacks the tensor, or the tensor those rows.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            if name not in file.keys():  # noqa: SIM118
                raise DataInvalid(f"{name}: missing; the file holds {', '.join(file.keys())}")
            tensor = file.get_slice(name)
            shape = tensor.get_shape()
            if not shape or not 0 <= start < stop <= shape[0]:
                raise DataInvalid(f"{name}: shape {shape}; needed rows {start} to {stop}")
            rows: Array = tensor[start:stop]
            return rows
    except (SafetensorError, ValueError, TypeError) as error:
        raise DataInvalid(f"not a readable .safetensors file: {error}") from error


def load_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest alone, whatever the file's size."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            return _manifest(file.metadata())
    except (SafetensorError, ValueError) as error:
        raise DataInvalid(f"not a readable .safetensors file: {error}") from error


def _manifest(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        found = json.loads(
            (metadata or {}).get("manifest", "{}"),
            parse_constant=_no_constant,
            object_pairs_hook=_once,
        )
    except RecursionError as error:
        raise DataInvalid("the manifest in the header nests too deep") from error
    if not isinstance(found, dict):
        raise DataInvalid("the manifest in the header must be a JSON object")
    return found


def _no_constant(name: str) -> None:
    # Python reads NaN and Infinity; JSON has neither and save refuses them.
    raise DataInvalid(f"the manifest in the header holds {name}, which is not JSON")


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python keeps the last of equal keys; another reader may keep the first.
    found = dict(items)
    if len(found) < len(items):
        raise DataInvalid("the manifest in the header names a key twice")
    return found


def pack_text(texts: list[str]) -> tuple[Array, Array]:
    """Return UTF-8 bytes [total] uint8 and offsets [n + 1] int64: text as tensors."""
    encoded = [text.encode() for text in texts]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets


def unpack_text(data: Array, offsets: Array) -> list[str]:
    """Undo pack_text.

    Raises:
        DataInvalid: the two were not made by pack_text: types, order, bounds or UTF-8.
    """
    typed = data.dtype == np.uint8 and offsets.dtype == np.int64
    if not typed or data.ndim != 1 or offsets.ndim != 1 or len(offsets) < 1:
        raise DataInvalid("packed text: needed uint8 [total] and int64 offsets [n + 1]")
    if offsets[0] != 0 or offsets[-1] != len(data) or (offsets[1:] < offsets[:-1]).any():
        raise DataInvalid(f"packed text: offsets must rise from 0 to {len(data)}")
    raw = data.tobytes()
    bounds = offsets.tolist()
    try:
        return [raw[a:b].decode() for a, b in itertools.pairwise(bounds)]
    except UnicodeDecodeError as error:
        raise DataInvalid(f"packed text: not UTF-8 ({error})") from error
