"""Llama, Qwen2 and Qwen3 whose residual stream turns into another basis between some layers.

Each layer's weights are in the basis of its own rotation R; after a layer named in the
configuration's ``skip_adapters`` the stream is multiplied by ``R^T R_next`` (SliceGPT, Ashkboos et
al. 2024). The file needs torch and transformers alone: folders carry a copy of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class Turning:
    """Mixed into a decoder layer: its output is turned into the basis of what follows."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.skip_adapter = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return [B, T, D], of the input's dtype; turned in the adapter's."""
        stream = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        adapter = self.skip_adapter
        turned: torch.Tensor = adapter(stream.to(adapter.weight.dtype)).to(stream.dtype)
        return turned


class TurningLlamaLayer(Turning, LlamaDecoderLayer):
    """A Llama layer with a skip adapter behind it."""


class TurningQwen2Layer(Turning, Qwen2DecoderLayer):
    """A Qwen2 layer with a skip adapter behind it."""


class TurningQwen3Layer(Turning, Qwen3DecoderLayer):
    """A Qwen3 layer with a skip adapter behind it."""


class SlicedLlamaConfig(LlamaConfig):
    """A Llama's, and after which layers the stream turns."""

    model_type = "sliced_llama"
    skip_adapters: list[int] | None = None

    def validate_architecture(self) -> None:
        """Take any width: the size of a head is told, so it need be no multiple of the heads."""


class SlicedQwen2Config(Qwen2Config):
    """A Qwen2's, and after which layers the stream turns."""

    model_type = "sliced_qwen2"
    skip_adapters: list[int] | None = None


class SlicedQwen3Config(Qwen3Config):
    """A Qwen3's, and after which layers the stream turns."""

    model_type = "sliced_qwen3"
    skip_adapters: list[int] | None = None


def add_adapters(model: Any, layer_class: Any) -> None:
    """Put layers with adapters in the place of those that the configuration names."""
    for layer in model.config.skip_adapters or ():
        model.model.layers[layer] = layer_class(model.config, layer)
    model.post_init()


class SlicedLlamaForCausalLM(LlamaForCausalLM):
    """A Llama with skip adapters."""

    config_class = SlicedLlamaConfig
    _no_split_modules = ["LlamaDecoderLayer", "TurningLlamaLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["skip_adapter"]  # noqa: RUF012

    def __init__(self, config: SlicedLlamaConfig) -> None:
        super().__init__(config)
        add_adapters(self, TurningLlamaLayer)


class SlicedQwen2ForCausalLM(Qwen2ForCausalLM):
    """A Qwen2 with skip adapters."""

    config_class = SlicedQwen2Config
    _no_split_modules = ["Qwen2DecoderLayer", "TurningQwen2Layer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["skip_adapter"]  # noqa: RUF012

    def __init__(self, config: SlicedQwen2Config) -> None:
        super().__init__(config)
        add_adapters(self, TurningQwen2Layer)


class SlicedQwen3ForCausalLM(Qwen3ForCausalLM):
    """A Qwen3 with skip adapters."""

    config_class = SlicedQwen3Config
    _no_split_modules = ["Qwen3DecoderLayer", "TurningQwen3Layer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["skip_adapter"]  # noqa: RUF012

    def __init__(self, config: SlicedQwen3Config) -> None:
        super().__init__(config)
        add_adapters(self, TurningQwen3Layer)


MODELS = {
    "sliced_llama": SlicedLlamaForCausalLM,
    "sliced_qwen2": SlicedQwen2ForCausalLM,
    "sliced_qwen3": SlicedQwen3ForCausalLM,
}
