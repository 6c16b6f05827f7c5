"""What a family's table says: its weights by name, and the stream along each of their axes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from core.registry import scan

Stream = Literal["residual", "queries", "keys", "heads", "neurons", "vocabulary"]
"""What runs along an axis: the residual stream [d]; query heads [heads * head_dim]; KV heads
[kv_heads * head_dim]; the entries of one head [head_dim]; SwiGLU neurons; the vocabulary."""


@dataclass(frozen=True)
class Weight:
    """A parameter: the stream along each axis, in the order the file stores them."""

    name: str
    """Of a layer's: what follows its prefix."""
    axes: tuple[Stream, ...]
    side: Literal["reads", "writes", "norm", "neither"]
    """Of the residual stream: whether it reads it (its last axis), writes it (its first), scales
    it after a norm, or does not touch it. The embedding writes by its last axis."""
    after: str | None = None
    """The norm (by name, of the same place) whose gamma it takes in; of what reads alone."""
    optional: bool = False
    """Whether a model of the family may lack it (a bias; the head of tied embeddings)."""


@dataclass(frozen=True)
class Family:
    """Decoder-only models with pre-norms (RMSNorm), RoPE, grouped queries and a SwiGLU."""

    model_type: str
    """As ``config.json`` says it."""
    architecture: str
    """The class of transformers that generates."""
    layer: tuple[Weight, ...]
    outside: tuple[Weight, ...]
    rotates_heads: bool = True
    """Whether the entries of a head may be rotated: not where queries and keys are normalised."""
    layer_prefix: str = "model.layers.{layer}."
    points: Mapping[str, str] = field(
        default_factory=lambda: {
            "attention": "input_layernorm.weight",
            "mlp": "post_attention_layernorm.weight",
        }
    )
    """The points of a layer where the residual stream is read, and the pre-norm of each."""
    final_norm: str = "model.norm.weight"
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"

    def weights(self, layers: int) -> Iterator[tuple[str, int | None, Weight]]:
        """Yield whole name, layer (None: outside) and entry of every weight a model may have."""
        for weight in self.outside:
            yield weight.name, None, weight
        for layer in range(layers):
            prefix = self.layer_prefix.format(layer=layer)
            for weight in self.layer:
                yield prefix + weight.name, layer, weight


def _reads(name: str, first: Stream, after: str) -> Weight:
    return Weight(f"{name}.weight", (first, "residual"), "reads", after)


def attention(*, biases: Literal["never", "optional", "qkv"]) -> tuple[Weight, ...]:
    """Return the attention block's weights; ``qkv``: of these three alone there are biases."""
    norm = "input_layernorm.weight"
    found: list[Weight] = [Weight(norm, ("residual",), "norm")]
    streams: Mapping[str, Stream] = {"q": "queries", "k": "keys", "v": "keys"}
    for letter, stream in streams.items():
        name = f"self_attn.{letter}_proj"
        found.append(_reads(name, stream, norm))
        if biases != "never":
            found.append(
                Weight(f"{name}.bias", (stream,), "neither", optional=biases == "optional")
            )
    found.append(Weight("self_attn.o_proj.weight", ("residual", "queries"), "writes"))
    if biases == "optional":
        found.append(Weight("self_attn.o_proj.bias", ("residual",), "writes", optional=True))
    return tuple(found)


def swiglu(*, biases: bool) -> tuple[Weight, ...]:
    """Return the MLP's weights; ``biases``: whether a model may have them."""
    norm = "post_attention_layernorm.weight"
    found = [Weight(norm, ("residual",), "norm")]
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        found.append(_reads(name, "neurons", norm))
        if biases:
            found.append(Weight(f"{name}.bias", ("neurons",), "neither", optional=True))
    found.append(Weight("mlp.down_proj.weight", ("residual", "neurons"), "writes"))
    if biases:
        found.append(Weight("mlp.down_proj.bias", ("residual",), "writes", optional=True))
    return tuple(found)


QK_NORM = (
    Weight("self_attn.q_norm.weight", ("heads",), "neither"),
    Weight("self_attn.k_norm.weight", ("heads",), "neither"),
)
OUTSIDE = (
    Weight("model.embed_tokens.weight", ("vocabulary", "residual"), "writes"),
    Weight("model.norm.weight", ("residual",), "norm"),
    Weight(
        "lm_head.weight", ("vocabulary", "residual"), "reads", "model.norm.weight", optional=True
    ),
)


def families() -> Mapping[str, Family]:
    """Return every family by its ``model_type``."""
    return scan("core.architectures.families", "FAMILY", Family)
