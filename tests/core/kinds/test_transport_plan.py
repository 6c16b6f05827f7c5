"""What a transport refuses at the door, how it is cut, and what it is said to take."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from core.architectures.shape import ModelShape
from core.errors import SpecInvalid
from core.kinds import transport
from core.kinds._base import Input
from core.tensors.language_models import LanguageModel, ModelFile
from tests.core.transport.test_cost import QWEN_3B, QWEN_32B

GIB = 2**30
NAMES = {"student": "0" * 64, "teacher": "1" * 64, "prompts": "2" * 64}
OF = {"student": "0" * 64, "teacher": "1" * 64}


def model(config: dict[str, Any], *, shards: int = 4, **facts: Any) -> dict[str, Any]:
    shape = ModelShape.of(config)
    files = tuple(
        ModelFile(f"model-{number}.safetensors", "f" * 64, shape.size_bytes // shards, ("w",))
        for number in range(shards)
    )
    whole = LanguageModel(shape, files, "e" * 64, 151_665, "folder x")
    return {**whole.meta(), **facts}


def inputs(**changed: dict[str, Any]) -> dict[str, Input]:
    meta: dict[str, tuple[str, dict[str, Any]]] = {
        "student": ("language_model", model(QWEN_3B, shards=2)),
        "teacher": ("language_model", model(QWEN_32B, shards=17)),
        "prompts": (
            "prompts",
            {"prompts": 200, "characters": 200_000, "held_out": 0, "unsplit": 200},
        ),
    }
    found = {name: Input(NAMES[name], *facts) for name, facts in meta.items()}
    for name, facts in changed.items():
        old = found.get(name, Input("9" * 64, name, OF))
        found[name] = Input(old.sha256, old.format, {**old.meta, **facts})
    return found


def planned(given: dict[str, Input] | None = None, **spec: Any) -> dict[str, int]:
    asked = transport.Spec.model_validate({**NAMES, **spec})
    stages = transport.stages(asked, given or inputs())
    assert all(stage.memory_bytes > 0 for stage in stages)
    return {stage.name: stage.chunks for stage in stages}


@pytest.mark.parametrize(
    ("spec", "stages"),
    [
        ({"until": "capture"}, {"ledger": 1, "capture": 4, "collect": 1}),
        (
            {"until": "rotate", "rotate": {"tie": "layer"}},
            {
                "ledger": 1,
                "capture": 4,
                "collect": 1,
                "permute": 1,
                "rotate": 37,
                "bind": 1,
                "report": 1,
                "gates": 1,
            },
        ),
        (
            {"permute": {"heads": False, "neurons": False}, "capture": {"prompts_per_chunk": 200}},
            {
                "ledger": 1,
                "capture": 1,
                "collect": 1,
                "rotate": 1,
                "bind": 1,
                "fold": 3,  # two shards, and the head that was tied
                "pack": 1,
                "evaluate": 2,
                "report": 1,
                "gates": 1,
            },
        ),
    ],
)
def test_stages_follow_what_is_asked_for(spec: dict[str, Any], stages: dict[str, int]) -> None:
    assert planned(**spec) == stages


def test_capture_asks_for_room_for_both_models_and_the_moments() -> None:
    asked = transport.Spec.model_validate(NAMES)

    memory = {stage.name: stage.memory_bytes for stage in transport.stages(asked, inputs())}

    assert 66 * GIB + 22 * GIB < memory["capture"] < 120 * GIB
    assert memory["fold"] < 16 * GIB
    assert memory["gates"] < 4 * GIB


def test_the_price_of_32b_to_3b_is_told_before_anything_is_loaded() -> None:
    asked = transport.Spec.model_validate(NAMES)

    found = transport.KIND.cost and transport.KIND.cost(asked, inputs())

    assert found is not None
    seconds = {stage.stage: stage.seconds for stage in found.stages}
    assert list(seconds) == ["capture", "permute", "rotate", "fold", "evaluate"]
    assert 60 < sum(seconds.values()) < 3600
    # 251 tokens a text: 160 to fit on, 40 held out, which two variants read beside the teacher
    # (permuted changes no state, but is run all the same: three).
    assert found.passes == {"student": 70_280, "teacher": 70_280}
    capture = next(stage for stage in found.stages if stage.stage == "capture")
    assert capture.read_bytes == 3 * (2 * 32_763_876_352 + 2 * 3_085_938_688)
    assert "files" in found.assumes


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({"rotate": {"tie": "layer"}}, "one rotation goes through the whole stream"),
        ({"rotate": {"whiten": True}}, "until 'rotate' to see it reported"),
        ({"rotate": {"k": 5, "shrink": 0.5}}, "shrink beside k"),
        ({"rotate": {"k": 0}}, "greater than or equal to 1"),
        ({"moments": "3" * 64, "states": "4" * 64}, "give one of them"),
        ({"states": "4" * 64, "permute": {}}, "of the stream alone"),
        ({"states": "4" * 64, "rotate": {"k": "held_out", "pca": "each"}}, "is lost in the sums"),
        ({"permutations": "4" * 64, "permute": {}}, "leave permute out"),
        ({"rotations": "4" * 64, "permute": {}}, "give permutations, or leave permute out"),
        ({"folded": "4" * 64}, "give those it was folded with"),
        ({"until": "capture", "moments": "4" * 64}, "nothing that runs reads it"),
        ({"until": "rotate", "rotations": "4" * 64}, "nothing that runs reads it"),
        ({"fold": {"variant": "square"}}, "'global', 'sliced' or 'conjugate'"),
        ({"capture": {"max_tokens": 4}}, "greater than or equal to 8"),
        ({"evaluate": {"variants": []}}, "at least 1 item"),
        ({"evaluate": {"variants": ["base", "base"]}}, "name each once"),
        ({"evaluate": {"variants": ["base"]}}, "needed 'rotated' among them"),
        ({"rotate": {"k": "held_out"}}, "the same for every k there"),
        ({"rotate": {"k": "held_out", "pca": "each"}, "capture": {"raw": True}}, "are not kept"),
        ({"rotations": "4" * 64, "rotate": {"k": 3}}, "leave rotate out"),
        ({"rotations": "4" * 64, "refine": {"reflections": 0}}, "leave refine out"),
        (
            {"rotations": "4" * 64, "folded": "5" * 64, "fold": {"dtype": "float16"}},
            "leave fold out",
        ),
        ({"moments": "4" * 64, "capture": {"raw": True}}, "nothing is captured"),
        ({"until": "fold", "gates": {"hidden_cosine": 0.75}}, "measured on the rotated student"),
        (
            {"evaluate": {"variants": ["base"]}, "gates": {"rms_ratio": 2.0}},
            "needed 'rotated' among them",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(spec: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        transport.Spec.model_validate({**NAMES, **spec})


@pytest.mark.parametrize(
    ("spec", "changed", "match", "pointer"),
    [
        ({"fold": {"variant": "conjugate"}}, {}, "2048, the teacher's 5120", "/fold/variant"),
        ({"rotate": {"k": 2049}}, {}, "allowed: 1 to 2048", "/rotate/k"),
        (
            {"capture": {"layer_map": [1, 2]}},
            {},
            "2 layers for 36|2 entries for 36",
            "/capture/layer_map",
        ),
        (
            {"capture": {"layer_map": [64] * 36}},
            {},
            "allowed: 0 to 63",
            "/capture/layer_map",
        ),
        (
            {"capture": {"layer_map": [5, 4, *[6] * 34]}},
            {},
            "entry 1 is 4 behind 5",
            "/capture/layer_map",
        ),
        ({"evaluate": {"layers": [36]}}, {}, "allowed: 0 to 35", "/evaluate/layers"),
        ({"permute": {"layers": [36]}}, {}, "allowed: 0 to 35|has 0 to 35", "/permute/layers"),
        ({}, {"student": {"adapters": True}}, "give the model that it was made from", "/student"),
        ({}, {"prompts": {"prompts": 1}}, "at least 2", "/prompts"),
        ({}, {"prompts": {"unsplit": 0}}, "of split 'test'", "/prompts"),
        ({}, {"prompts": {"held_out": 200, "unsplit": 0}}, "of split 'train'", "/prompts"),
        (
            {"moments": "9" * 64, "evaluate": {"test_fraction": 0.3}},
            {"moments": {"test_fraction": 0.2, "validation": 0}},
            "were taken with 0.2",
            "/evaluate/test_fraction",
        ),
        ({"moments": "9" * 64}, {"moments": {"student": "8" * 64}}, "of student 8888", "/moments"),
        (
            {"moments": "9" * 64, "rotate": {"k": "held_out", "pca": "each"}},
            {"moments": {"validation": 0, "neuron_layers": [], "head_layers": []}},
            "without texts set aside",
            "/rotate/k",
        ),
        (
            {"moments": "9" * 64, "permute": {"layers": [3]}},
            {"moments": {"validation": 0, "neuron_layers": [2], "head_layers": []}},
            "no statistics of layer 3",
            "/permute",
        ),
        (
            {"rotations": "9" * 64},
            {"rotations": {"orthogonal": False, "tie": "global"}},
            "fitted on z-scores",
            "/rotations",
        ),
        (
            {"rotations": "9" * 64},
            {"rotations": {"orthogonal": True, "tie": "layer"}},
            "needs one for all",
            "/rotations",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_device_works_for_it(
    spec: dict[str, Any], changed: dict[str, Any], match: str, pointer: str
) -> None:
    with pytest.raises(SpecInvalid, match=match) as caught:
        planned(inputs(**changed), **spec)
    assert caught.value.pointer == pointer
