"""Qwen2 and Qwen2.5: queries, keys and values have biases."""

from core.architectures.tables import OUTSIDE, Family, attention, swiglu

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer=(*attention(biases="qkv"), *swiglu(biases=False)),
    outside=OUTSIDE,
)
