"""Tells a file's format by its bytes, never by its name, and hands it to the importer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.artifacts.importers import (
    archive,
    caches,
    checkpoint,
    codebook,
    embeddings,
    federated,
    lda_db,
    own,
    pairs,
    prompts,
)
from core.artifacts.limits import Budget, Limits
from core.errors import DataInvalid

ALLOWED = (
    "allowed: .npz or .safetensors with query_embeddings and target_embeddings; .pt, .npz or "
    ".safetensors with embeddings; .zip, .tar or "
    ".tar.gz with NAME.pkl and its folder NAME/; .npz with bivectors, with targets, or with "
    "planes; .npz with query_embeddings, query_cluster and answer_embeddings; an lda.db; a "
    "federated_model, lda_model, embeddings, codebook, prompts, bivectors_cache or targets_cache "
    ".safetensors; prompts as JSON lines with 'text', or as a table with tabs and a column 'text'"
)


@dataclass(frozen=True)
class Read:
    """What an importer made of a file."""

    format: str
    meta: dict[str, Any]
    notes: list[str]


def read(source: Path, target: Path, *, scratch: Path, limits: Limits) -> Read:
    """Read any allowed file and write its canonical form to ``target``.

    ``scratch`` is an empty folder for unpacked members. Raises DataInvalid or TooLarge.
    """
    with source.open("rb") as file:
        head = file.read(512)
    if not head:
        raise DataInvalid(f"the file is empty; {ALLOWED}")
    budget = Budget(limits)
    if own.looks_like(head):
        return Read(*own.from_file(source, target, limits=limits))
    if lda_db.looks_like(head):
        return Read("lda_model", *lda_db.from_file(source, target, limits=limits))
    if head.startswith(b"PK"):
        return _read_zip(source, target, scratch, budget)
    if head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
        members = archive.extract_tar(source, scratch, budget)
        return Read("federated_model", *federated.from_members(members, target, budget=budget))
    if prompts.looks_like(head):
        return Read("prompts", *prompts.from_text(source, target, budget=budget))
    for matches, what in _REFUSED:
        if matches(head):
            raise DataInvalid(f"{what}; {ALLOWED}")
    raise DataInvalid(f"the file's format is not known; {ALLOWED}")


def _read_zip(source: Path, target: Path, scratch: Path, budget: Budget) -> Read:
    with archive.open_zip(source, budget) as members:
        names = set(members)
    if names and all(name.endswith(".npy") and "/" not in name for name in names):
        arrays = {name.removesuffix(".npy") for name in names}
        if caches.holds_cache(arrays):
            return Read(*caches.from_npz(source, target, arrays=arrays, budget=budget))
        if codebook.looks_like(names):
            return Read("codebook", *codebook.from_npz(source, target, budget=budget))
        if embeddings.looks_like(arrays):
            return Read("embeddings", *embeddings.from_npz(source, target, budget=budget))
        return Read("pairs", *pairs.from_npz(source, target, budget=budget))
    if checkpoint.looks_like(names):
        return Read("embeddings", *checkpoint.from_zip(source, target, budget=budget))
    if not names:
        raise DataInvalid(f"the archive is empty; {ALLOWED}")
    files = archive.extract_zip(source, scratch, budget)
    return Read("federated_model", *federated.from_members(files, target, budget=budget))


def _starts(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics)


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r" for byte in head)


_TORCH_NUMBER = b"\x8a\n" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
"""The pickled number that torch wrote first before a checkpoint was a zip."""

_REFUSED: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (
        lambda head: head[:1] == b"\x80" and _TORCH_NUMBER in head[:32],
        "a PyTorch checkpoint of the old format, which is no zip: save it again with torch.save of "
        "PyTorch 1.6 or newer",
    ),
    (
        lambda head: (
            (head[:1] == b"\x80" and head[1:2] <= b"\x05")
            or head.startswith((b"(dp", b"(lp", b"}q", b"]q", b"ccopy_reg", b"cnumpy"))
        ),
        "a bare .pkl; a federated model is NAME.pkl and its folder NAME/: upload a .zip or .tar.gz "
        "of both",
    ),
    (_starts(b"\x93NUMPY"), "a single .npy array; save queries and targets with numpy.savez"),
    (
        _starts(b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!"),
        "an archive packed in another way",
    ),
    (_starts(b"\x89HDF"), "an HDF5 file"),
    (_starts(b"PAR1"), "a Parquet file"),
    (_starts(b"\xff\xfe", b"\xfe\xff"), "text in UTF-16; save it as UTF-8"),
    (
        _is_text,
        "a text file that is neither JSON lines nor a table with tabs and a column 'text' in its "
        "first line",
    ),
)
"""Formats refused by name, in order."""
