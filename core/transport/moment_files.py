"""The file that a chunk of a capture leaves: its sums, read back one place at a time and added.

Tensors are named ``attention.3.xy``, ``neurons.3.sum_x``, ``heads.3.xx``; the manifest says which
models and texts they are of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from core.errors import DataInvalid
from core.tensors import shards
from core.transport.moments import Captured, HeadMoments, Moments, NeuronMoments

FORMAT, VERSION = "moments", 1
BLOCK_BYTES = 1 << 24
Sums = TypeVar("Sums", Moments, NeuronMoments, HeadMoments)


def save_moments(path: Path, captured: Captured, *, facts: Mapping[str, Any]) -> None:
    """Write a chunk's sums, 16 MiB at a time; equal arguments give equal bytes.

    Args:
        path: a .safetensors.
        captured: of ``capture``.
        facts: JSON values for the manifest, under their own keys: what must be equal in all files
            that are added, such as the ledger's ``run_id`` and the layer map.
    """
    first = next(iter(captured.sites.values()))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "widths": [len(first.sum_x), len(first.sum_y)],
        "sites": list(captured.sites),
        "neurons": sorted(captured.neurons),
        "heads": sorted(captured.heads),
        "facts": dict(facts),
    }
    streams = {
        f"{name}.{what}": shards.Stream(np.dtype("float64"), tuple(sums.shape), _blocks(sums))
        for name, found in captured.sums()
        for what, sums in found.tensors().items()
    }
    shards.save_streams(path, streams, manifest)


def load_manifest(path: Path) -> dict[str, Any]:
    """Read what a file says of itself: ``widths``, ``sites``, ``neurons``, ``heads``, ``facts``.

    Raises:
        DataInvalid: not a file of moments.
    """
    found = shards.load_manifest(path)
    told = (found.get("format"), found.get("version"))
    if told != (FORMAT, VERSION):
        raise DataInvalid(f"manifest: {told}; needed format {FORMAT!r}, version {VERSION}")
    return found


def check_files(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the manifest that all files share.

    Raises:
        DataInvalid: there is no file, or two are not of one capture: they cannot be added.
    """
    if not paths:
        raise DataInvalid("moments: no file; needed one or more of one capture")
    first = load_manifest(paths[0])
    for number, path in enumerate(paths[1:], start=1):
        other = load_manifest(path)
        for key, value in first.items():
            if other.get(key) != value:
                raise DataInvalid(
                    f"moments: file {number} has other {key} than file 0 "
                    f"({str(other.get(key))[:80]}, {str(value)[:80]}); needed those of one capture"
                )
    return first


def sum_site(paths: Sequence[Path], site: str) -> Moments:
    """Add one site's moments over files, in their order; memory is that of two such.

    Raises:
        DataInvalid: a file lacks them, or has them in another shape.
    """
    return _sum(paths, site, Moments)


def sum_neurons(paths: Sequence[Path], layer: int) -> NeuronMoments:
    """Add one layer's moments of activations over files, in their order.

    Raises:
        DataInvalid: a file lacks them, or has them in another shape.
    """
    return _sum(paths, f"neurons.{layer}", NeuronMoments)


def sum_heads(paths: Sequence[Path], layer: int) -> HeadMoments:
    """Add one layer's products of attention maps over files, in their order.

    Raises:
        DataInvalid: a file lacks them, or has them in another shape.
    """
    return _sum(paths, f"heads.{layer}", HeadMoments)


def _sum(paths: Sequence[Path], name: str, sort: type[Sums]) -> Sums:
    if not paths:
        raise DataInvalid(f"{name}: no file of moments; needed one or more of one capture")
    return reduce(add, (_read(path, name, sort) for path in paths))


def _read(path: Path, name: str, sort: type[Sums]) -> Sums:
    names = [field.name for field in fields(sort)]
    tensors, _ = shards.load(path, only=[f"{name}.{what}" for what in names])
    found = sort(*(torch.from_numpy(tensors[f"{name}.{what}"]) for what in names))
    for what, sums in found.tensors().items():
        if sums.dtype != torch.float64 or tuple(sums.shape) != found.shapes()[what]:
            raise DataInvalid(
                f"{name}.{what}: {sums.dtype} {list(sums.shape)}; needed float64 "
                f"{list(found.shapes()[what])}"
            )
        if not torch.isfinite(sums).all():
            raise DataInvalid(f"{name}.{what}: holds numbers that are not finite")
    return found


def _blocks(sums: Tensor) -> Iterator[np.ndarray]:
    if not sums.ndim:
        yield sums.cpu().numpy()
        return
    row_bytes = max(1, sums[:1].numel()) * 8
    for part in sums.split(max(1, BLOCK_BYTES // row_bytes)):
        yield part.cpu().numpy()
