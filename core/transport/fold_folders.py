"""A whole folder folded at once, in one process: what the stages of a job do file by file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.architectures.shape import ModelShape
from core.errors import DataInvalid
from core.tensors.language_models import INDEX, ModelFile, index_of
from core.transport.fold_plans import FoldPlan, folded_config
from core.transport.fold_records import RECORD, write_record
from core.transport.fold_shards import fold_task, read_norms, tasks
from core.transport.sliced import MODULE, module_text
from core.transport.weight_files import WeightFile
from core.transport.weight_streams import Report, silent

KEPT = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""Files that come along as they are, with what else of a tokenizer lies beside them."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        DataInvalid: missing, or no JSON object.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataInvalid(f"config.json: not readable ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise DataInvalid("config.json: needed a JSON object")
    return found


def shape_of(folder: Path) -> ModelShape:
    """Return the shape that a folder's config.json tells."""
    return ModelShape.of(read_config(folder))


def weight_files(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return which weights each of a folder's shards holds, as transformers would read them.

    Raises:
        DataInvalid: no safetensors, or an index that names a file outside of the folder.
    """
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif (folder / INDEX).is_file():
        names = _indexed(folder / INDEX)
    else:
        raise DataInvalid("model: needed model.safetensors or an index of several")
    if outside := [name for name in names if "/" in name or not (folder / name).is_file()]:
        raise DataInvalid(f"{INDEX}: {outside[0][:200]!r} is no file of the folder")
    found = {}
    for name in names:
        with WeightFile(folder / name) as file:
            found[name] = tuple(file.layouts)
    return found


def _indexed(path: Path) -> list[str]:
    try:
        return sorted({str(name) for name in json.loads(path.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataInvalid(f"{INDEX}: needed a JSON object with a weight_map") from error


def fold_folder(source: Path, target: Path, plan: FoldPlan, *, report: Report = silent) -> Path:
    """Fold a folder of transformers into a new one; ``target`` must not exist.

    Raises:
        DataInvalid: as ``tasks`` and ``fold_task``.
    """
    target.mkdir()
    files = weight_files(source)
    norms = read_norms([source / name for name in files], plan)
    found = tasks(files, plan)
    for number, task in enumerate(found):

        def told(done: float, total: float, number: int = number) -> None:
            report(number + done / max(total, 1.0), float(len(found)))

        path = None if task.source is None else source / task.source
        fold_task(task, path, target / task.target, plan=plan, norms=norms, report=told)
    shards = [
        ModelFile(task.target, "", (target / task.target).stat().st_size, task.tensors)
        for task in found
    ]
    if len(shards) > 1 or plan.turns:
        write_json(target / INDEX, index_of(shards))
    write_json(target / "config.json", folded_config(read_config(source), plan))
    if plan.own_module:
        (target / MODULE).write_text(module_text(), encoding="utf-8")
    write_record(target / RECORD, norms)
    copy_beside(source, target)
    return target


def copy_beside(source: Path, target: Path) -> None:
    """Copy tokenizer and generation settings."""
    for name in (*KEPT, "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write sorted, so that equal values give equal bytes."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
