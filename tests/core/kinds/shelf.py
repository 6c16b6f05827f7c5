"""A root of small models, for the tests of import_model, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench._jobs import Desk, run_job
from core.errors import DataInvalid, SpecInvalid
from core.kinds import import_model
from core.kinds._base import Produced
from core.tensors.language_models import LanguageModel, lay_out, load_language_model


class Shelf:
    """A root of models, and a service that may read it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "models"
        self.root.mkdir()
        self.desk = Desk(folder, model_roots=(self.root,))

    def run(self, **spec: Any) -> tuple[LanguageModel, Produced]:
        made = run_job(self.desk, import_model.Spec(**spec), {}).outputs["model"]
        return load_language_model(made.path), made

    def lay_out(self, model: LanguageModel) -> Path:
        return lay_out(model, self.desk.folder / "laid_out", self.desk.store.path)

    def refused(self, match: str, **spec: Any) -> None:
        """Import what is refused; the operator's paths stand in no message."""
        with pytest.raises((DataInvalid, SpecInvalid), match=match) as caught:
            self.run(**(spec or {"folder": "m"}))
        assert str(self.root) not in str(caught.value)
        assert len(str(caught.value)) < 800


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file of a folder."""
    told = json.loads((folder / name).read_text())
    change(told)
    (folder / name).write_text(json.dumps(told))


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights of a folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
