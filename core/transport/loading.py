"""Models from folders, ready to be read: no code of theirs runs, nothing is fetched.

A folder whose residual stream turns between layers is loaded by our own module, not by its copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from core.errors import DataInvalid
from core.transport.sliced import modeling, needs_module

Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
Placement = Literal["device", "spread"]


def load_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: Dtype = "auto",
    placement: Placement = "device",
    maps: bool = False,
    max_memory: Mapping[int | str, int] | None = None,
    offload: Path | None = None,
) -> PreTrainedModel:
    """Load a model for forward passes alone.

    Args:
        folder: with config.json and .safetensors shards.
        device: where it computes.
        dtype: what it computes in; ``auto``: float32 on a CPU, else as stored.
        placement: ``spread``: over all devices that are seen, then memory, then ``offload``, by
            accelerate's device map; layers that rest elsewhere are brought over when they run.
        maps: whether attention maps will be read, which takes eager attention.
        max_memory: with ``spread``: bytes to use at most, by number of the device and ``cpu``.
        offload: with ``spread``: a folder for what fits nowhere else.

    Returns:
        In evaluation mode, no weight with a gradient.

    Raises:
        DataInvalid: not a model's folder, or its shards lack weights or have others.
    """
    disable_progress_bar()
    where = device if placement == "device" else "auto"
    try:
        found: Any = _loader(folder).from_pretrained(
            folder,
            dtype=_dtype(dtype, device),
            device_map=where,
            max_memory=None if max_memory is None else dict(max_memory),
            offload_folder=offload,
            attn_implementation="eager" if maps else "sdpa",
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataInvalid(f"not a model's folder that transformers can load: {error}") from error
    model, info = found
    # What a shard lacks, transformers fills with random numbers and goes on.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            names = ", ".join(sorted(map(str, info[what]))[:5])
            raise DataInvalid(f"shards: {what.replace('_keys', '')} weights {names}")
    loaded: PreTrainedModel = model.eval().requires_grad_(requires_grad=False)
    return loaded


def _loader(folder: Path) -> Any:
    if not needs_module(folder):
        return AutoModelForCausalLM
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind not in modeling.MODELS:
        raise DataInvalid(
            f"config.json: model_type {kind[:60]!r}; allowed: {', '.join(modeling.MODELS)}"
        )
    return modeling.MODELS[kind]


def _dtype(dtype: Dtype, device: torch.device) -> torch.dtype | str:
    if dtype != "auto":
        found: torch.dtype = getattr(torch, dtype)
        return found
    return torch.float32 if device.type == "cpu" else "auto"
