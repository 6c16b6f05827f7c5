"""Document 000's command lines, as it prints them: here, again from the cache, and as jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from core.distill.export import load_student
from scripts.train_orthogonal_codebook import main
from tests.client.service import Service
from tests.core._jax import require_jax
from tests.core.artifacts import federated_files

ROOT = Path(__file__).resolve().parents[2]
WIDTH, CLUSTERS, ROWS = 256, 3, 60
"""Document 000's is 768 wide with 142 clusters; 128 planes, as it asks for, need 256."""
FIRST = """
    --train
    --federated-model models/pearltrees_federated_nomic.pkl
    --build-canonical
    --n-components 64
    --layers 3
    --teacher rotational
    --epochs 50
    --target-cache models/rotational_targets_cache.npz
    --save-transformer models/orthogonal_transformer_rotational.pt
"""
SECOND = """
    --train
    --federated-model models/pearltrees_federated_nomic.pkl
    --build-canonical
    --n-components 128
    --layers 4
    --teacher rotational
    --epochs 100
    --target-cache models/rotational_targets_cache.npz
    --save-transformer models/orthogonal_transformer_v2.pt
"""
THIRD = """
    --train
    --federated-model models/pearltrees_federated_nomic.pkl
    --build-canonical
    --teacher jax
    --epochs 50
"""
"""As document 000 prints them (the first runs 64 components of the 128 there are)."""
NAME = "models/pearltrees_federated_nomic"
MODEL = f"--federated-model {NAME}.pkl"
QUICK = f"--train {MODEL} --epochs 4"


def write_model(folder: Path, *, seed: int = 0) -> None:
    """``models/NAME.pkl`` beside ``models/NAME/``, unit vectors, a map per cluster."""
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(ROWS, WIDTH))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    cluster_of = np.arange(ROWS) % CLUSTERS
    maps = np.stack([federated_files.rotation(WIDTH, seed=seed + c) for c in range(CLUSTERS)])
    targets = np.stack([q @ maps[c] for q, c in zip(queries, cluster_of, strict=True)])
    written = federated_files.Model(
        ids=[f"cluster_{c}" for c in range(CLUSTERS)],
        maps=maps.astype("f4"),
        queries=queries.astype("f4"),
        targets=targets.astype("f4"),
        cluster_of=cluster_of,
    )
    for name, data in written.files(name="pearltrees_federated_nomic").items():
        path = folder / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # noqa: TID251


def command(options: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "scripts" / "train_orthogonal_codebook.py"),
        *options.split(),
    ]


def run(folder: Path, options: str) -> Result:
    """Run the script in this process, which has loaded torch already."""
    with contextlib.chdir(folder):
        ended = CliRunner().invoke(main, options.split())
    assert isinstance(ended.exception, SystemExit | None), ended.exc_info
    return ended


def succeeded(folder: Path, options: str) -> str:
    ended = run(folder, options)
    assert ended.exit_code == 0, ended.stderr
    return ended.stdout


def run_as_printed(folder: Path, options: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a person does, to its success."""
    ended = subprocess.run(
        command(options),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path)
    return tmp_path


def test_the_first_two_command_lines_share_one_cache(folder: Path) -> None:
    said = run_as_printed(folder, FIRST).stdout

    models = folder / "models"
    cache = models / "rotational_targets_cache.npz"
    with np.load(cache) as file:
        assert file["targets"].shape == (ROWS, WIDTH)
    with np.load(models / "pearltrees_federated_nomic.bivectors.npz") as file:
        assert file["bivectors"].shape == (CLUSTERS, WIDTH, WIDTH)
    student = load_student(models / "orthogonal_transformer_rotational.pt")
    assert student.config["n_components"] == 64
    assert student.config["layers"] == 3
    told = torch.load(models / "orthogonal_transformer_rotational.pt", weights_only=True)
    assert '"epochs": 50' in told["header"]
    for row in ("raw", "global rotation", "exact teacher", "canonical"):
        assert row in said
    before = cache.stat().st_mtime_ns, cache.read_bytes()

    succeeded(folder, SECOND)

    assert (cache.stat().st_mtime_ns, cache.read_bytes()) == before
    student = load_student(models / "orthogonal_transformer_v2.pt")
    assert student.config["n_components"] == 128
    assert student.config["layers"] == 4
    assert not list(folder.rglob("*.part"))


def test_the_third_command_line_takes_jax_and_saves_nothing(folder: Path) -> None:
    require_jax()
    said = run_as_printed(folder, THIRD).stdout
    assert "exact teacher" in said
    made = {path.name for path in (folder / "models").iterdir()}
    assert made == {
        "pearltrees_federated_nomic",
        "pearltrees_federated_nomic.pkl",
        "pearltrees_federated_nomic.bivectors.npz",
    }


def test_a_student_of_any_sort_and_a_report(folder: Path) -> None:
    options = (
        f"{QUICK} --student rotor_product --student-option router=exact --test-split 0.3 "
        "--save-transformer out/student.pt --report out/report"
    )
    said = succeeded(folder, options)
    assert load_student(folder / "out" / "student.pt").config["name"] == "rotor_product"
    assert "18 queries not trained on" in said
    names = {path.name for path in (folder / "out" / "report").iterdir()}
    assert {"report.json", "report.md", "hits.png", "cosines.png", "loss_curve.png"} <= names


def test_a_codebook_alone(folder: Path) -> None:
    options = (
        "--federated-model models/pearltrees_federated_nomic.pkl --build-pca --n-components 5 "
        "--save-codebook out/planes.npz"
    )
    succeeded(folder, options)
    with np.load(folder / "out" / "planes.npz") as file:
        assert file["planes"].shape == (5, 2, WIDTH)


def test_several_models_are_put_side_by_side(folder: Path) -> None:
    write_model(folder / "other", seed=9)
    options = (
        f"{QUICK} --federated-model other/models/pearltrees_federated_nomic.pkl "
        "--teacher multi_source --student nlerp_geodesic --student-option router=learnt"
    )
    assert "nlerp_geodesic" in succeeded(folder, options)


def test_a_killed_training_goes_on_to_the_same_student(folder: Path) -> None:
    save = "--student shared_subspace --student-option subspace=4 --save-transformer"
    whole = f"{QUICK.replace('4', '60')} {save} whole.pt --train-checkpoint whole.ckpt"
    cut = f"{QUICK.replace('4', '60')} {save} cut.pt --train-checkpoint cut.ckpt"
    run_as_printed(folder, whole)  # as many threads as the one that is killed
    process = subprocess.Popen(
        command(cut), cwd=folder, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (folder / "cut.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "cut.pt").exists()

    said = run_as_printed(folder, f"{cut} --resume")

    assert "goes on after epoch" in said.stderr
    assert (folder / "cut.pt").read_bytes() == (folder / "whole.pt").read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        ("--train", 2, "Missing option '--federated-model'"),
        ("--train --federated-model models/none.pkl", 2, "does not exist"),
        ("--federated-model models/pearltrees_federated_nomic.pkl", 2, "nothing to do"),
        (f"{QUICK} --student sphinx", 2, "sphinx"),
        (f"{QUICK} --n-components 500", 1, "width 256 has 128 planes"),
        (f"{QUICK} --student-option nonsense", 2, "needed NAME=VALUE"),
        (f"{QUICK} --teacher paired --augment 0.5", 1, "training.augment 0.5"),
        (f"{QUICK} --teacher weighted_baseline --student rotor_product --student-option "
         "router=exact", 1, "routes over centroids"),
        (f"{QUICK} --resume", 2, "--resume: needs"),
        (f"{QUICK} --resume --save-transformer a.pt", 1, "there is no a.checkpoint.safetensors"),
        (f"{QUICK} --device tpu", 2, "allowed: cpu, cuda"),
        (f"{QUICK} --device cuda:99", 1, "no such device"),
        (f"{QUICK} --student rotor_product --n-components 9", 2, "--n-components: needs student"),
        (f"{QUICK} --checkpoint-path a.npz", 2, "--checkpoint-path: need --target-cache"),
        (f"{QUICK} --pca-method randomized", 2, "--pca-method: needs --build-pca"),
        (f"{MODEL} --build-pca --save-codebook a.npz --lr 0.1", 2, "--lr: need --train"),
        (f"{QUICK} --save-transformer {NAME}.pkl/a.pt", 1, f"{NAME}.pkl"),
        (f"{QUICK} --scheduler cosine --plateau-factor 0.5", 2, "plateau_factor 0.5"),
        (f"{QUICK} --api http://127.0.0.1:9 --teacher auto", 1, "about this machine alone"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_in_words(
    folder: Path, options: str, code: int, told: str
) -> None:
    before = sorted(path.name for path in folder.rglob("*"))
    ended = run(folder, options)
    assert ended.exit_code == code, ended.stderr
    assert told in ended.stderr
    left = {path.name for path in folder.rglob("*")} - set(before)
    assert left <= {"pearltrees_federated_nomic.bivectors.npz"}, "nothing half-written stays"


def test_pairs_of_your_own_are_judged_on_and_else_a_warning_stands_there(folder: Path) -> None:
    rng = np.random.default_rng(3)
    queries = rng.normal(size=(20, WIDTH)).astype(np.float32)
    np.savez(folder / "pairs.npz", query_embeddings=queries, target_embeddings=queries[::-1])

    said = succeeded(folder, f"{QUICK} --pairs pairs.npz")

    assert "20 queries not trained on" in said
    for row in ("top-1 W", "nlerp", "does not beat the raw queries"):
        assert row in said
    alone = succeeded(folder, QUICK)
    assert "Warning: these pairs are among those that the model's rotations were fitted to" in alone
    assert "beats" not in alone


def test_a_checkpoint_of_another_seed_or_teacher_is_not_gone_on_from(folder: Path) -> None:
    options = f"{QUICK} --save-transformer a.pt"
    succeeded(folder, options)
    before = (folder / "a.checkpoint.safetensors").read_bytes()
    for other, word in (("--seed 1", "another seed"), ("--top-k 2", "another teacher")):
        ended = run(folder, f"{options} {other} --resume")
        assert ended.exit_code == 1
        assert word in ended.stderr
    assert (folder / "a.checkpoint.safetensors").read_bytes() == before


def test_a_cache_of_another_model_is_refused_and_left_alone(folder: Path) -> None:
    cache = folder / "models" / "cache.npz"
    options = f"{QUICK} --target-cache models/cache.npz"
    succeeded(folder, options)
    before = cache.read_bytes()
    write_model(folder, seed=5)

    for option, word in (("", "exp(L)"), ("--bivector-cache models/fresh.npz", "targets of")):
        ended = run(folder, f"{options} {option}")
        assert ended.exit_code == 1
        assert word in ended.stderr
    assert cache.read_bytes() == before


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"))
    try:
        yield service
    finally:
        service.stop()


def cosine(said: str) -> float:
    return float(said.rsplit("validation cosine to the teacher ", 1)[1].split()[0])


def test_the_same_options_as_jobs(folder: Path, service: Service) -> None:
    options: Any = f"{FIRST} --api {service.url}"

    first = succeeded(folder, options)

    models = folder / "models"
    with np.load(models / "rotational_targets_cache.npz") as file:
        assert file["targets"].shape == (ROWS, WIDTH)
    student = load_student(models / "orthogonal_transformer_rotational.pt")
    assert student.config["n_components"] == 64
    again = succeeded(folder, f"{SECOND} --api {service.url} --save-codebook models/planes.npz")
    assert "import_cache" in again, "the file is taken in, not computed again"
    assert load_student(models / "orthogonal_transformer_v2.pt").config["layers"] == 4
    with np.load(models / "planes.npz") as file:
        assert file["planes"].shape == (128, 2, WIDTH)
    assert -1 < cosine(first) < 1
    # What a service computed is what this machine takes for its own.
    succeeded(folder, FIRST)
