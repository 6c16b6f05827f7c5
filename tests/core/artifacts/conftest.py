"""How these tests read a file: here where speed counts, in the sandbox where it matters."""

from collections.abc import Callable
from pathlib import Path

import pytest

from core.artifacts.importers import sniff
from core.artifacts.limits import Limits
from core.artifacts.sandbox import Imported, import_file

Reader = Callable[..., Imported]


def read_here(data: bytes, folder: Path, *, limits: Limits | None = None) -> Imported:
    """Import without the sandbox; leaves out.safetensors in ``folder``."""
    source, target, scratch = folder / "source", folder / "out.safetensors", folder / "scratch"
    source.write_bytes(data)
    scratch.mkdir()
    found = sniff.read(source, target, scratch=scratch, limits=limits or Limits())
    return Imported(target, found.format, "x", "y", found.meta, found.notes)


def read_sandboxed(
    data: bytes, folder: Path, *, limits: Limits | None = None, file_name: str = "toy.zip"
) -> Imported:
    """Import through the sandbox with a work folder of its own, ``folder/work``."""
    source, workdir = folder / "upload", folder / "work"
    source.write_bytes(data)
    workdir.mkdir(exist_ok=True)
    return import_file(source, file_name=file_name, workdir=workdir, limits=limits)


@pytest.fixture
def here(tmp_path: Path) -> Reader:
    return lambda data, **options: read_here(data, tmp_path, **options)


@pytest.fixture
def sandboxed(tmp_path: Path) -> Reader:
    return lambda data, **options: read_sandboxed(data, tmp_path, **options)
