"""A configuration alone says which weights a model has, as transformers would build it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bench._tiny_models import VARIANTS, config_of, tiny_model
from core.architectures.shape import MOST, ModelShape
from core.architectures.tables import Weight, families
from core.errors import DataInvalid
from tests.core.transport.checkpoints import NAMES, needs_real, real


def config(variant: str = "llama", **more: Any) -> dict[str, Any]:
    return {**json.loads(tiny_model(variant).config.to_json_string(use_diff=False)), **more}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_are_those_that_transformers_builds(variant: str) -> None:
    model = tiny_model(variant)
    shape = ModelShape.of(config(variant))

    built = {name: tuple(weight.shape) for name, weight in model.named_parameters()}

    assert shape.tensors() == built
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert shape.size_bytes == 4 * shape.parameters
    assert shape.tied is bool(model.config.tie_word_embeddings)


@needs_real
@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_of_a_real_file(name: str) -> None:
    folder = real(name)
    with safe_open(str(folder / "model.safetensors"), framework="numpy") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert ModelShape.of(config_of(folder)).tensors() == stored


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sides_are_those_of_the_residual_stream(variant: str) -> None:
    """Where a weight reads or writes is where its axis is as long as the stream."""
    shape = ModelShape.of(config(variant))
    norms = {weight.name for _, _, weight in shape.table.weights(1) if weight.side == "norm"}
    for name, _, weight in shape.table.weights(shape.layers):
        axis = {"reads": -1, "norm": 0, "writes": 0, "neither": None}[weight.side]
        if name == shape.table.embedding:
            axis = -1
        streams = [place for place, stream in enumerate(weight.axes) if stream == "residual"]
        assert streams == ([] if axis is None else [axis % len(weight.axes)]), name
        assert (weight.after in norms) is (weight.side == "reads"), name


def test_what_meta_writes_is_read_again() -> None:
    shape = ModelShape.of(config("qwen3_biases"))
    told = json.loads(json.dumps({**shape.meta(), "parameters": 3}))
    assert ModelShape.from_meta(told) == shape


@pytest.mark.parametrize(
    ("left_out", "name", "value"),
    [
        ("num_key_value_heads", "kv_heads", 4),
        ("head_dim", "head_dim", 8),
        ("tie_word_embeddings", "tied", False),
        ("attention_bias", "attention_bias", False),
        ("rms_norm_eps", "norm_eps", 1e-6),
        ("dtype", "dtype", "float32"),
    ],
)
def test_what_is_left_out_is_llamas_default(left_out: str, name: str, value: Any) -> None:
    told = config()
    del told[left_out]
    assert getattr(ModelShape.of(told), name) == value


def test_the_older_name_of_the_dtype_is_read() -> None:
    told = config(torch_dtype="float16")
    del told["dtype"]
    assert ModelShape.of(told).dtype == "float16"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; allowed: llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type 'None'"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": 0}, "hidden_size 0; needed"),
        ({"hidden_size": True}, "hidden_size True"),
        ({"hidden_size": "32"}, "hidden_size 32; needed a whole number"),
        ({"vocab_size": MOST + 1}, "vocab_size"),
        ({"intermediate_size": None}, "intermediate_size None"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings 1.5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of"),
        ({"head_dim": -8}, "head_dim -8"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings yes; needed true or false"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps 1e-6"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; allowed: silu"),
        ({"quantization_config": {}}, "quantization_config"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(DataInvalid, match=match):
        ModelShape.of(config(**change))


def test_every_family_has_the_points_of_one_block() -> None:
    for family in families().values():
        names = {weight.name for weight in (*family.layer, *family.outside)}
        assert {*family.points.values(), family.final_norm, family.embedding, family.head} <= names
        weights: list[Weight] = [*family.layer, *family.outside]
        assert sum(weight.side == "norm" for weight in weights) == len(family.points) + 1


def test_the_shape_of_a_model_of_32_billion_needs_no_memory() -> None:
    """Qwen2.5-32B, by its published configuration: 32.8 billion parameters."""
    told = config(
        "qwen2",
        hidden_size=5120,
        intermediate_size=27_648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=152_064,
        dtype="bfloat16",
    )
    shape = ModelShape.of(told)
    assert shape.parameters == 32_763_876_352
    assert shape.size_bytes == 2 * shape.parameters
    assert torch.bfloat16.itemsize == 2
