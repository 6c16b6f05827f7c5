"""Files of moments: read back place by place, added in order, refused where they do not fit."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from bench._tiny_models import tiny_model
from core.errors import DataInvalid
from core.specs.transport import Permute
from core.tensors import shards
from core.transport import moment_files
from core.transport.memory import moments_bytes
from core.transport.moments import Captured
from core.transport.streams import shape_of
from tests.core.transport.readings import captured, eager, paired

FACTS = {"run_id": "0123456789abcdef", "layer_map": [0, 1, 2]}


@pytest.fixture(scope="module")
def chunks() -> list[Captured]:
    student, teacher = eager(tiny_model()), eager(tiny_model(seed=1, hidden_size=48))
    pairs = paired()
    return [
        captured(student, teacher, part, permute=Permute(layers=(1,)))
        for part in (pairs[:2], pairs[2:])
    ]


@pytest.fixture
def files(chunks: list[Captured], tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(chunks))]
    for path, chunk in zip(paths, chunks, strict=True):
        moment_files.save_moments(path, chunk, facts=FACTS)
    return paths


def test_files_add_up_to_the_chunks_in_their_order(
    files: list[Path], chunks: list[Captured]
) -> None:
    site = moment_files.sum_site(files, "mlp.2")
    neurons, heads = moment_files.sum_neurons(files, 1), moment_files.sum_heads(files, 1)

    for found, first, second in (
        (site, *(chunk.sites["mlp.2"] for chunk in chunks)),
        (neurons, *(chunk.neurons[1] for chunk in chunks)),
        (heads, *(chunk.heads[1] for chunk in chunks)),
    ):
        for what, sums in found.tensors().items():
            assert torch.equal(sums, first.tensors()[what] + second.tensors()[what])


def test_a_file_is_the_same_each_time_and_as_large_as_the_formula(
    files: list[Path], chunks: list[Captured], tmp_path: Path
) -> None:
    again = tmp_path / "again.safetensors"
    moment_files.save_moments(again, chunks[0], facts=FACTS)

    first, second = (sha256(path.read_bytes()).digest() for path in (files[0], again))
    assert first == second
    student, teacher = tiny_model(), tiny_model(hidden_size=48)
    taken = moments_bytes(shape_of(student), shape_of(teacher), Permute(layers=(1,)))
    header = int.from_bytes(again.read_bytes()[:8], "little")
    assert again.stat().st_size == 8 + header + taken


def test_the_manifest_tells_what_is_there(files: list[Path]) -> None:
    told = moment_files.check_files(files)

    assert (told["widths"], told["neurons"], told["heads"]) == ([32, 48], [1], [1])
    assert told["sites"][0] == "attention.0"
    assert told["facts"] == FACTS


def test_files_of_two_captures_are_not_added(
    files: list[Path], chunks: list[Captured], tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    moment_files.save_moments(other, chunks[1], facts={**FACTS, "run_id": "fedcba9876543210"})

    with pytest.raises(DataInvalid, match="file 1 has other facts"):
        moment_files.check_files([files[0], other])


def test_no_file_at_all_is_refused() -> None:
    with pytest.raises(DataInvalid, match="no file"):
        moment_files.check_files([])
    with pytest.raises(DataInvalid, match="no file"):
        moment_files.sum_site([], "final")


def test_a_site_that_is_not_there_is_refused(files: list[Path]) -> None:
    with pytest.raises(DataInvalid, match=r"mlp\.9"):
        moment_files.sum_site(files, "mlp.9")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("xy", np.zeros((32, 47)), r"needed float64 \[47\]"),
        ("xx", np.zeros((32, 32), dtype=np.float32), "float32"),
        ("n", np.asarray(np.nan), "not finite"),
        ("sum_x", np.full(32, np.inf), "not finite"),
    ],
)
def test_sums_of_the_wrong_sort_are_refused(
    files: list[Path], name: str, value: Any, message: str
) -> None:
    tensors, manifest = shards.load(files[0])
    told = {"manifest": json.dumps(manifest)}
    save_file({**tensors, f"final.{name}": value}, files[0], metadata=told)

    with pytest.raises(DataInvalid, match=message):
        moment_files.sum_site(files, "final")


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.safetensors"
    shards.save(path, {"a": np.zeros(1)}, {"format": "pairs", "version": 1})

    with pytest.raises(DataInvalid, match="needed format 'moments'"):
        moment_files.load_manifest(path)
