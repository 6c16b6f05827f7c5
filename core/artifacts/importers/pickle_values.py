"""What a pickle of plain data may name and build. Each entry of the table makes data, no more."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.errors import DataInvalid
from core.tensors.npy import check_shape, parse_dtype
from core.tensors.shards import Array

ALLOWED = "allowed: dict, list, tuple, set, text, bytes, numbers, None, numpy arrays, paths"

_HASHABLE = (str, bytes, int, float, complex, type(None), np.generic)


class Global:
    """A name the pickle mentions and this reader knows."""

    def __init__(self, name: str) -> None:
        self.name = name


class Dtype:
    """A dtype while it is built: its code first, its byte order later."""

    def __init__(self, code: str) -> None:
        self.code = code

    def build(self, state: Any) -> None:
        """Take (version, byte order, and only Nones about fields), as numpy writes it."""
        if not isinstance(state, tuple) or len(state) != 8 or state[2:5] != (None, None, None):
            raise DataInvalid("the pickle holds a structured or unknown numpy dtype")
        if state[1] not in ("<", ">", "=", "|"):
            raise DataInvalid("the pickle holds a numpy dtype without a byte order")
        self.code = state[1] + self.code.lstrip("<>=|")

    def numpy(self) -> np.dtype[Any]:
        """Return the dtype, or raise DataInvalid for objects and the rest."""
        return parse_dtype(self.code, name="a numpy array in the pickle")


class PendingArray:
    """An array while it is built: named first, filled later."""

    _value: Array | None = None

    def build(self, state: Any) -> None:
        """Take (version, shape, dtype, fortran order, raw bytes), as numpy writes it."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise DataInvalid("the pickle holds a numpy array in an unknown layout")
        _, shape, dtype, fortran, raw = state
        self._value = _array(raw, dtype, shape, "F" if fortran else "C")

    def finished(self) -> Array:
        """Return the array, or raise DataInvalid where it was never filled."""
        if self._value is None:
            raise DataInvalid("the pickle is damaged: a numpy array without content")
        return self._value


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> Array:
    if not isinstance(dtype, Dtype):
        raise DataInvalid("the pickle holds a numpy array without a dtype")
    plain = dtype.numpy()
    sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not sizes or not isinstance(raw, bytes | bytearray) or order not in ("C", "F"):
        raise DataInvalid("the pickle holds a numpy array in an unknown layout")
    check_shape(shape, itemsize=plain.itemsize, size_bytes=len(raw), name="a numpy array")
    array = np.frombuffer(raw, plain).reshape(shape, order=order)
    return array.astype(plain.newbyteorder("="), copy=False)


def _scalar(dtype: Any, raw: Any) -> np.generic:
    value: np.generic = _array(raw, dtype, (1,), "C")[0]
    return value


def _dtype(code: Any, *_: Any) -> Dtype:
    if not isinstance(code, str):
        raise DataInvalid("the pickle holds an unknown numpy dtype")
    return Dtype(code)


def _reconstruct(kind: Any, *_: Any) -> PendingArray:
    if not isinstance(kind, Global) or not kind.name.endswith(" ndarray"):
        raise DataInvalid("the pickle holds a subclass of a numpy array; save plain arrays")
    return PendingArray()


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise DataInvalid("the pickle holds a path whose parts are not text")
    return "/".join(parts).replace("//", "/", 1)


def _encode(text: Any, encoding: Any) -> bytes:
    # How protocols 0 to 2 write bytes.
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise DataInvalid("the pickle encodes bytes in an unknown way")
    return text.encode("latin-1")


def _bytes(kind: type[Any]) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        if len(args) > 1 or not all(isinstance(arg, bytes) for arg in args):
            raise DataInvalid(f"the pickle builds {kind.__name__} in an unknown way")
        return kind(*args)

    return make


def _collect(kind: type[Any]) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        if len(args) > 1 or not all(isinstance(arg, list | tuple) for arg in args):
            raise DataInvalid(f"the pickle builds a {kind.__name__} in an unknown way")
        if kind in (set, frozenset):
            check_keys(args[0] if args else ())
        return kind(*args)

    return make


def _complex(real: Any, imaginary: Any) -> complex:
    if not all(isinstance(part, float | int) for part in (real, imaginary)):
        raise DataInvalid("the pickle builds a complex number in an unknown way")
    return complex(real, imaginary)


def _empty_dict(*args: Any) -> dict[Any, Any]:
    if args:
        raise DataInvalid("the pickle builds an ordered dict in an unknown way; save a dict")
    return {}


_BUILTINS: dict[str, Callable[..., Any]] = {
    "bytes": _bytes(bytes),
    "bytearray": _bytes(bytearray),
    "set": _collect(set),
    "frozenset": _collect(frozenset),
    "list": _collect(list),
    "tuple": _collect(tuple),
    "complex": _complex,
}
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
CALLS: dict[str, Callable[..., Any]] = {
    **{
        f"{module} {name}": call
        for module in ("builtins", "__builtin__")
        for name, call in _BUILTINS.items()
    },
    **{f"{module} {name}": _path for module in ("pathlib", "pathlib._local") for name in _PATHS},
    **{
        f"numpy.{core}.multiarray {name}": call
        for core in ("core", "_core")
        for name, call in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    },
    **{f"numpy.{core}.numeric _frombuffer": _array for core in ("core", "_core")},
    "numpy dtype": _dtype,
    "collections OrderedDict": _empty_dict,
    "_codecs encode": _encode,
}
"""What may be called, by the name in the pickle. Each entry builds data and nothing else."""

NAMED_ONLY = ("numpy ndarray",)


@dataclass(frozen=True)
class Dialect:
    """What pickles of one sort of file may say."""

    calls: Mapping[str, Callable[..., Any]]
    """By the name in the pickle; each builds data and nothing else."""
    named_only: tuple[str, ...]
    """Known names that only other calls look at."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Names that stand for a text."""
    persistent: Callable[[Any], Any] | None = None
    """Turns a persistent id into data; None: persistent ids are refused."""
    skips_attributes: bool = False
    """Whether attributes set on a dict are read over: torch notes versions of modules there."""
    allowed: str = ALLOWED
    """What to save instead, in words."""


PLAIN = Dialect(CALLS, NAMED_ONLY)


def check_keys(keys: Iterable[Any]) -> None:
    """Raise DataInvalid unless hashing is quick: scalars, or short flat tuples of scalars."""
    for key in keys:
        parts = key if isinstance(key, tuple) and len(key) <= 8 else (key,)
        if not all(isinstance(part, _HASHABLE) for part in parts):
            raise DataInvalid(
                f"the pickle uses a {type(key).__name__} as a key; use text or numbers"
            )
