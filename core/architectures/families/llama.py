"""Llama (1 to 3.x), and what shares its blocks: biases only where the configuration says so."""

from core.architectures.tables import OUTSIDE, Family, attention, swiglu

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer=(*attention(biases="optional"), *swiglu(biases=True)),
    outside=OUTSIDE,
)
