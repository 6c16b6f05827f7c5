"""Tiny models and texts for jobs of the kind transport."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench._tiny_models import save_folder, tiny_model
from core.tensors.language_models import LanguageModel, lay_out, load_language_model
from core.tensors.prompts import Prompts, save_prompts

if TYPE_CHECKING:
    from tests.core.kinds.world import World

PLACES = ("The old bridge", "A market square", "The castle", "The café by the river")
FACTS = ("was built in 1402.", "sells bread and honey.", "looks over the valley.", "wird geliebt.")
SMALL: dict[str, Any] = {"prompts_per_chunk": 6, "max_tokens": 40}


def texts() -> list[str]:
    """Sixteen short texts."""
    return [f"{place} {fact}" for place, fact in itertools.product(PLACES, FACTS)]


def put_prompts(world: World, *, split: bool = False) -> str:
    """Store the texts; ``split``: every fourth is held out, and they say so."""
    whole = texts()
    count = len(whole)
    prompts = Prompts(
        [f"text-{number}" for number in range(count)],
        whole,
        ["de" if "wird" in text else "en" for text in whole],
        ["CC0-1.0"] * count,
        [("test" if number % 4 == 3 else "train") if split else "" for number in range(count)],
    )
    path = world.folder / "prompts.safetensors"
    save_prompts(path, prompts)
    return world.put(path, "prompts", prompts.meta())


def put_model(world: World, name: str, variant: str, *, seed: int, **sizes: Any) -> str:
    """Write a tiny model's folder, in several shards, and import it; return JOB/model."""
    folder = world.models / name
    if not folder.exists():
        save_folder(tiny_model(variant, seed=seed, **sizes), folder, shard_bytes=40_000)
    return f"{world.submit(kind='import_model', folder=name, name=name)}/model"


def put_pair(
    world: World, *, student: str = "llama_tied", teacher: str = "llama", **sizes: Any
) -> dict[str, str]:
    """Return the inputs of a transport: two models of different weights, and the texts.

    ``sizes``: of the teacher alone.
    """
    return {
        "student": put_model(world, "student", student, seed=1),
        "teacher": put_model(world, "teacher", teacher, seed=2, **sizes),
        "prompts": put_prompts(world),
    }


def transport(world: World, inputs: dict[str, str], **spec: Any) -> str:
    """Submit a transport that lets random models be as far apart as they are."""
    asked = {"capture": SMALL, "gates": {"improves": False}, **inputs, **spec}
    return world.submit(kind="transport", **asked)


def folder_of(world: World, job_id: str, name: str = "model") -> Path:
    """Lay out a model that a job offers, as a user gets it."""
    found = model_of(world, job_id, name)
    return lay_out(found, world.folder / f"{job_id}-{name}", world.store.path)


def model_of(world: World, job_id: str, name: str = "model") -> LanguageModel:
    """Read the list of files of a model that a job offers."""
    return load_language_model(world.path(job_id, name))
