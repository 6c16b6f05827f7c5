"""What a PyTorch checkpoint's pickle may name beside plain data: tensors, told by their storages.

Nothing here is torch: a tensor is its storage's key and a view, read later and only if wanted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.artifacts.importers.pickle_values import ALLOWED, CALLS, NAMED_ONLY, Dialect, Global
from core.errors import DataInvalid
from core.tensors.shards import Array

_STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "b1",
}
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    "bool",
)


@dataclass(frozen=True)
class Storage:
    """A run of numbers in a member of the archive."""

    key: str
    code: str
    """Of numpy, without byte order; or ``bfloat16``."""
    numel: int

    @property
    def item_bytes(self) -> int:
        """What one number takes."""
        return 2 if self.code == "bfloat16" else np.dtype(self.code).itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage, inside its bounds and of no more numbers than it has."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, data: bytes, *, byte_order: str) -> Array:
        """Return the tensor from its storage's bytes: C order, native; bfloat16 as float32.

        Args:
            data: exactly numel * item_bytes.
            byte_order: ``little`` or ``big``, of the file.
        """
        mark = "<" if byte_order == "little" else ">"
        if self.storage.code == "bfloat16":
            raw = np.frombuffer(data, f"{mark}u2").astype(np.uint32) << np.uint32(16)
            flat = raw.view(np.float32)
        else:
            dtype = np.dtype(mark + self.storage.code)
            native = dtype.newbyteorder("<" if sys.byteorder == "little" else ">")
            flat = np.frombuffer(data, dtype).astype(native, copy=False)
        steps = tuple(step * flat.itemsize for step in self.stride)
        view = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, steps)
        return np.array(view, order="C")


def _persistent(told: Any) -> Storage:
    """Return the storage that torch wrote beside the pickle: never a file, never another name."""
    known = isinstance(told, tuple) and len(told) == 5 and told[0] == "storage"
    if not known or not isinstance(told[1], Global) or not isinstance(told[2], str):
        raise DataInvalid("the pickle refers to something beside it that is no torch storage")
    code = _STORAGES.get(told[1].name.removeprefix("torch "))
    if code is None or type(told[4]) is not int or told[4] < 0:
        raise DataInvalid("the pickle refers to a torch storage of an unknown type or size")
    return Storage(told[2], code, told[4])


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
    # What follows: requires_grad, hooks, and in newer files a dict of Python attributes.
    if not isinstance(storage, Storage) or len(rest) > 3:
        raise DataInvalid("the pickle builds a tensor in an unknown way; save plain dense tensors")
    sizes = (offset, *_tuple(shape), *_tuple(stride))
    if len(shape) != len(stride) or len(shape) > 8:
        raise DataInvalid("the pickle holds a tensor whose shape and stride do not fit")
    if not all(type(size) is int and 0 <= size < 2**48 for size in sizes):
        raise DataInvalid("the pickle holds a tensor of an impossible size")
    count = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if count > storage.numel:
        raise DataInvalid(
            f"the pickle holds a tensor of shape {list(shape)} over {storage.numel} stored "
            "numbers: an expanded view; save it with .contiguous()"
        )
    if count and last >= storage.numel:
        raise DataInvalid("the pickle holds a tensor that reaches past its storage")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _tuple(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise DataInvalid("the pickle holds a tensor without a shape")
    return value


def _parameter(data: Any, *rest: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor) or len(rest) != 2:
        raise DataInvalid("the pickle builds a parameter in an unknown way; save plain tensors")
    return data


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sizes, tuple | list) or not all(type(size) is int for size in sizes):
        raise DataInvalid("the pickle builds a torch.Size in an unknown way")
    return tuple(sizes)


def _device(*parts: Any) -> str:
    if not parts or not all(type(part) in (str, int) for part in parts):
        raise DataInvalid("the pickle builds a torch.device in an unknown way")
    return ":".join(map(str, parts))


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch Size": _size,
    "torch device": _device,
}

TORCH = Dialect(
    calls={**CALLS, **_CALLS},
    named_only=(*NAMED_ONLY, *(f"torch {name}" for name in _STORAGES)),
    texts={f"torch {name}": name for name in _DTYPES},
    persistent=_persistent,
    skips_attributes=True,
    allowed=f"{ALLOWED}, dense torch tensors and their state dicts",
)
"""The pickle in a .pt: plain data, tensors and what torch writes beside them."""
