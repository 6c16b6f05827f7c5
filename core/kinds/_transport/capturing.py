"""Stages ``capture`` and ``collect``: moments of blocks of texts, and the list of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import DataInvalid
from core.kinds._base import Chunk, ChunkResult, Produced
from core.kinds._files import write_json
from core.kinds._transport.given import Given
from core.kinds._transport.spec import Spec
from core.transport.memory import permutable

if TYPE_CHECKING:
    from core.transport.moments import Captured
    from core.transport.pairs import Pair
    from core.transport.states import Layout

ALGORITHM = 1
"""Raised when the same inputs would give other sums: what is cached under it is found no more."""
VALIDATION = 5
"""Every fifth training text chooses k, where held-out texts are to choose it."""
PARTS = ("moments", "validation")
RAW = ("states", "states_facts")


def capture(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Sum the moments of one block of texts; a block that was summed before is found again."""
    given = Given(spec, chunk)
    if spec.states is not None:
        return ChunkResult(checkpoints=_from_states(given))
    parts = _parts(given)
    keys = {name: _key(given, rows, name) for name, rows in parts.items()}
    if given.capture.raw and PARTS[0] in keys:
        keys |= {name: f"{name}:{keys[PARTS[0]]}" for name in RAW}
    found = {name: chunk.cached(key) for name, key in keys.items()}
    if None not in found.values():
        return ChunkResult(checkpoints={name: one for name, one in found.items() if one})
    return ChunkResult(checkpoints=_compute(given, parts, keys))


def _parts(given: Given) -> dict[str, list[int]]:
    """Return rows of this block's training texts, by which file their moments go into."""
    from core.transport.ledger import training_rows

    size, index = given.plan.capture.prompts_per_chunk, given.chunk.index
    block = range(index * size, (index + 1) * size)
    rows = training_rows(given.ledger)
    usable = [row for row in rows if given.ledger["prompts"][row]["pairs"]]
    chooses = {*usable[VALIDATION - 1 :: VALIDATION]} if given.spec.rotate.k == "held_out" else {}
    fitted = [row for row in usable if row not in chooses]
    shown = dict(zip(PARTS, (fitted, sorted(chooses)), strict=True))
    mine = {name: [row for row in rows if row in block] for name, rows in shown.items()}
    return {name: rows for name, rows in mine.items() if rows}


def _key(given: Given, rows: Sequence[int], name: str) -> str:
    """Hash all that decides the sums: models, texts, options; not how many chunks there are."""
    ledger, options = given.ledger, given.capture.model_dump(mode="json")
    how = {k: v for k, v in options.items() if k not in ("prompts_per_chunk", "layer_map")}
    permute = given.plan.permute
    facts = {
        "algorithm": ALGORITHM,
        "what": name,
        "student": given.sources["student"],
        "teacher": given.sources["teacher"],
        "texts": [ledger["prompts"][row]["sha256"] for row in rows],
        "ids": [ledger["prompts"][row]["id"] for row in rows] if given.capture.raw else [],
        "layer_map": ledger["layer_map"],
        "capture": how,
        "permute": permute and permute.model_dump(mode="json"),
        "device": given.device.type,
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return f"moments:{hashlib.sha256(text.encode()).hexdigest()}"


def _compute(
    given: Given, parts: Mapping[str, list[int]], keys: Mapping[str, str]
) -> dict[str, Produced]:
    """Run both models over each part's texts; of the first part raw states may be kept too."""
    plan, chunk = given.plan, given.chunk
    maps = permutable(plan.student, plan.teacher, plan.permute)[1]
    models = [given.load(given.folder(name), maps=maps) for name in ("student", "teacher")]
    total = sum(len(rows) for rows in parts.values())
    made: dict[str, Produced] = {}
    done = 0
    for name, rows in parts.items():

        def told(part: float, whole: float, done: int = done, size: int = len(rows)) -> None:
            chunk.progress(done + size * part / max(whole, 1), total)

        # One part's sums are gone before those of the next are made.
        made |= _run(given, models, rows, told, name=name, keys=keys)
        done += len(rows)
    return made


def _run(
    given: Given,
    models: Sequence[Any],
    rows: Sequence[int],
    told: Any,
    *,
    name: str,
    keys: Mapping[str, str],
) -> dict[str, Produced]:
    from core.transport.capture import capture as sum_moments
    from core.transport.states import StateWriter

    pairs = given.pairs(rows)
    keep = given.capture.raw and name == PARTS[0]
    layout = _layout(given, pairs, rows) if keep else None
    path = given.chunk.workdir / "states.safetensors"
    writer = None if layout is None else StateWriter(path, layout)
    captured = sum_moments(
        models[0],
        models[1],
        pairs,
        options=given.capture,
        layer_map=given.ledger["layer_map"],
        permute=given.plan.permute,
        report=told,
        keep=writer,
    )
    made = {name: _stored(given, captured, name, keys[name], rows)}
    if writer is None or layout is None:
        return made
    writer.close()
    return {**_beside(given, path, layout, keys), **made}


def _layout(given: Given, pairs: Sequence[Pair], rows: Sequence[int]) -> Layout:
    from core.transport.sites import sites
    from core.transport.states import lay_out_states

    return lay_out_states(
        pairs,
        [given.prompts.ids[row] for row in rows],
        sites=sites(given.plan.student),
        widths=(given.plan.student.width, given.plan.teacher.width),
        batch_tokens=given.capture.batch_tokens,
    )


def _beside(
    given: Given, path: Path, layout: Layout, keys: Mapping[str, str]
) -> dict[str, Produced]:
    """Return a shard of states and the JSON beside it; both are found again as the moments are."""
    from core.transport.states import describe

    told = describe(path, layout, facts=_facts(given))
    beside = write_json(given.chunk.workdir / "states.json", told, format_name="states_facts")
    made = Produced(path, "state_shard", path.name), beside
    return {name: replace(one, cache_key=keys[name]) for name, one in zip(RAW, made, strict=True)}


def _facts(given: Given) -> dict[str, Any]:
    """What all files of one capture say alike."""
    return {
        "student": given.sources["student"],
        "teacher": given.sources["teacher"],
        "layer_map": list(given.ledger["layer_map"]),
    }


def _stored(given: Given, captured: Captured, name: str, key: str, rows: Sequence[int]) -> Produced:
    from core.transport.moment_files import save_moments

    path = given.chunk.workdir / f"{name}.safetensors"
    save_moments(path, captured, facts=_facts(given))
    return Produced(path, "moment_block", path.name, meta={"texts": len(rows)}, cache_key=key)


def _from_states(given: Given) -> dict[str, Produced]:
    """Sum the moments of one kept shard, after its checksum was verified."""
    from core.transport.states import read_states

    chunk = given.chunk
    listed = given.states_list["shards"]
    if chunk.index >= len(listed):
        return {}
    shard = listed[chunk.index]
    states = read_states(chunk.fetch(shard["states"]), chunk.fetch(shard["facts"]))
    key = f"moments:{ALGORITHM}:states:{shard['states']}"
    found = chunk.cached(key)
    if found is not None:
        return {PARTS[0]: found}
    captured = states.moments(chunk.progress)
    return {PARTS[0]: _stored(given, captured, PARTS[0], key, range(len(states.layout.texts)))}


def collect(spec: Spec, chunk: Chunk) -> ChunkResult:
    """List the blocks, in the order in which they are added, together with the ledger."""
    given = Given(spec, chunk)
    made = chunk.outputs("capture")
    files = {name: _listed(made, name) for name in PARTS}
    if not files[PARTS[0]]:
        raise DataInvalid("prompts: no training text has a token that is paired")
    facts = {name: given.ledger[name] for name in ("run_id", "test_fraction", "seed")}
    facts |= given.sources
    whole = {
        "format": "moments",
        "version": 1,
        "ledger": given.ledger,
        "blocks": files[PARTS[0]],
        "validation": files[PARTS[1]],
        **_kept(chunk, made),
    }
    kept = {name: whole[name] for name in ("neuron_layers", "head_layers")}
    kept["validation"] = len(files[PARTS[1]])
    moments = write_json(
        chunk.workdir / "moments.json", whole, format_name="moments", **facts, **kept
    )
    outputs = {"moments": moments}
    shards = [
        {"states": _sha256(one["states"].path), "facts": _sha256(one["states_facts"].path)}
        for one in made
        if "states" in one
    ]
    if shards:
        told = {"format": "states", "version": 1, "ledger": given.ledger, "shards": shards}
        path = chunk.workdir / "states.json"
        outputs["states"] = write_json(
            path, told, format_name="states", **facts, shards=len(shards)
        )
    return ChunkResult(outputs=outputs)


def _kept(chunk: Chunk, made: Sequence[Mapping[str, Produced]]) -> dict[str, Any]:
    """Return which layers' heads and neurons have statistics, by the first block."""
    from core.transport.moment_files import load_manifest

    first = next(one[PARTS[0]] for one in made if PARTS[0] in one)
    told = load_manifest(first.path)
    return {"neuron_layers": told["neurons"], "head_layers": told["heads"]}


def _listed(made: Sequence[Mapping[str, Produced]], name: str) -> list[dict[str, Any]]:
    return [
        {"sha256": _sha256(one[name].path), "texts": one[name].meta["texts"]}
        for one in made
        if name in one
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def block_paths(given: Given, *names: str) -> list[Path]:
    """Return the stored files of moments, in the order in which they are added."""
    listed = given.moments_list
    keys = {PARTS[0]: "blocks", PARTS[1]: "validation"}
    return [given.chunk.fetch(block["sha256"]) for name in names for block in listed[keys[name]]]
