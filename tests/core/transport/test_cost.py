"""What a transport is said to take, against what its parts take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from bench._tiny_models import VARIANTS, tiny_model
from core.architectures.shape import ModelShape
from core.specs.transport import Capture, Evaluate, Fold, Permute, Rotate
from core.transport import cost, memory
from scripts.transport_cost import main

QWEN = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
QWEN_32B = QWEN | {
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
QWEN_3B = QWEN | {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
OPTIONS: dict[str, Any] = {
    "capture": Capture(),
    "permute": Permute(),
    "rotate": Rotate(),
    "fold": Fold(),
    "evaluate": Evaluate(),
}


def _large() -> tuple[ModelShape, ModelShape]:
    return ModelShape.of(QWEN_3B), ModelShape.of(QWEN_32B)


def test_parameters_are_those_the_makers_publish() -> None:
    small, large = _large()

    assert round(large.parameters / 1e9, 2) == 32.76  # Qwen2.5-32B: 32.5 B, head and all 32.76
    assert round(small.parameters / 1e9, 2) == 3.09  # Qwen2.5-3B


@pytest.mark.parametrize("variant", VARIANTS)
def test_operations_of_a_forward_pass_are_those_torch_counts(variant: str) -> None:
    model = tiny_model(variant)
    ids = torch.arange(40)[None]

    # On a CPU torch counts no attention scores.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)

    shape = ModelShape.of(model.config.to_dict())
    products = cost.forward_flops(shape, tokens=40, length=0, head=True)
    with_scores = cost.forward_flops(shape, tokens=40, length=40, head=True)
    # What the blocks multiply by; norms and biases are counted as parameters, about 1 % here.
    assert products == pytest.approx(counter.get_total_flops(), rel=0.03)
    # Scores and their sums, 4 T^2 a head and entry, of which a causal mask needs half.
    assert with_scores - products == 2 * 40**2 * shape.layers * shape.heads * shape.head_dim


def test_moments_take_what_they_hold() -> None:
    small, large = _large()

    pair = memory.pair_bytes(small, large)

    assert pair == 8 * (1 + 2048 + 5120 + 2048**2 + 5120**2 + 2048 * 5120)
    assert memory.moments_bytes(small, large) == 73 * pair


def test_each_chunk_loads_both_models() -> None:
    small, large = _large()
    few = cost.price(small, large, cost.Texts(160, 40, 250), **OPTIONS)[0]
    many = cost.price(
        small,
        large,
        cost.Texts(160, 40, 250),
        **{**OPTIONS, "capture": Capture(prompts_per_chunk=16)},
    )[0]

    weights = small.size_bytes + large.size_bytes
    assert few.read_bytes == 3 * weights
    assert many.read_bytes == 10 * weights
    assert many.forward_flops == few.forward_flops


def test_a_wider_student_is_told_what_it_grows_to() -> None:
    small, large = _large()
    lines = {
        line.stage: line
        for line in cost.price(
            small, large, cost.Texts(160, 40, 250), **{**OPTIONS, "permute": None}
        )
    }

    assert lines["fold"].written_bytes == pytest.approx(small.size_bytes * 2.5)


def test_texts_are_guessed_by_their_characters_and_cut() -> None:
    meta = {"prompts": 200, "characters": 160_000, "held_out": 0, "unsplit": 200}

    texts = cost.Texts.of(meta, capture=Capture(), evaluate=Evaluate())
    short = cost.Texts.of(meta, capture=Capture(max_tokens=100), evaluate=Evaluate())

    assert (texts.train, texts.held_out, texts.tokens) == (160, 40, 201.0)
    assert short.tokens == 100


def test_the_command_tells_it_from_configurations_alone(tmp_path: Path) -> None:
    for name, config in (("small", QWEN_3B), ("large", QWEN_32B)):
        (tmp_path / name).write_text(json.dumps(config))

    told = CliRunner().invoke(
        main, ["--student", str(tmp_path / "small"), "--teacher", str(tmp_path / "large")]
    )
    refused = CliRunner().invoke(
        main, ["--student", str(tmp_path / "small"), "--teacher", str(tmp_path / "none")]
    )

    assert told.exit_code == 0, told.output
    assert "32.76 B parameters -> 3.09 B" in told.output
    assert refused.exit_code == 1
    assert "not a readable config.json" in refused.output
