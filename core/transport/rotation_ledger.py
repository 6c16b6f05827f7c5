"""Per layer of the student, what was done to it and what came of it (document 002, section 16.3).

One JSON holds all; as a folder it is ``rotations/RUN_ID/layer_0.json`` and so on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import DataInvalid
from core.tensors.manifests import shown
from core.transport.checks import turn_facts
from core.transport.permutations import LayerPermutation
from core.transport.rotations import Rotation, RotationSet
from core.transport.sites import FINAL, POINTS, group_of

FORMAT = {"format": "rotation_ledger", "version": 1}
INDEX = "index.json"
_RUN_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}")
SIZES = ("stream_rms_ratio", "difference_rms", "channel_rms_factor")


def build(
    rotations: RotationSet,
    *,
    run_id: str,
    layer_map: Sequence[int],
    permutations: Mapping[int, LayerPermutation],
    likeness: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Put together what each layer has to say.

    Args:
        rotations: of every group.
        run_id: of the frozen ledger of texts.
        layer_map: [layers of the student], the teacher's beside each.
        permutations: by layer; a layer without one was left as it is.
        likeness: ``permute.match_layer``'s reports, of the layers that were matched.
        scores: ``evaluation.evaluate_variant`` by variant; on texts held out by document.
        seed: of the random rows that round trips are tried on.

    Returns:
        JSON values: ``layers``, one entry a layer, and ``final``, the final norm's. Each has
        ``group``, ``stage``, ``k``, ``singular_values``, ``rotation`` (``checks.turn_facts``),
        ``diagnostics`` of the solve, ``permutation``, ``likeness`` and, by point, ``cosine`` and
        ``rms``, which hold a number per variant.

    Raises:
        DataInvalid: a group has no map, or the layer map is of another student.
    """
    if len(layer_map) != rotations.layers:
        raise DataInvalid(
            f"layer_map: {len(layer_map)} entries; the rotations are of {rotations.layers} layers"
        )
    if missing := [group for group in rotations.groups if group not in rotations.maps]:
        raise DataInvalid(f"rotations: {missing[0]} is missing; needed every group")
    groups = {group: _group(rotations, group, seed) for group in rotations.groups}
    reports = {of["layer"]: of for of in likeness}

    def entry(layer: int | None) -> dict[str, Any]:
        group = _group_name(rotations, layer)
        points = (FINAL,) if layer is None else POINTS
        return {
            "run_id": run_id,
            "layer": layer,
            "teacher_layer": None if layer is None else layer_map[layer],
            "stage": (rotations.layers - 1 if layer is None else layer) // rotations.stage_layers,
            **groups[group],
            "permutation": _orders(permutations.get(-1 if layer is None else layer)),
            "likeness": None if layer is None else reports.get(layer),
            "points": {
                point: _point(scores, point if layer is None else f"{point}.{layer}")
                for point in points
            },
        }

    return {
        **FORMAT,
        "run_id": run_id,
        "tie": rotations.tie,
        "stage_layers": rotations.stage_layers,
        "widths": {"student": rotations.student_width, "teacher": rotations.teacher_width},
        "sources": dict(rotations.sources),
        "layers": [entry(layer) for layer in range(rotations.layers)],
        "final": entry(None),
    }


def _group_name(rotations: RotationSet, layer: int | None) -> str:
    return group_of(
        layer, tie=rotations.tie, stage_layers=rotations.stage_layers, layers=rotations.layers
    )


def _group(rotations: RotationSet, group: str, seed: int) -> dict[str, Any]:
    one = rotations.maps[group]
    facts = turn_facts(one, seed=seed)
    return {
        "group": group,
        "k": facts["k"],
        "widths": {
            "student": rotations.student_width,
            "teacher": rotations.teacher_width,
            "folded": int(one.full.shape[1]) if isinstance(one, Rotation) else None,
        },
        "singular_values": [float(value) for value in one.singular_values],
        "rotation": facts,
        "diagnostics": rotations.diagnostics.get(group),
    }


def _orders(of: LayerPermutation | None) -> dict[str, list[int] | None]:
    names = ("kv_heads", "heads", "neurons")
    found = {name: None if of is None else getattr(of, name) for name in names}
    return {name: None if order is None else list(order) for name, order in found.items()}


def _point(scores: Mapping[str, Mapping[str, Any]], site: str) -> dict[str, Any]:
    """Return a site's numbers by variant, and the nulls beside the last variant."""
    of = {name: told["sites"][site] for name, told in scores.items() if site in told["sites"]}
    last = of.get("rotated") or (list(of.values())[-1] if of else {})
    return {
        "cosine": {
            **{name: told["cosine"] for name, told in of.items()},
            **{null: last.get(null) for null in ("shuffled", "mean_only", "subspace")},
        },
        "rms": {size: {name: told[size] for name, told in of.items()} for size in SIZES},
    }


def entries(ledger: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the layers' entries in order, the final norm's last."""
    return [*ledger["layers"], ledger["final"]]


def name_of(entry: Mapping[str, Any]) -> str:
    """Name an entry: ``layer_3`` or ``final``."""
    return FINAL if entry["layer"] is None else f"layer_{entry['layer']}"


def write_ledger(path: Path, ledger: Mapping[str, Any]) -> None:
    """Write all of it as one file; equal ledgers give equal bytes."""
    text = json.dumps(ledger, sort_keys=True, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_folder(ledger: Mapping[str, Any], folder: Path) -> Path:
    """Write ``rotations/RUN_ID/`` into a folder: a file a layer, ``final.json``, ``index.json``.

    Returns:
        The run's folder.
    """
    run = folder / "rotations" / str(ledger["run_id"])
    run.mkdir(parents=True)
    names = []
    for entry in entries(ledger):
        names.append(f"{name_of(entry)}.json")
        write_ledger(run / names[-1], entry)
    whole = {name: value for name, value in ledger.items() if name not in ("layers", "final")}
    write_ledger(run / INDEX, {**whole, "files": names})
    return run


def read(path: Path) -> dict[str, Any]:
    """Read a ledger: its one file, a run's folder, or a folder with ``rotations/`` of one run.

    Raises:
        DataInvalid: there is none, or it is not what ``build`` makes.
    """
    if not path.is_dir():
        return _checked(_object(path))
    folder = path
    if not (folder / INDEX).is_file():
        runs = sorted(folder.glob(f"rotations/*/{INDEX}"))
        if len(runs) != 1:
            raise DataInvalid(
                f"{path.name}: {len(runs)} runs under rotations/; needed one, or a run's own folder"
            )
        folder = runs[0].parent
    told = _object(folder / INDEX)
    files = told.pop("files", None)
    if not isinstance(files, list) or not files:
        raise DataInvalid(f"{INDEX}: files {shown(files)}; needed the names of the layers' files")
    found = []
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise DataInvalid(f"{INDEX}: files {shown(name)}; needed a name within the folder")
        found.append(_object(folder / name))
    return _checked({**told, "layers": found[:-1], "final": found[-1]})


def _object(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataInvalid(f"{path.name}: not a readable rotation ledger: {error}") from error
    if not isinstance(told, dict):
        raise DataInvalid(f"{path.name}: not a readable rotation ledger: no JSON object")
    return told


def _checked(told: dict[str, Any]) -> dict[str, Any]:
    if any(told.get(name) != value for name, value in FORMAT.items()):
        raise DataInvalid("manifest: needed format 'rotation_ledger', version 1")
    if not isinstance(told.get("run_id"), str) or not _RUN_ID.fullmatch(told["run_id"]):
        raise DataInvalid(f"rotation ledger: run_id {shown(told.get('run_id'))}; no folder's name")
    layers, final = told.get("layers"), told.get("final")
    if not isinstance(layers, list) or not layers or not isinstance(final, dict):
        raise DataInvalid("rotation ledger: needed layers, a list, and final, an object")
    for number, entry in enumerate([*layers, final]):
        wanted = number if number < len(layers) else None
        if not isinstance(entry, dict) or entry.get("layer", -1) != wanted:
            raise DataInvalid(f"rotation ledger: entry {number} is not of layer {wanted}")
        _check_entry(name_of(entry), entry)
    return told


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    wanted: dict[str, type] = {
        "group": str,
        "k": int,
        "stage": int,
        "singular_values": list,
        "rotation": dict,
        "permutation": dict,
        "points": dict,
    }
    for field, kind in wanted.items():
        if not isinstance(entry.get(field), kind):
            raise DataInvalid(f"{name}: {field} {shown(entry.get(field))}; not what a ledger holds")
    _check_facts(name, entry["rotation"])
    _check_numbers(name, entry["singular_values"])
    for point, told in entry["points"].items():
        if not isinstance(told, dict) or not isinstance(told.get("cosine"), dict):
            raise DataInvalid(f"{name}: points.{shown(point)}: needed cosine and rms")
        _check_numbers(name, told["cosine"].values())


def _check_facts(name: str, facts: Mapping[str, Any]) -> None:
    errors = facts.get("errors")
    if not isinstance(errors, dict) or not {"core", "bases", "rows"} <= errors.keys():
        raise DataInvalid(f"{name}: rotation.errors {shown(str(errors))}; needed core, bases, rows")
    if type(facts.get("orthogonal")) is not bool:
        raise DataInvalid(f"{name}: rotation.orthogonal {shown(facts.get('orthogonal'))}")
    if missing := [way for way in ("round_trip", "round_trip_back") if way not in facts]:
        raise DataInvalid(f"{name}: rotation.{missing[0]} is missing")
    _check_numbers(name, [*errors.values(), facts["round_trip"], facts["round_trip_back"]])


def _check_numbers(name: str, values: Iterable[Any]) -> None:
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise DataInvalid(f"{name}: {shown(value)}; needed a number")
