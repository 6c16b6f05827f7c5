"""A teacher's embeddings from a PyTorch checkpoint (.pt), read without torch and without pickle."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from core.artifacts.importers import embeddings, restricted_pickle
from core.artifacts.importers.archive import open_member, open_zip
from core.artifacts.importers.torch_values import TORCH, StoredTensor
from core.artifacts.limits import Budget
from core.errors import DataInvalid, TooLarge
from core.tensors.manifests import shown
from core.tensors.shards import Array

Members = Mapping[str, tuple[ZipFile, str]]
MODEL = "model_state"
"""Weights of the network that made the embeddings: known, and not part of them."""


def looks_like(names: Collection[str]) -> bool:
    """Tell whether a zip with these members was written by ``torch.save``."""
    return any(f"{name.removesuffix('data.pkl')}version" in names for name in _pickles(names))


def from_zip(source: Path, target: Path, *, budget: Budget) -> tuple[dict[str, Any], list[str]]:
    """Read a .pt with a dict that holds ``embeddings``, write ``target``; return meta and notes.

    Optional beside them: inputs (a tensor), ids, groups, texts (lists of text or whole numbers).

    Raises:
        DataInvalid: anything else in it, or a pickle that asks for more than tensors and data.
        TooLarge: a limit was passed.
    """
    with open_zip(source, budget) as members:
        archive = _Archive.of(members, budget)
        found = restricted_pickle.loads(
            archive.read("data.pkl", at_most=budget.limits.pickle_bytes),
            limits=budget.limits,
            dialect=TORCH,
        )
        values, notes = _wanted(found)
        for name, value in values.items():
            if isinstance(value, StoredTensor):
                values[name] = archive.tensor(name, value)
                if value.storage.code == "bfloat16":
                    notes.append(f"{name}: bfloat16, widened to float32 (exactly)")
    return embeddings.write(target, values, notes=notes)


def _pickles(names: Collection[str]) -> list[str]:
    return [name for name in names if name.endswith("/data.pkl")]


def _wanted(found: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of stored embeddings, and notes on the rest."""
    if not isinstance(found, dict) or embeddings.NEEDED not in found:
        raise DataInvalid(
            f"the PyTorch checkpoint holds {_told(found)}; needed a dict with 'embeddings' "
            f"[rows, dim], and optional {', '.join(embeddings.OPTIONAL)}, {MODEL}"
        )
    fields = (embeddings.NEEDED, *embeddings.OPTIONAL)
    there = (name for name in fields if name in found)
    values = {
        name: found[name]
        for name in there
        if not (found[name] is None and name in embeddings.OPTIONAL)
    }
    for name in (embeddings.NEEDED, "inputs"):
        if name in values and not isinstance(values[name], StoredTensor | np.ndarray):
            what = type(values[name]).__name__
            raise DataInvalid(f"{name}: a {what}; needed a tensor [rows, dim]")
    rest = sorted(str(name) for name in found if name not in (*fields, MODEL))
    notes = embeddings.ignored(rest)
    if found.get(MODEL) is not None:
        notes.insert(0, f"{MODEL} is left out: embeddings are looked up, no network is run")
    return values, notes


def _told(found: Any) -> str:
    if isinstance(found, dict):
        return ", ".join(shown(name) for name in list(found)[:12]) or "an empty dict"
    return "one tensor" if isinstance(found, StoredTensor) else f"a {type(found).__name__}"


@dataclass(frozen=True)
class _Archive:
    """The members of one checkpoint, by their names inside its folder."""

    members: Members
    root: str
    budget: Budget

    @classmethod
    def of(cls, members: Members, budget: Budget) -> _Archive:
        """Find the one folder that all lies in."""
        found = _pickles(members)
        if len(found) != 1:
            raise DataInvalid(f"the .pt holds {len(found)} data.pkl; needed one")
        return cls(members, found[0].removesuffix("data.pkl"), budget)

    @property
    def byte_order(self) -> str:
        """Return ``little`` or ``big``; older files name none and are little."""
        if f"{self.root}byteorder" not in self.members:
            return "little"
        order = self.read("byteorder", at_most=16).decode("latin-1")
        if order not in ("little", "big"):
            raise DataInvalid(f"the .pt's byteorder is {order!r:.40}; needed little or big")
        return order

    def tensor(self, name: str, tensor: StoredTensor) -> Array:
        """Return one tensor, its storage checked against what the pickle says of it."""
        storage = tensor.storage
        needed = storage.numel * storage.item_bytes
        data = self.read(f"data/{storage.key}", at_most=self.budget.limits.member_bytes)
        if len(data) != needed:
            raise DataInvalid(
                f"{name}: its storage has {len(data)} bytes, {storage.numel} numbers need {needed};"
                " the file is truncated or damaged"
            )
        return tensor.of(data, byte_order=self.byte_order)

    def read(self, name: str, *, at_most: int) -> bytes:
        """Return a member's bytes, counted against the budget."""
        whole_name = self.root + name
        if whole_name not in self.members:
            raise DataInvalid(f"the .pt lacks {whole_name[:100]!r}; save it again")
        with open_member(self.members[whole_name]) as (stream, size_bytes):
            if size_bytes > at_most:
                raise TooLarge(f"{whole_name[:100]}: {size_bytes} bytes; the limit is {at_most}")
            self.budget.spend(size_bytes, whole_name[:100])
            return stream.read(size_bytes)
