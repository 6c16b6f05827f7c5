"""Tiny models of every family, built in code, saved as the folders that real ones come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CONFIGS: dict[str, type[Any]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 272,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_all_heads": ("llama", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_biases": ("qwen3", {"attention_bias": True, "head_dim": 16}),
}
"""Grouped queries in all but one; tied and untied embeddings; biases; QK-norm (Qwen3)."""


def tiny_model(variant: str = "llama", *, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """Build a model whose every weight is random: no norm is all ones, no bias zero. float32."""
    family, more = VARIANTS[variant]
    config = CONFIGS[family](**{**SIZES, "tie_word_embeddings": False, **more, **sizes})
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            spread = 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.copy_(noise * spread + (1.0 if "norm" in name else 0.0))
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, <s> (256) in front; offsets in characters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<s>": 256, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", add_bos_token=True
    )


def save_folder(
    model: PreTrainedModel, folder: Path, *, tokenizer: Any = None, shard_bytes: int | None = None
) -> Path:
    """Write the folder; ``shard_bytes``: several shards of at most so many bytes."""
    most: dict[str, Any] = {"max_shard_size": shard_bytes} if shard_bytes else {}
    model.save_pretrained(folder, **most)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def reload(folder: Path) -> PreTrainedModel:
    """Load a folder as a user would, in the dtype it is stored in."""
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=AutoConfig.from_pretrained(folder).dtype
    )
    found.eval()
    return found
