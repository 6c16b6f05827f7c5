"""What is sent for a path: the file itself, or one .tar of ``NAME.pkl`` and folder ``NAME/``."""

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.errors import NotUploadable


@contextmanager
def packed(path: Path) -> Iterator[Path]:
    """Yield the one file to send; a made .tar lives as long as the context.

    The .tar is a function of the names and bytes alone, so that a second run finds the upload
    the first one began.
    """
    pair = _pair(path)
    if pair is None:
        if not path.is_file():
            raise NotUploadable(f"{path} is not a file")
        yield path
        return
    pickle, folder = pair
    with tempfile.TemporaryDirectory(prefix="still-upload-") as made:
        tar = Path(made) / f"{folder.name}.tar"
        _write(tar, pickle, folder)
        yield tar


def _pair(path: Path) -> tuple[Path, Path] | None:
    """Return ``NAME.pkl`` and ``NAME/`` where ``path`` is one of the two and both are there."""
    path = path.resolve() if path.name in {"", ".", ".."} else path
    if path.is_dir():
        pickle, folder = path.with_name(path.name + ".pkl"), path
        if not pickle.is_file():
            raise NotUploadable(f"{path} is a folder, and there is no {pickle.name} beside it")
        return pickle, folder
    if path.suffix == ".pkl" and path.with_suffix("").is_dir():
        return path, path.with_suffix("")
    return None


def _write(tar: Path, pickle: Path, folder: Path) -> None:
    members = {pickle.name: pickle}
    for file in folder.rglob("*"):
        if file.is_file():
            members[f"{folder.name}/{file.relative_to(folder).as_posix()}"] = file
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(members):
            info = tarfile.TarInfo(name)
            info.size = members[name].stat().st_size
            with members[name].open("rb") as content:
                archive.addfile(info, content)
