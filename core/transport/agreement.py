"""Whether transformers makes of a folder the very model that its family's table describes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from core.architectures.shape import ModelShape
from core.errors import DataInvalid
from core.transport.foreign import loaded, said
from core.transport.tokens import load_tokenizer

SAMPLE = "A model, 1 text.\n"
"""Any text does: what is asked is whether offsets come with its tokens."""


def check_model(folder: Path, shape: ModelShape) -> None:
    """Build the model of a folder's config.json without memory and compare it with the table.

    What a configuration leaves out has one default here and may have another in transformers, so
    equality of names and shapes is looked at, not believed.

    Raises:
        DataInvalid: transformers refuses the configuration, or weights or facts differ.
    """
    config = loaded(AutoConfig, folder, "config.json")
    read = replace(ModelShape.of(config.to_dict()), dtype=shape.dtype)
    if read != shape:
        odd = next(name for name, value in shape.meta().items() if getattr(read, name) != value)
        raise DataInvalid(
            f"config.json: transformers takes {odd} to be {getattr(read, odd)}, this service "
            f"{getattr(shape, odd)}; write it out"
        )
    with torch.device("meta"):
        make: Callable[[Any], PreTrainedModel] = AutoModelForCausalLM.from_config
        built = said("config.json", lambda: make(config))
    wanted = {name: tuple(weight.shape) for name, weight in built.named_parameters()}
    for name in sorted(wanted.keys() ^ shape.tensors().keys()):
        whose = "transformers" if name in wanted else "the table of weights"
        raise DataInvalid(f"config.json: the weight {name} is of {whose} alone")
    if (folder / "generation_config.json").exists():
        loaded(GenerationConfig, folder, "generation_config.json")


def count_tokens(folder: Path, shape: ModelShape) -> int:
    """Return how many ids a folder's tokenizer can give: one more than the largest.

    Raises:
        DataInvalid: it does not load, gives no offsets, or an id beyond the vocabulary.
    """
    tokenizer = load_tokenizer(folder)
    ids = said("tokenizer.json", lambda: _ids(tokenizer))
    tokens = max(ids, default=0) + 1
    if tokens > shape.vocabulary:
        raise DataInvalid(
            f"tokenizer.json: gives ids up to {tokens - 1}; the model embeds {shape.vocabulary}"
        )
    return tokens


def _ids(tokenizer: Any) -> list[int]:
    cut = tokenizer(SAMPLE, return_offsets_mapping=True)
    if len(cut["offset_mapping"]) != len(cut["input_ids"]):
        raise ValueError("offsets and tokens differ in number")
    return [*tokenizer.get_vocab().values(), *cut["input_ids"]]
