"""How large a language model is, by its config.json: what plans and prices need. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from core.architectures.tables import Family, Stream, Weight, families
from core.errors import DataInvalid

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
MOST = 1 << 24
"""Of any count in a configuration; the largest vocabularies are below 2**19."""


@dataclass(frozen=True)
class ModelShape:
    """Of a model of a known family."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    vocabulary: int
    """Rows of the embedding; padded ids that no tokenizer gives count too."""
    tied: bool
    """Whether the head is the embedding."""
    attention_bias: bool
    mlp_bias: bool
    positions: int
    """The longest text, in tokens."""
    norm_eps: float
    dtype: str
    """Of the stored weights."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a config.json.

        Raises:
            DataInvalid: the family, an activation, a kind of layer or a count is not supported.
        """
        known = families()
        family = config.get("model_type")
        if not isinstance(family, str) or family not in known:
            raise DataInvalid(
                f"config.json: model_type {str(family)[:60]!r}; allowed: {', '.join(known)}"
            )
        _check_blocks(config)
        width, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
        head_dim = config.get("head_dim")
        kv_heads = config.get("num_key_value_heads")
        shape = cls(
            family=family,
            layers=_count(config, "num_hidden_layers"),
            width=width,
            heads=heads,
            kv_heads=heads if kv_heads is None else _count(config, "num_key_value_heads"),
            head_dim=max(1, width // heads) if head_dim is None else _count(config, "head_dim"),
            neurons=_count(config, "intermediate_size"),
            vocabulary=_count(config, "vocab_size"),
            tied=_flag(config, "tie_word_embeddings"),
            attention_bias=_flag(config, "attention_bias"),
            mlp_bias=_flag(config, "mlp_bias"),
            positions=_count(config, "max_position_embeddings"),
            norm_eps=_eps(config),
            dtype=_dtype(config),
        )
        if shape.heads % shape.kv_heads:
            raise DataInvalid(
                f"config.json: num_attention_heads {shape.heads} is no multiple of "
                f"num_key_value_heads {shape.kv_heads}"
            )
        return shape

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> ModelShape:
        """Read what ``meta`` wrote; other keys beside it are passed over."""
        return cls(**{name: meta[name] for name in cls.__dataclass_fields__})

    def meta(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return asdict(self)

    @property
    def table(self) -> Family:
        """The family's table of weights."""
        return families()[self.family]

    def size(self, stream: Stream) -> int:
        """Return how long an axis of this stream is."""
        return {
            "residual": self.width,
            "queries": self.heads * self.head_dim,
            "keys": self.kv_heads * self.head_dim,
            "heads": self.head_dim,
            "neurons": self.neurons,
            "vocabulary": self.vocabulary,
        }[stream]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight that the model has, by its whole name."""
        return {
            name: tuple(self.size(stream) for stream in weight.axes)
            for name, _, weight in self.table.weights(self.layers)
            if self._has(weight)
        }

    def _has(self, weight: Weight) -> bool:
        if not weight.optional:
            return True
        if weight.name == self.table.head:
            return not self.tied
        return self.mlp_bias if weight.name.startswith("mlp.") else self.attention_bias

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold."""
        total = 0
        for shape in self.tensors().values():
            numbers = 1
            for length in shape:
                numbers *= length
            total += numbers
        return total

    @property
    def size_bytes(self) -> int:
        """What the weights take as stored."""
        return self.parameters * ITEM_BYTES[self.dtype]


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 1 <= value <= MOST:
        raise DataInvalid(f"config.json: {name} {str(value)[:60]}; needed a whole number >= 1")
    return value


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if type(value) is not bool:
        raise DataInvalid(f"config.json: {name} {str(value)[:60]}; needed true or false")
    return value


def _eps(config: Mapping[str, Any]) -> float:
    value = config.get("rms_norm_eps", 1e-6)
    if not isinstance(value, float | int) or not 0 < value < 1:
        raise DataInvalid(f"config.json: rms_norm_eps {str(value)[:60]}; needed a number in (0, 1)")
    return float(value)


def _dtype(config: Mapping[str, Any]) -> str:
    value = config.get("dtype", config.get("torch_dtype")) or "float32"
    if not isinstance(value, str) or value not in ITEM_BYTES:
        raise DataInvalid(
            f"config.json: dtype {str(value)[:60]!r}; allowed: {', '.join(ITEM_BYTES)}; weights "
            "that are quantised cannot be rotated"
        )
    return value


def _check_blocks(config: Mapping[str, Any]) -> None:
    """Refuse what the tables do not describe."""
    if config.get("hidden_act", "silu") != "silu":
        raise DataInvalid(
            f"config.json: hidden_act {str(config['hidden_act'])[:60]!r}; allowed: silu"
        )
    if config.get("quantization_config") is not None:
        raise DataInvalid("config.json: quantization_config; needed weights that are not quantised")
