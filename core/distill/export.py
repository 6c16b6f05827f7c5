"""Writes a trained student as .pt, .safetensors and .onnx, and reads the first two back.

The same student gives the same bytes, in any process and under any file name.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.distill.graph import Graph
from core.distill.students._base import StudentModule, restore_student
from core.errors import DataInvalid
from core.tensors import shards

FORMAT = {"format": "student", "version": 1}


@dataclass(frozen=True)
class Exported:
    """The three files of one student."""

    torch: Path
    """``student.pt``: a plain dict; loads with ``weights_only=True``."""
    safetensors: Path
    """``student.safetensors``: the same, config in the header."""
    onnx: Path
    """``student.onnx``: ``queries`` [batch, d] -> ``vectors`` [batch, m], float32."""

    def sizes(self) -> dict[str, int]:
        """Return bytes per file name."""
        return {
            path.name: path.stat().st_size for path in (self.torch, self.safetensors, self.onnx)
        }


def export_student(
    student: StudentModule, folder: Path, *, facts: Mapping[str, Any] | None = None
) -> Exported:
    """Write all three files into ``folder``.

    Args:
        student: trained; copied to the CPU.
        folder: exists.
        facts: JSON values to keep beside the config (how it was trained).
    """
    files = Exported(*(folder / f"student.{end}" for end in ("pt", "safetensors", "onnx")))
    state = {name: value.detach().cpu() for name, value in student.state_dict().items()}
    whole = {**FORMAT, "config": student.config, "facts": dict(facts or {})}
    # JSON both ways: torch keeps the identity of equal strings, which depends on the process.
    header = json.dumps(whole, sort_keys=True, allow_nan=False)
    buffer = io.BytesIO()  # a file's own name would end up inside it
    torch.save(
        {"header": header, "state": {name: value.clone() for name, value in state.items()}}, buffer
    )
    files.torch.write_bytes(buffer.getvalue())
    shards.save(files.safetensors, {name: value.numpy() for name, value in state.items()}, whole)
    files.onnx.write_bytes(to_onnx(student))
    return files


def to_onnx(student: StudentModule) -> bytes:
    """Serialise the student's ``forward`` as an ONNX model with a free batch axis."""
    graph = Graph()
    return graph.model(
        student.emit(graph, "queries"), dim=student.config["dim"], width=student.output_dim()
    )


def load_student(path: Path) -> StudentModule:
    """Read a ``.pt`` or ``.safetensors`` student, ready to be used; runs no code of the file's.

    Raises:
        DataInvalid: another suffix, a broken file, or one that is no student.
    """
    readers = {".pt": _read_torch, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise DataInvalid(
            f"{path.name}: allowed are {', '.join(readers)}; use onnxruntime for .onnx"
        )
    whole, state = readers[path.suffix](path)
    if whole.get("format") != FORMAT["format"] or not isinstance(whole.get("config"), dict):
        raise DataInvalid(f"{path.name} is no student: format {whole.get('format')!r}")
    return restore_student(whole["config"], state)


def student_facts(path: Path) -> dict[str, Any]:
    """Return config and facts of a ``.safetensors`` student without reading its tensors."""
    return shards.load_manifest(path)


def _read_torch(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        return json.loads(found["header"]), found["state"]
    except (
        pickle.UnpicklingError,
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:
        raise DataInvalid(f"{path.name} is no student.pt: {error}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors, whole = shards.load(path)
    return whole, {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
