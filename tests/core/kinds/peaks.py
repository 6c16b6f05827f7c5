"""Run as a process: what chunks of a transport declare and what they hold, as JSON by stage.

    python -m tests.core.kinds.peaks FOLDER '{"student": {...}, "teacher": {...}, "spec": {...}}'

Up to ``evaluate``, whose three chunks are the last. What a process loads anyway is loaded before.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from sqlalchemy import select

from bench._tiny_models import config_of, save_folder, tiny_model
from core.architectures.shape import ModelShape
from core.db.models import Chunk
from core.db.session import make_engine, reading, upgrade
from core.tensors.language_models import LanguageModel, ModelFile, dump
from core.tensors.prompts import Prompts, save_prompts
from core.transport.fold_folders import weight_files
from core.transport.loading import load_model
from tests.conftest import Clock
from tests.core.kinds.transports import texts, transport
from tests.core.kinds.world import World


def main() -> None:
    """Print, by stage, what one of its chunks declares and the most that one was seen to hold."""
    folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    engine = make_engine(f"sqlite:///{folder / 'peaks.db'}")
    upgrade(engine)
    world = World(engine, folder, Clock())
    _load_anyway(folder)
    inputs = {"prompts": _put_prompts(world)}
    for number, name in enumerate(("student", "teacher")):
        inputs[name] = _put_model(world, name, number, asked[name])
    found = _run(world, transport(world, inputs, **asked["spec"]))
    print(json.dumps(found))


def _load_anyway(folder: Path) -> None:
    """Run a tiny model over some tokens, so that modules and thread pools are there."""
    tiny_model().save_pretrained(folder / "first")
    loaded = load_model(folder / "first", device=torch.device("cpu"))
    loaded(torch.zeros(1, 4, dtype=torch.int64))
    torch.linalg.svd(torch.eye(8, dtype=torch.float64))
    linear_sum_assignment([[0.0]])


def _put_prompts(world: World) -> str:
    """Store texts of some 400 characters each."""
    whole = [f"{number} " + " ".join(texts()) for number in range(6)]
    count = len(whole)
    ids = [f"text-{number}" for number in range(count)]
    prompts = Prompts(ids, whole, ["en"] * count, ["CC0-1.0"] * count, [""] * count)
    path = world.folder / "prompts.safetensors"
    save_prompts(path, prompts)
    return world.put(path, "prompts", prompts.meta())


def _put_model(world: World, name: str, seed: int, sizes: dict[str, Any]) -> str:
    """Store a model of random weights as an import leaves it."""
    folder = save_folder(tiny_model(seed=seed, **sizes), world.folder / name, shard_bytes=16 << 20)
    held = weight_files(folder)
    files = []
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append(ModelFile(path.name, digest, size, tuple(held.get(path.name, ()))))
    tokenizer = next(file.sha256 for file in files if file.name == "tokenizer.json")
    model = LanguageModel(ModelShape.of(config_of(folder)), tuple(files), tokenizer, 258, name)
    for file in files:
        world.store.put(folder / file.name)
    listed = world.folder / f"{name}.json"
    listed.write_text(json.dumps(dump(model)))
    return world.put(listed, "language_model", model.meta())


def _run(world: World, job: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    counted: set[int] = set()
    while sum(chunk.stage == "evaluate" for chunk in _done(world, job)) < 3:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        assert world.runner.run_one(), world.job(job).error
        peak = _status("VmHWM") - before
        world.clock.tick(seconds=1)
        for chunk in _done(world, job):
            if chunk.id not in counted:
                counted.add(chunk.id)
                most = max(found.get(chunk.stage, [0, 0])[1], peak)
                found[chunk.stage] = [chunk.memory_bytes, most]
    return found


def _done(world: World, job: str) -> list[Chunk]:
    with reading(world.engine) as session:
        asked = select(Chunk).where(Chunk.job_id == job, Chunk.state == "done")
        return list(session.scalars(asked))


def _status(name: str) -> int:
    """Return a figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
