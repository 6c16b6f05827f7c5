"""Take in a language model that lies in a folder of the operator's, or in a hub cache there.

Nothing is downloaded and nobody's code is run: weights are safetensors, what the configurations
name of code or paths is left out, and transformers must build from them what the family's table
says. Every file is copied into the chunk's own folder first, so what was checked is what is stored:
the disk holds the files of a chunk (a sixteenth of the shards, at least one) for that time twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from core.architectures.shape import ModelShape
from core.errors import DataInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Produced, Stage
from core.kinds._files import read_json, write_json
from core.specs.base import JobSpec
from core.tensors import model_folders, weight_files
from core.tensors.language_models import (
    INDEX,
    LanguageModel,
    ModelFile,
    dump,
    index_of,
    lay_out,
)
from core.tensors.model_folders import CONFIG, SMALL, TOKENIZER, Found

COPIERS = 16
MIB = 1 << 20
LOOK_BYTES = 256 * MIB
COPY_BYTES = 256 * MIB
CHECK_BYTES = 1024 * MIB
"""What the stages take at most: an index of 16 MiB; blocks of 16 MiB and the masks beside them
(measured: 53 MiB); a tokenizer, 14 times its file, which is 64 MiB at most (15 MiB: 211 MiB)."""
_PART = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


class Spec(JobSpec):
    """Which model: a folder or a hub id."""

    kind: Literal["import_model"] = "import_model"
    folder: str | None = Field(
        None,
        min_length=1,
        max_length=500,
        description="Path of a model's folder below one of the operator's STILL_MODEL_ROOTS.",
    )
    hub: str | None = Field(
        None,
        pattern=rf"^{_PART}/{_PART}$",
        description="ORG/NAME of a model in a hub cache there; nothing is downloaded.",
    )
    revision: str = Field(
        "main",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$",
        description="Of the hub id: a branch, a tag or a commit.",
    )

    @field_validator("folder", "revision")
    @classmethod
    def _inside(cls, value: str | None) -> str | None:
        parts = [] if value is None else value.split("/")
        if value is not None and (
            _CONTROL.search(value) or any(part in ("", ".", "..") for part in parts)
        ):
            raise ValueError(f"{value!r}; needed a relative path without '.', '..' and '\\'")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.folder is None) == (self.hub is None):
            raise ValueError("folder, hub: give exactly one of them")
        if self.hub is None and self.revision != "main":
            raise ValueError("revision: of a hub id alone; a folder has none")
        if self.hub is not None and ("--" in self.hub or ".." in self.hub):
            raise ValueError("hub: no name there holds '--' or '..'")
        return self


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Look at what there is, copy and check the files, check the whole."""
    return [
        Stage("look", 1, memory_bytes=LOOK_BYTES),
        Stage("copy", COPIERS, memory_bytes=COPY_BYTES),
        Stage("check", 1, memory_bytes=CHECK_BYTES),
    ]


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    steps = {"look": _look, "copy": _copy, "check": _check}
    return steps[chunk.stage](spec, chunk)


def _find(spec: Spec, chunk: Chunk, revision: str) -> Found:
    if spec.hub is not None:
        return model_folders.find_hub(chunk.model_roots, spec.hub, revision)
    assert spec.folder is not None, "the spec holds one of them"
    return model_folders.find_folder(chunk.model_roots, spec.folder)


def _look(spec: Spec, chunk: Chunk) -> ChunkResult:
    """List the files and read the configuration, before anything large is touched."""
    found = _find(spec, chunk, spec.revision)
    shape = ModelShape.of(model_folders.read_json(found, CONFIG, most=SMALL[CONFIG]))
    commit = found.source.rpartition("@")[2] if spec.hub is not None else spec.revision
    listing = {
        "source": found.source,
        "revision": commit,
        "files": model_folders.list_files(found),
        "shape": shape.meta(),
    }
    path = chunk.workdir / "listing.json"
    return ChunkResult(checkpoints={"listing": write_json(path, listing, format_name="listing")})


def _listing(chunk: Chunk) -> dict[str, Any]:
    told: dict[str, Any] = read_json(chunk.outputs("look")[0]["listing"].path)
    return told


def _copy(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Copy every sixteenth file, the largest first, and check each by itself."""
    listing = _listing(chunk)
    sizes: dict[str, int] = listing["files"]
    shape = ModelShape.from_meta(listing["shape"])
    mine = sorted(sizes, key=lambda name: (-sizes[name], name))[chunk.index :: COPIERS]
    total, done = 2 * sum(sizes[name] for name in mine) + 1, 0

    def report(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        chunk.progress(min(done, total), total)

    checkpoints: dict[str, Produced] = {}
    facts: list[dict[str, Any]] = []
    found = _find(spec, chunk, listing["revision"])
    for number, name in enumerate(mine):
        report(0)
        file, fact = _take(found, name, sizes[name], shape, chunk.workdir, report)
        checkpoints[f"file_{number}"] = file
        facts.append(fact)
    path = chunk.workdir / "facts.json"  # no file that is taken has this name
    checkpoints["facts"] = write_json(path, facts, format_name="model_facts")
    return ChunkResult(checkpoints=checkpoints)


def _take(
    found: Found,
    name: str,
    size_bytes: int,
    shape: ModelShape,
    workdir: Path,
    report: Callable[[int], None],
) -> tuple[Produced, dict[str, Any]]:
    """Copy one file, checked; return it and what is known of it."""
    path = workdir / name
    fact: dict[str, Any] = {"name": name, "tensors": [], "tied": {}}
    if name.endswith(".json") and name != TOKENIZER:
        told = model_folders.read_json(found, name, most=SMALL[name])
        text = json.dumps(model_folders.without_outward(told), sort_keys=True, indent=2)
        path.write_text(text + "\n", encoding="utf-8")
    else:
        _copy_bytes(found, name, size_bytes, path, report)
    if name.endswith(".safetensors"):
        entries = weight_files.read_header(path)
        held = weight_files.check_shard(name, entries, shape)
        own = [entry for entry in entries if entry.name in set(held)]
        weight_files.check_finite(path, own, report)
        fact |= {"tensors": held, "tied": _digests(path, entries, shape)}
    with path.open("rb") as file:
        fact["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    fact["size_bytes"] = path.stat().st_size
    return _stored(path, fact["sha256"]), fact


def _digests(
    path: Path, entries: Sequence[weight_files.Entry], shape: ModelShape
) -> dict[str, str]:
    """Return hashes of embedding and head where they are said to be one: are they?"""
    both = (shape.table.embedding, shape.table.head) if shape.tied else ()
    return {
        entry.name: f"{entry.dtype} {weight_files.digest(path, entry)}"
        for entry in entries
        if entry.name in both
    }


def _stored(path: Path, sha256: str) -> Produced:
    """Return a file that stays when the job is over: its hash is its key, so no two differ."""
    kind = "application/json" if path.name.endswith(".json") else "application/octet-stream"
    return Produced(path, "model_file", path.name, kind, cache_key=f"model_file:{sha256}")


def _copy_bytes(
    found: Found, name: str, size_bytes: int, path: Path, report: Callable[[int], None]
) -> None:
    with model_folders.open_file(found, name) as source, path.open("xb") as target:
        while block := source.read(weight_files.BLOCK_BYTES):
            target.write(block)
            report(len(block))
    if path.stat().st_size != size_bytes:
        raise DataInvalid(
            f"{name}: {path.stat().st_size} bytes, {size_bytes} when the job looked first; "
            "import a folder that nobody writes to"
        )


def _check(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Put the files together: every weight once, a tokenizer, a model that transformers builds."""
    listing = _listing(chunk)
    shape = ModelShape.from_meta(listing["shape"])
    facts = [fact for made in chunk.outputs("copy") for fact in read_json(made["facts"].path)]
    _check_whole(facts, shape)
    files = [
        ModelFile(fact["name"], fact["sha256"], fact["size_bytes"], tuple(fact["tensors"]))
        for fact in facts
        if fact["tensors"] or not fact["name"].endswith(".safetensors")
    ]
    checkpoints = {}
    shards = sorted((file for file in files if file.tensors), key=lambda file: file.name)
    if [shard.name for shard in shards] != [model_folders.ONE_SHARD]:
        checkpoints["index"], listed = _index(chunk.workdir, shards)
        files.append(listed)
    chunk.progress(1, 3)
    tokenizer = next(file.sha256 for file in files if file.name == TOKENIZER)
    whole = LanguageModel(
        shape,
        tuple(sorted(files, key=lambda file: file.name)),
        tokenizer,
        tokens=0,
        source=listing["source"],
    )
    model = _loadable(whole, chunk)
    path = chunk.workdir / "model.json"
    made = write_json(path, dump(model), format_name="language_model", **model.meta())
    return ChunkResult(outputs={"model": made}, checkpoints=checkpoints)


def _check_whole(facts: Sequence[Mapping[str, Any]], shape: ModelShape) -> None:
    counted = Counter(name for fact in facts for name in fact["tensors"])
    for name in shape.tensors():
        if counted[name] != 1:
            raise DataInvalid(
                f"{name}: in {counted[name]} of the shards; needed every weight once, this is "
                f"a {shape.family} model of {shape.layers} layers"
            )
    hashes = [tied for fact in facts for tied in fact["tied"].values()]
    if len(set(hashes)) > 1:
        raise DataInvalid(
            f"config.json: tie_word_embeddings is true, and {shape.table.head} differs from "
            f"{shape.table.embedding}; set it to false"
        )


def _index(workdir: Path, shards: Sequence[ModelFile]) -> tuple[Produced, ModelFile]:
    """Write the index anew: it says what the shards' own headers say."""
    path = workdir / INDEX
    text = json.dumps(index_of(shards), sort_keys=True, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return _stored(path, sha256), ModelFile(INDEX, sha256, path.stat().st_size)


def _loadable(model: LanguageModel, chunk: Chunk) -> LanguageModel:
    """Return the model with the number of its tokens, after transformers took all but weights."""
    from core.transport import agreement

    beside = tuple(file for file in model.files if file.name in SMALL)
    folder = lay_out(replace(model, files=beside), chunk.workdir / "model", chunk.fetch)
    agreement.check_model(folder, model.shape)
    chunk.progress(2, 3)
    return replace(model, tokens=agreement.count_tokens(folder, model.shape))


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Take in a language model from the operator's folders.",
    example={"kind": "import_model", "folder": "Qwen2.5-3B-Instruct"},
    outputs={"model": "language_model"},
)
