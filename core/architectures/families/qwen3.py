"""Qwen3: queries and keys are normalised per head, so the entries of a head keep their basis."""

from core.architectures.tables import OUTSIDE, QK_NORM, Family, attention, swiglu

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer=(*attention(biases="optional"), *QK_NORM, *swiglu(biases=False)),
    outside=OUTSIDE,
    rotates_heads=False,
)
