"""Models whose residual stream turns between layers: their module, and how any folder loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from core.errors import DataInvalid
from core.transport.fold_plans import SLICED
from core.transport.sliced import modeling

MODULE = "modeling_sliced.py"
"""What ``auto_map`` names: the file that ``from_pretrained(trust_remote_code=True)`` runs."""


def module_text() -> str:
    """Return the file that such a folder carries: ``modeling`` as it stands here."""
    return Path(modeling.__file__).read_text(encoding="utf-8")


def needs_module(folder: Path) -> bool:
    """Whether a folder's model is one of ours, which transformers alone does not know."""
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(told["model_type"]).startswith(SLICED)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataInvalid(f"config.json: not readable ({type(error).__name__})") from error


def load_folded(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a folder, with skip adapters or without; never runs what the folder carries.

    Args:
        folder: of a model, folded or not.
        options: for ``from_pretrained``: dtype, device_map, attn_implementation and so on.

    Returns:
        The model, in evaluation mode.

    Raises:
        DataInvalid: a model of ours of a family that is not known.
    """
    logging.disable_progress_bar()
    loads: Any = AutoModelForCausalLM
    if needs_module(folder):
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        if kind not in modeling.MODELS:
            raise DataInvalid(
                f"config.json: model_type {kind[:60]!r}; allowed: {', '.join(modeling.MODELS)}"
            )
        loads = modeling.MODELS[kind]
    options = {"dtype": "auto", **options}
    found: Any = loads.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **options
    )
    model: PreTrainedModel = found.eval()
    return model
