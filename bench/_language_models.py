"""Language models of a size that counts, made where the bench runs, and texts for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.logging import disable_progress_bar

from core.transport.alignment import align
from core.transport.pairs import Pair
from core.transport.tokens import Encoded

SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""The sizes of SmolLM2-135M: 134,515,008 parameters, the embedding once."""


WIDE_LAYER = {
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 16_384,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""One layer of the sizes of Qwen2.5-3B, and a smaller vocabulary: 110,631,936 parameters."""


def random_model(folder: Path, sizes: Mapping[str, Any], *, seed: int) -> Path:
    """Write a Llama of these sizes with random weights, float32, to a new folder."""
    disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def random_pairs(count: int, *, shortest: int, longest: int, seed: int, ids: int) -> list[Pair]:
    """Return texts of random tokens that both models cut alike; the first token is left out.

    Args:
        count: how many.
        shortest: tokens of the shortest that may come.
        longest: tokens of the longest, which is among them.
        seed: of lengths and tokens.
        ids: they are below it.
    """
    rng = np.random.default_rng(seed)
    lengths = [longest, *rng.integers(shortest, longest + 1, count - 1).tolist()]
    found = []
    for length in lengths:
        places = np.arange(length, dtype=np.int64)
        first = places == 0
        text = Encoded(rng.integers(1, ids, length), places, places + 1, ~first, first)
        found.append(Pair(text, text, align(text, text, how="last")))
    return found
