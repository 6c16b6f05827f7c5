"""What libraries raise over a stranger's file, said as an error of that file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from core.errors import DataInvalid

T = TypeVar("T")


def loaded(what: Any, folder: Path, name: str) -> Any:
    """Load one of transformers' classes from files that are here alone; it runs nobody's code.

    Args:
        what: the class.
        folder: of a model.
        name: of the file that is read, for the message.

    Raises:
        DataInvalid: it does not load.
    """
    return said(name, lambda: what.from_pretrained(folder, local_files_only=True))


def said(name: str, make: Callable[[], T]) -> T:
    """Return what a library makes of a file; whatever it raises is said of the file.

    Raises:
        DataInvalid: it raised anything.
    """
    try:
        return make()
    except BaseException as error:
        # A panic of the tokenizers library, which is in Rust, is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        told = " ".join(str(error).split())[:300]
        raise DataInvalid(f"{name}: transformers refuses it: {told}") from error
