"""train_orthogonal_codebook.py against a service: the same specs, submitted as jobs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from client import Stillroom, StillroomError
from client.bars import job_display, transfers
from client.render import line
from client.session import screen
from client.views import Job
from core.errors import SpecInvalid
from scripts.codebook_plan import Plan

INTERVAL = 1000
"""Targets in a block where --checkpoint-interval does not say: document 000's."""
SMALLEST_BLOCK = 16
"""Of targets in a job."""
STUDENT_FILES = {"student_pt": ".pt", "student": ".safetensors", "student_onnx": ".onnx"}


def run(plan: Plan, url: str, api_key: str | None) -> None:
    """Submit everything at once, follow it, fetch what was asked for."""
    _refuse_what_is_local(plan)
    try:
        with Stillroom(url, api_key=api_key) as client:
            _run(plan, client)
    except StillroomError as error:
        raise click.ClickException(str(error)) from error


def _refuse_what_is_local(plan: Plan) -> None:
    files = plan.files
    local = {
        "--teacher auto": plan.measure,
        "--resume": files.resume,
        "--train-checkpoint": files.train_checkpoint is not None,
        "--checkpoint-path": files.checkpoint_path is not None,
        "--bivector-cache": files.bivector_cache is not None,
        "--report": files.report is not None,
        "--pairs": files.pairs is not None,
    }
    given = [name for name, there in local.items() if there]
    if given:
        raise SpecInvalid(
            f"{', '.join(given)} with --api: about this machine alone; a service keeps checkpoints "
            "and caches itself, goes on by itself, and judges by its kind 'evaluate'"
        )


def _run(plan: Plan, client: Stillroom) -> None:
    model = _model(plan, client)
    jobs: dict[str, Job] = {}
    shared = {"seed": plan.seed, "device": plan.job_device()}
    if plan.files.save_codebook is not None:
        codebook = plan.codebook.model_dump(mode="json")
        legacy = plan.teacher.whole_logs() and plan.codebook.method != "canonical"
        compat = {"compat": "legacy"} if legacy else {}
        spec = {"kind": "build_codebook", "model": model, "codebook": codebook, **compat, **shared}
        jobs["codebook"] = client.submit(spec)
    if plan.train:
        jobs |= _training(plan, client, model, shared)
    try:
        ended = _follow(client, jobs)
    except KeyboardInterrupt as error:
        left = ", ".join(f"{job['kind']} {job['id']}" for job in jobs.values())
        raise click.ClickException(
            f"interrupted; the service goes on with {left}. `still watch JOB` follows one, "
            "`still cancel JOB` ends it"
        ) from error
    _fetch(plan, client, ended)


def _model(plan: Plan, client: Stillroom) -> str:
    """Upload the model, or all of them side by side; return a reference."""
    found = [_upload(client, path) for path in plan.files.models]
    if len(found) == 1:
        return found[0]
    return f"{client.submit({'kind': 'combine_models', 'models': found})['id']}/model"


def _upload(client: Stillroom, path: Path) -> str:
    with transfers(screen()) as start:
        sha256: str = client.upload(path, on_progress=start(path.name))["sha256"]
    return sha256


def _training(
    plan: Plan, client: Stillroom, model: str, shared: Mapping[str, Any]
) -> dict[str, Job]:
    """Targets from the file or from the teacher, and the student trained on them."""
    teacher = plan.teacher.model_dump(mode="json")
    cache = plan.files.target_cache
    interval = plan.files.checkpoint_interval or INTERVAL
    if interval < SMALLEST_BLOCK:
        raise SpecInvalid(
            f"--checkpoint-interval {interval} with --api; allowed: {SMALLEST_BLOCK} and more"
        )
    about = {"model": model, "teacher": teacher, **shared}
    jobs: dict[str, Job] = {}
    if cache is not None and cache.exists():
        given = _upload(client, cache)
        jobs["targets"] = client.submit({"kind": "import_cache", "targets": given, **about})
    else:
        jobs["targets"] = client.submit(
            {"kind": "cache_targets", "rows_per_chunk": interval, **about}
        )
    targets = f"{jobs['targets']['id']}/targets"
    if cache is not None and not cache.exists():
        jobs["export"] = client.submit({"kind": "export_cache", "targets": targets, **shared})
    jobs["distill"] = client.submit(
        {
            "kind": "distill",
            "model": model,
            "targets": targets,
            "student": plan.student.model_dump(mode="json"),
            "training": plan.training.model_dump(mode="json"),
            **shared,
        }
    )
    return jobs


def _follow(client: Stillroom, jobs: Mapping[str, Job]) -> dict[str, Job]:
    """Show all jobs until they have ended; the first that did not succeed ends the command."""
    ended = {}
    with job_display(screen()) as show:
        for job in jobs.values():
            show(job)
        for name, job in jobs.items():
            ended[name] = client.wait(job["id"], show)
            if ended[name]["state"] != "succeeded":
                raise click.ClickException(line(ended[name]))
    return ended


def _fetch(plan: Plan, client: Stillroom, jobs: Mapping[str, Job]) -> None:
    """Put what was made where the options say; each file appears whole or not at all."""
    files = plan.files
    wanted: list[tuple[str, str, Path]] = []
    if files.save_codebook is not None:
        wanted.append(("codebook", "codebook_npz", files.save_codebook))
    if "export" in jobs and files.target_cache is not None:
        wanted.append(("export", "targets_npz", files.target_cache))
    if files.save_transformer is not None and "distill" in jobs:
        wanted += [
            ("distill", output, files.save_transformer.with_suffix(end))
            for output, end in STUDENT_FILES.items()
            if end != ".pt"
        ]
        wanted.append(("distill", "student_pt", files.save_transformer))
    for job, output, path in wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
        source = jobs[job]["artifacts"][output]
        with transfers(screen()) as start:
            client.download(source, path, overwrite=True, on_progress=start(path.name))
        click.echo(f"saved {path}")
    if "distill" in jobs:
        curve = client.metrics(jobs["distill"]["id"])["validation_cosine"]
        best = max((value for _, value in curve if value is not None), default=0.0)
        click.echo(f"validation cosine to the teacher {best:.5f}")
