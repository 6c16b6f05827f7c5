"""Reads a teacher's checkpoint, a local .pt or .safetensors. Nothing in it is executed."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from core.errors import DataInvalid, SpecInvalid
from core.tensors.embeddings import LABELS, read_labels
from core.tensors.manifests import shown

_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
)
"""What torch and safetensors raise for files that are damaged, foreign or hostile."""


def load_teacher_checkpoint(
    checkpoint_path: str | Path, device: str = "cpu", teacher_dim: int | None = None
) -> dict[str, Any]:
    """Read a teacher's stored embeddings and what belongs to them (document 004).

    A .pt is read by ``torch.load(weights_only=True)``, which builds tensors and plain containers
    alone; a .safetensors may hold texts as this service packs them. Which one it is says the
    file, not its name.

    Args:
        checkpoint_path: of a dict with ``embeddings``, in a .pt, or of a .safetensors with it.
        device: where tensors go: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``.
        teacher_dim: the width that is expected; None: any.

    Returns:
        ``embeddings`` [n >= 1, D >= 2] float32, no zero row, whatever floating dtype the file has;
        and of these what the file holds: ``inputs`` [n, d] float32 likewise, ``ids`` (unique),
        ``groups``, ``texts`` (lists of n str), ``model_state`` (a dict, its dense tensors as they
        are). Other entries are left out.

    Raises:
        DataInvalid: no such file, one that cannot be read without running code, a field that is
            missing or malformed, or another width; the message names the path and the field.
        SpecInvalid: the device or teacher_dim.
    """
    place = resolve_device(device)
    if teacher_dim is not None and (type(teacher_dim) is not int or teacher_dim < 1):
        raise SpecInvalid(
            f"teacher_dim {teacher_dim!r}; allowed: null or a whole number from 1",
            pointer="/teacher_dim",
        )
    path = _file(checkpoint_path)
    try:
        return _checked(_read(path), place, teacher_dim)
    except DataInvalid as error:
        raise DataInvalid(f"{path}: {error.message}", pointer="/checkpoint_path") from error


def resolve_device(device: str) -> torch.device:
    """Return the device of a name; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        SpecInvalid: the name is unknown, or this machine has no such device.
    """
    there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    allowed = ["auto", *there, *(["cuda"] if len(there) > 1 else [])]
    if device not in allowed:
        raise SpecInvalid(
            f"device {device!r}; this machine has: {', '.join(allowed)}", pointer="/device"
        )
    if device == "auto":
        return torch.device(there[-1] if len(there) == 1 else "cuda")
    return torch.device(device)


def _file(path: Any) -> Path:
    if not isinstance(path, str | Path) or not Path(path).is_file():
        raise DataInvalid(
            f"checkpoint_path {str(path)!r}: no such file; needed a .pt or .safetensors",
            pointer="/checkpoint_path",
        )
    return Path(path)


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        head = file.read(10)
    try:
        if head[8:9] == b"{":
            return _unpacked(load_file(path))
        with warnings.catch_warnings():
            # Of pickle protocols that it may not know; where it does not, it raises.
            warnings.simplefilter("ignore", UserWarning)
            found = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise DataInvalid(
            "not a checkpoint of tensors and plain values, which is all that is read (no code is "
            f"run): {_said(error)}"
        ) from error
    if not isinstance(found, dict):
        raise DataInvalid(f"holds a {type(found).__name__}; needed a dict with 'embeddings'")
    return found


def _said(error: Exception) -> str:
    """Return what a reader found, without torch's advice to run the file's code after all."""
    said = str(error)
    if named := re.search(r"GLOBAL ([\w.]{1,200})", said):
        return f"it names {named[1]}"
    said = said.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    return f"{said:.200}" or type(error).__name__


def _unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the tensors of a .safetensors with packed text as lists."""
    arrays = {
        name: tensors[name].numpy()
        for label in LABELS
        for name in (label, f"{label}_offsets")
        if name in tensors
    }
    texts = {name: read_labels(arrays, name) for name in LABELS}
    plain = {name: tensor for name, tensor in tensors.items() if name not in arrays}
    return {**plain, **{name: labels for name, labels in texts.items() if labels is not None}}


def _checked(found: Mapping[str, Any], place: torch.device, dim: int | None) -> dict[str, Any]:
    if "embeddings" not in found:
        there = ", ".join(sorted(str(name)[:40] for name in found)[:12]) or "nothing"
        raise DataInvalid(f"embeddings: missing; the file holds {there}")
    embeddings = _vectors("embeddings", found["embeddings"])
    rows, width = embeddings.shape
    if dim is not None and width != dim:
        raise DataInvalid(f"embeddings: {width} dimensions; teacher_dim is {dim}")
    kept: dict[str, Any] = {"embeddings": embeddings.to(place)}
    if "inputs" in found:
        inputs = _vectors("inputs", found["inputs"])
        if len(inputs) != rows:
            raise DataInvalid(f"inputs: {len(inputs)} rows for {rows} embeddings")
        kept["inputs"] = inputs.to(place)
    for name in LABELS:
        if found.get(name) is not None:
            kept[name] = _texts(name, found[name], rows)
    twice = [name for name, count in Counter(kept.get("ids", ())).items() if count > 1]
    if twice:
        raise DataInvalid(f"ids: {shown(twice[0])} appears more than once; make ids unique")
    if found.get("model_state") is not None:
        kept["model_state"] = _state(found["model_state"], place)
    return kept


def _vectors(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise DataInvalid(f"{name}: a {type(value).__name__}; needed a tensor [rows, dim]")
    # Of some kinds of tensor even the shape cannot be asked for.
    if odd := _oddity(value):
        raise DataInvalid(f"{name}: {odd}; needed a dense tensor [rows >= 1, dim >= 2]")
    if value.ndim != 2 or not len(value) or value.shape[1] < 2:
        raise DataInvalid(f"{name}: shape {list(value.shape)}; needed [rows >= 1, dim >= 2]")
    if not value.is_floating_point():
        raise DataInvalid(f"{name}: dtype {value.dtype}; needed a floating one")
    narrow = value.detach().float()
    finite = narrow.isfinite().all(1)
    if not finite.all():
        row = int(finite.int().argmin())
        raise DataInvalid(f"{name}: row {row} holds NaN or infinity (in float32); remove it")
    some = narrow.any(1)
    if not some.all():
        row = int(some.int().argmin())
        raise DataInvalid(
            f"{name}: row {row} is all zeros (in float32); a direction is needed, remove it"
        )
    return narrow


def _oddity(tensor: Tensor) -> str | None:
    """Return what makes a tensor more than numbers that the file holds, None where nothing does."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    if tensor.layout != torch.strided:
        return f"of layout {tensor.layout}"
    if tensor.is_quantized:
        return "a quantised tensor"
    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > stored:
        return f"shape {list(tensor.shape)} over {stored} stored numbers, an expanded view"
    return None


def _texts(name: str, value: Any, rows: int) -> list[str]:
    if isinstance(value, Tensor):
        if odd := _oddity(value):
            raise DataInvalid(f"{name}: {odd}; needed a list of text")
        if value.ndim == 1 and not value.is_floating_point():
            value = value.tolist()
    listed = isinstance(value, list | tuple)
    if not listed or not all(type(item) in (str, int) for item in value):
        raise DataInvalid(f"{name}: a {type(value).__name__}; needed a list of text")
    if len(value) != rows:
        raise DataInvalid(f"{name}: {len(value)} entries for {rows} embeddings")
    return [str(item) for item in value]


def _state(value: Any, place: torch.device) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise DataInvalid(f"model_state: a {type(value).__name__}; needed a dict by name")
    for name, item in value.items():
        if isinstance(item, Tensor) and (odd := _oddity(item)):
            raise DataInvalid(f"model_state: {shown(name)} is {odd}; needed dense tensors")
    return {
        name: item.to(place) if isinstance(item, Tensor) else item for name, item in value.items()
    }
