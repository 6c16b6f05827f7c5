"""The artifact ``language_model``: which stored files make the folder that transformers loads.

A JSON file; the shards, the tokenizer and the configuration are blobs of their own, named by hash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.architectures.shape import ModelShape
from core.errors import DataInvalid

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelFile:
    """One file of a model's folder."""

    name: str
    """Without a folder."""
    sha256: str
    size_bytes: int
    tensors: tuple[str, ...] = ()
    """Of a shard: the weights it holds, in the order of the file; of other files none."""


@dataclass(frozen=True)
class LanguageModel:
    """A model of a known family and what its folder holds."""

    shape: ModelShape
    files: tuple[ModelFile, ...]
    """Sorted by name: configuration, shards, their index where there are several, tokenizer."""
    tokenizer: str
    """SHA-256 of tokenizer.json: equal ones cut text alike."""
    tokens: int
    """Ids that the tokenizer can give; at most the shape's vocabulary."""
    source: str
    """Where it came from, in words: a folder, a hub id, a job's stage."""
    exact: bool = True
    """Whether it computes what the model it was made from computes."""
    adapters: bool = False
    """Whether it takes our own module to load: the residual stream turns between layers, or is of
    a width that transformers refuses."""

    @property
    def shards(self) -> tuple[ModelFile, ...]:
        """Return the files that hold weights, sorted by name."""
        return tuple(file for file in self.files if file.tensors)

    def meta(self) -> dict[str, Any]:
        """Return the facts a plan needs."""
        sizes = [file.size_bytes for file in self.shards]
        return {
            **self.shape.meta(),
            "parameters": self.shape.parameters,
            "shards": len(sizes),
            "bytes": sum(sizes),
            "largest_shard_bytes": max(sizes, default=0),
            "tokenizer": self.tokenizer,
            "tokens": self.tokens,
            "exact": self.exact,
            "adapters": self.adapters,
        }


def dump(model: LanguageModel) -> dict[str, Any]:
    """Return what the artifact's JSON holds."""
    return {
        "format": "language_model",
        "version": 1,
        "shape": model.shape.meta(),
        "files": [
            {
                "name": file.name,
                "sha256": file.sha256,
                "size_bytes": file.size_bytes,
                "tensors": list(file.tensors),
            }
            for file in model.files
        ],
        "tokenizer": model.tokenizer,
        "tokens": model.tokens,
        "source": model.source,
        "exact": model.exact,
        "adapters": model.adapters,
    }


def load_language_model(path: Path) -> LanguageModel:
    """Read the artifact's JSON (its meta is ``LanguageModel.meta``).

    Raises:
        DataInvalid: not such a file.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = _parse(told)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataInvalid(f"not a readable language_model file: {error}") from error
    return found


def _parse(told: Mapping[str, Any]) -> LanguageModel:
    if (told["format"], told["version"]) != ("language_model", 1):
        raise DataInvalid("manifest: needed format 'language_model', version 1")
    files = tuple(
        ModelFile(file["name"], file["sha256"], file["size_bytes"], tuple(file["tensors"]))
        for file in told["files"]
    )
    for file in files:
        if not FILE_NAME.fullmatch(file.name):
            raise DataInvalid(f"file name {file.name[:60]!r}; needed letters, digits, ., _ and -")
    return LanguageModel(
        ModelShape.from_meta(told["shape"]),
        files,
        told["tokenizer"],
        told["tokens"],
        told["source"],
        told["exact"],
        told["adapters"],
    )


def lay_out(model: LanguageModel, folder: Path, fetch: Callable[[str], Path]) -> Path:
    """Make a folder that ``from_pretrained`` loads: links, under their names, to stored files.

    Args:
        model: whose files.
        folder: made here; must not exist.
        fetch: from a hash to the stored file.
    """
    folder.mkdir()
    for file in model.files:
        (folder / file.name).symlink_to(fetch(file.sha256))
    return folder


def index_of(shards: Sequence[ModelFile]) -> dict[str, Any]:
    """Return the index file of several shards, as transformers reads it."""
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    return {
        "metadata": {"total_size": sum(shard.size_bytes for shard in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }
