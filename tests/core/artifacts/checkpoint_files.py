"""Checkpoints as torch writes them, and what may be changed in one."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any

import torch

from tests.core.artifacts.hostile_pickles import P2, call, text

VECTORS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def saved(content: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def rewritten(data: bytes, changes: dict[str, bytes | None]) -> bytes:
    """Return a zip with some members, by the end of their names, changed, left out or added."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        members = {name: old.read(name) for name in old.namelist()}
        root = next(iter(members)).split("/")[0]
        for name, content in changes.items():
            members[f"{root}/{name}"] = content or b""
            if content is None:
                del members[f"{root}/{name}"]
        for name, content in members.items():
            new.writestr(name, content)
    return out.getvalue()


SOUND = saved({"embeddings": VECTORS})


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tensor_pickle(
    *,
    key: str = "0",
    storage: bytes = b"ctorch\nFloatStorage\n",
    numel: int = 24,
    offset: int = 0,
    shape: tuple[int, ...] = (4, 6),
    stride: tuple[int, ...] = (6, 1),
) -> bytes:
    """Return {"embeddings": a tensor} as torch writes it, with anything in it."""
    told = b"(" + text("storage") + storage + text(key) + text("cpu") + number(numel) + b"tQ"
    sizes = [b"(" + b"".join(map(number, each)) + b"t" for each in (shape, stride)]
    empty = b"ccollections\nOrderedDict\n)R"
    tensor = call("torch._utils _rebuild_tensor_v2", told, number(offset), *sizes, b"\x89", empty)
    return P2 + b"}" + text("embeddings") + tensor + b"s."
