"""One server per data folder: a lock that the kernel drops however the server ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DataDirBusy(RuntimeError):
    """Another server holds the data folder."""


@contextmanager
def only_server(data_dir: Path) -> Iterator[None]:
    """Hold ``data_dir`` for this process, or raise DataDirBusy that names the holder."""
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / "still.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip() or "unknown"
            told = f"another server (process {holder}) uses {data_dir}; stop it, or set"
            raise DataDirBusy(f"{told} STILL_DATA_DIR to another folder") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
