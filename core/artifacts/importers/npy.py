"""Reads .npz tables without numpy's loader, each array through ``core.tensors.npy``."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from core.artifacts.importers.archive import open_member, open_zip
from core.artifacts.limits import Budget
from core.errors import DataInvalid
from core.tensors.npy import read_array
from core.tensors.shards import Array


@dataclass(frozen=True)
class Table:
    """The arrays of an .npz that were asked for, and the names of those that were not."""

    arrays: dict[str, Array]
    ignored: list[str] = field(default_factory=list)


def read_npz(path: Path, *, wanted: Collection[str], name: str, budget: Budget) -> Table:
    """Read the wanted arrays of an .npz; those absent are absent from the answer."""
    arrays: dict[str, Array] = {}
    ignored: list[str] = []
    with open_zip(path, budget) as members:
        for member_name, member in members.items():
            key = member_name.removesuffix(".npy")
            if key not in wanted:
                ignored.append(key)
                continue
            if key in arrays:
                raise DataInvalid(f"{name}: {key!r} is in the file twice")
            with open_member(member) as (stream, size_bytes):
                array = read_array(stream, size_bytes=size_bytes, name=f"{name}: {key}")
            budget.spend(size_bytes, f"{name}: {key}")
            arrays[key] = array
    return Table(arrays, sorted(ignored))
