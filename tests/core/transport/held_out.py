"""Held-out texts as two byte-level models read them, and models turned by hand."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench._tiny_models import byte_tokenizer
from core.specs.transport import Capture
from core.transport.pairs import Pair, pair
from core.transport.streams import shape_of
from core.transport.tokens import encode

TEXTS = (
    "The old town hall stands on a hill.",
    "Die Brücke über den Fluss ist alt.",
    "A short walk.",
    "Le musée ouvre à neuf heures et ferme tard.",
)
LANGUAGES = ("en", "de", "en", "")


def read(
    texts: tuple[str, ...] = TEXTS,
    *,
    teacher: PreTrainedTokenizerBase | None = None,
    options: Capture | None = None,
) -> list[Pair]:
    """Encode texts for a byte-level student and a teacher (the same, where none is given)."""
    own, asked = byte_tokenizer(), options or Capture()
    said = {"system_prompt": asked.system_prompt, "max_tokens": asked.max_tokens}
    return [
        pair(encode(own, text, **said), encode(teacher or own, text, **said), asked)
        for text in texts
    ]


def random_rotation(rows: int, columns: int | None = None, *, seed: int = 0) -> Tensor:
    """Return [rows, columns] float64 with orthonormal rows."""
    columns = columns or rows
    noise = torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed)).double()
    return torch.linalg.qr(noise).Q.mT.contiguous()


def turned(model: PreTrainedModel, R: Tensor) -> PreTrainedModel:
    """Return a copy in float64 whose residual stream is the old one times R [d, d]; untied."""
    shape, whole = shape_of(model), deepcopy(model).double()
    config = deepcopy(model.config)
    config.tie_word_embeddings = False
    new = type(model)(config).double().eval()
    old = whole.state_dict()
    gammas = {name: old[name] for name in old if "norm" in name}
    weights = {}
    for name, layer, weight in shape.table.weights(shape.layers):
        if name not in old:
            continue
        value = old[name]
        prefix = "" if layer is None else shape.table.layer_prefix.format(layer=layer)
        if weight.side == "norm":
            value = torch.ones_like(value)
        elif weight.side == "reads":
            value = (
                value
                * gammas[
                    (prefix if weight.after != "model.norm.weight" else "") + str(weight.after)
                ]
            ) @ R
        elif weight.side == "writes":
            value = value @ R if weight.axes[-1] == "residual" else R.mT @ value
        weights[name] = value
    new.load_state_dict(weights, strict=True)
    return new
