"""What the stages of a transport declare, against what chunks of one were seen to hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench._tiny_models import SIZES
from core.architectures.shape import ModelShape
from core.kinds._base import Input
from core.kinds._transport.needs import SCRATCH_BYTES
from core.kinds.transport import Spec, stages
from core.transport import memory

ROOT = Path(__file__).resolve().parents[3]
GIB = 2**30
SPEC = {"capture": {"max_tokens": 256, "batch_tokens": 512, "prompts_per_chunk": 16}}
WIDTHS = {"student": 384, "teacher": 512}
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_=262144", "MALLOC_TRIM_THRESHOLD_=262144")
"""Freed memory goes back at once, so that nothing of one chunk hides in the next one's."""
PROMPTS = {"prompts": 200, "characters": 160_000, "held_out": 0, "unsplit": 200}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peaks are told here")
def test_chunks_hold_about_what_is_declared(tmp_path: Path) -> None:
    """Of a student and a teacher of 3.8 and 5.1 million parameters; the counted part alone."""
    both = {"intermediate_size": 1536, "num_hidden_layers": 2}
    sizes = {name: {"hidden_size": width, **both} for name, width in WIDTHS.items()}
    asked = json.dumps({**sizes, "spec": SPEC})
    done = subprocess.run(
        ["env", *ALLOCATOR, sys.executable, "-m", "tests.core.kinds.peaks", str(tmp_path), asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])

    for stage, (declared, peak) in found.items():
        assert peak < declared, f"{stage}: {peak >> 20} of {declared >> 20} MiB"
    for stage in ("capture", "permute", "rotate", "evaluate"):
        declared, peak = found[stage]
        ratio = (declared - SCRATCH_BYTES) / peak
        assert 0.85 < ratio < 1.5, f"{stage}: counted {ratio:.2f} of a peak of {peak >> 20} MiB"


def _needs(spec: dict[str, Any], **sizes: dict[str, Any]) -> dict[str, int]:
    config = {**SIZES, "model_type": "llama", "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}
    inputs = {"prompts": Input("0" * 64, "prompts", PROMPTS)}
    for number, name in enumerate(("student", "teacher"), start=1):
        shape = ModelShape.of({**config, **sizes.get(name, {})})
        facts = {"shards": 2, "largest_shard_bytes": 1 << 30, "adapters": False, "tokenizer": "t"}
        sha256 = str(number) * 64
        inputs[name] = Input(sha256, "language_model", {**shape.meta(), **facts})
    asked = {name: inputs[name].sha256 for name in inputs}
    found = stages(Spec.model_validate({**asked, **spec}), inputs)
    return {stage.name: stage.memory_bytes for stage in found}


LARGE = {
    "student": {"hidden_size": 2048, "num_hidden_layers": 36, "intermediate_size": 11_008},
    "teacher": {"hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 27_648},
}


def test_a_group_holds_the_moments_of_all_its_sites() -> None:
    whole = _needs({"until": "rotate"}, **LARGE)
    layer = _needs({"until": "rotate", "rotate": {"tie": "layer"}}, **LARGE)
    trial = _needs({"until": "rotate", "rotate": {"k": "held_out", "pca": "each"}}, **LARGE)

    pair = 8 * (2048**2 + 5120**2 + 2048 * 5120)
    assert 73 * pair < whole["rotate"] < 73 * pair + 4 * GIB
    assert 2 * pair < layer["rotate"] < 2 * pair + 4 * GIB
    assert trial["rotate"] > 3 * 73 * pair
    assert whole["bind"] < 2 * GIB < 37 * 8 * 2048 * 5120 < layer["bind"]


def test_what_is_spread_needs_its_largest_part_and_the_sums() -> None:
    whole = _needs({}, **LARGE)["capture"]
    spread = _needs({"capture": {"placement": "spread"}}, **LARGE)["capture"]

    layer = 2 * 3 * 5120 * 27_648
    moments = 73 * 8 * (2048**2 + 5120**2 + 2048 * 5120)
    assert moments + layer < spread < whole - 2 * 60 * 3 * 5120 * 27_648


def test_float32_takes_twice_what_is_stored_in_16_bits() -> None:
    shape = ModelShape.of({**SIZES, "model_type": "llama", "torch_dtype": "bfloat16"})

    assert memory.weights_bytes(shape, "auto") == shape.size_bytes
    assert memory.weights_bytes(shape, "float32") == 2 * shape.size_bytes


def test_what_cannot_be_permuted_needs_nothing() -> None:
    found = _needs({"until": "permute", "capture": {"batch_tokens": 512}}, **LARGE)

    assert found["permute"] == SCRATCH_BYTES + 8 * 6 * SIZES["num_attention_heads"] ** 2
