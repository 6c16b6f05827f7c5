"""A .safetensors file: pairs, embeddings, or of a format of our own; checked, in one form."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.artifacts.importers import caches, codebook, embeddings, pairs, prompts
from core.artifacts.limits import Limits
from core.errors import DataInvalid, TooLarge
from core.tensors import shards
from core.tensors.formats import load_federated, save_federated
from core.tensors.lda import load_lda, save_lda
from core.tensors.manifests import shown
from core.tensors.npy import check_shape

_ITEM_BYTES = {"F16": 2, "F32": 4, "F64": 8, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4,
               "U32": 4, "I64": 8, "U64": 8, "BOOL": 1}  # fmt: skip


def looks_like(head: bytes) -> bool:
    """Tell whether a file starts like .safetensors: a length, then a JSON object."""
    return len(head) >= 10 and head[8:9] == b"{" and head[6:8] == b"\0\0"


def from_file(
    source: Path, target: Path, *, limits: Limits
) -> tuple[str, dict[str, Any], list[str]]:
    """Read, check and rewrite; return the format, the meta and notes.

    Who sends a federated model may claim anything of its ``pairs`` and held-out rows that has the
    right form; see ``Federated.manifest``.
    """
    names = check_header(source, limits=limits)
    told = shards.load_manifest(source).get("format")
    if told is not None and not isinstance(told, str):
        raise DataInvalid(f"manifest: format is {shown(told)}; needed a name such as 'pairs'")
    if isinstance(told, str) and told in _OURS:
        return told, *_OURS[told](source, target)
    for what, format_name in caches.FORMATS.items():
        if told == format_name:
            return caches.from_tensors(source, target, what=what, limits=limits)
    if set(pairs.NEEDED) <= names and "rotations" not in names:
        tensors, _ = shards.load(source)
        return "pairs", *pairs.from_tensors(target, tensors)
    if embeddings.looks_like(names):
        return "embeddings", *embeddings.from_tensors(source, target)
    raise DataInvalid(
        f"the .safetensors holds {', '.join(sorted(names)[:12]) or 'nothing'}; needed pairs "
        "(query_embeddings, target_embeddings), embeddings, or a federated_model, lda_model, "
        "codebook, prompts, bivectors_cache or targets_cache written by this service"
    )


def _federated(source: Path, target: Path) -> tuple[dict[str, Any], list[str]]:
    model = load_federated(source)
    save_federated(target, model)
    return model.meta(), []


def _lda(source: Path, target: Path) -> tuple[dict[str, Any], list[str]]:
    model = load_lda(source)
    save_lda(target, model)
    return model.meta(), []


_OURS: Mapping[str, Callable[[Path, Path], tuple[dict[str, Any], list[str]]]] = {
    "federated_model": _federated,
    "lda_model": _lda,
    "codebook": codebook.from_file,
    "embeddings": embeddings.from_file,
    "prompts": prompts.from_file,
}
"""Formats that this service writes, by the name in their manifest: what rewrites them."""


def check_header(source: Path, *, limits: Limits) -> set[str]:
    """Return the tensors' names after checking what the header promises against the file's size."""
    with source.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > limits.header_bytes:
            raise TooLarge(
                f"a .safetensors header of {length} bytes; at most {limits.header_bytes}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataInvalid("the .safetensors header is truncated or not JSON") from error
    if not isinstance(header, dict) or len(header) > 1000:
        raise DataInvalid("the .safetensors header must be an object of at most 1000 tensors")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        _check_entry(name, entry)
    return set(header)


def _check_entry(name: str, entry: Any) -> None:
    shown = repr(name[:60])
    if not re.fullmatch(r"\w{1,100}", name) or not isinstance(entry, dict):
        raise DataInvalid(f"tensor {shown}: a name of letters, digits and _ is needed")
    item_bytes = _ITEM_BYTES.get(str(entry.get("dtype")))
    if item_bytes is None:
        raise DataInvalid(f"tensor {shown}: dtype {str(entry.get('dtype'))[:20]} is not read")
    shape, span = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or span is None or len(span) != 2:
        raise DataInvalid(f"tensor {shown}: no shape and data_offsets")
    check_shape(shape, itemsize=item_bytes, size_bytes=span[1] - span[0], name=shown)


def _sizes(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    return None
