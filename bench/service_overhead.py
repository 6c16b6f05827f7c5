"""What the service costs: the demo's chain over HTTP against the same functions in one process.

Both sides run in fresh processes with the same threads, warm (libraries loaded by a tiny chain
first), in turns. The service stores, hashes and checkpoints every chunk; the plain side writes the
same files once.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep

import numpy as np
import torch

from api.embedded import worker_env
from bench._report import Figure, options, print_table, seconds, verdict
from client import Retry, Stillroom, StillroomError
from core.distill import evaluation, fitting
from core.distill.curriculum import training_data
from core.distill.export import export_student
from core.distill.report import write_report
from core.distill.students._base import build_student
from core.distill.teachers.rotational import RotationalTeacher
from core.distill.training import TrainState, run_epochs
from core.kinds.evaluate import TIMED_ROWS, TIMED_SECONDS
from core.settings import Settings
from core.specs.clusterings import KMeans
from core.specs.students import RotorProduct
from core.specs.teachers import Rotational
from core.specs.training import Training
from core.tensors.formats import Pairs, save_federated

BAR = 1.1
DATA = Path(__file__).resolve().parents[1] / "examples" / "wordnet" / "embeddings.npz"
TINY_ROWS, TINY_CLUSTERS, CLUSTERS = 200, 4, 64
PORT = 8377


def plain(pairs_file: Path, folder: Path, *, clusters: int, seed: int) -> None:
    """Run the chain's functions one after another and write the files a user would keep."""
    with np.load(pairs_file) as data:
        queries, targets = data["query_embeddings"], data["target_embeddings"]
        pairs = Pairs([str(name) for name in data["ids"]], queries, targets)
    model = fitting.fit(pairs, KMeans(max_clusters=clusters), seed=seed)
    save_federated(folder / "model.safetensors", model)
    teacher = RotationalTeacher(model, Rotational())
    own = torch.from_numpy(teacher.own_rows(model.queries))
    answers = teacher.targets(model.queries, exclude_rows=own)
    training = Training()
    examples = training_data(teacher, answers, training, seed=seed)
    state = TrainState.start(build_student(RotorProduct(), teacher, seed), training, seed=seed)
    run_epochs(state, examples, 0, training.epochs, lambda done, total: None)
    export_student(state.result(), folder)
    judge(pairs, teacher, state, folder, seed=seed)


def judge(
    pairs: Pairs, teacher: RotationalTeacher, state: TrainState, folder: Path, *, seed: int
) -> None:
    """Evaluate, time every map and write the report, as the service's last job does."""
    student = state.result()
    rows, dropped = evaluation.held_out(pairs, teacher.model)
    queries = pairs.queries[rows].astype(np.float32)
    outputs = evaluation.baselines(teacher, queries)
    outputs["student"] = evaluation.student_vectors(student, queries)
    wanted = pairs.targets.astype(np.float32)
    judged = evaluation.evaluate(outputs, wanted, rows, seed=seed, dropped=dropped)
    write_report(folder, judged, title="plain", history=state.history)
    batch = torch.from_numpy(np.resize(queries, (TIMED_ROWS, queries.shape[1])))
    maps = evaluation.baseline_maps(teacher)
    maps["student"] = student
    for name, function in maps.items():
        if name != evaluation.RAW:
            evaluation.throughput(function, batch, seconds=TIMED_SECONDS)


def plain_seconds(settings: Settings, folder: Path, seed: int) -> float:
    """Time ``plain`` in a fresh process after a tiny warm-up."""
    command = [sys.executable, "-m", "bench.service_overhead", "--plain", str(folder)]
    threads = settings.threads or 1
    told = subprocess.run(
        [*command, "--seed", str(seed)],
        env=worker_env(settings, threads),
        check=True,
        capture_output=True,
        text=True,
    )
    return float(told.stdout.split()[-1])


def run_plain(folder: Path, seed: int) -> float:
    """Warm up on the tiny chain, then time the real one."""
    plain(folder / "tiny.npz", folder, clusters=TINY_CLUSTERS, seed=seed)
    return seconds(lambda: plain(DATA, folder, clusters=CLUSTERS, seed=seed))


@contextmanager
def service(settings: Settings) -> Iterator[Stillroom]:
    """Run ``python -m api`` on a fresh data folder."""
    env = worker_env(settings, settings.threads or 1)
    env |= {"STILL_PORT": str(settings.port), "STILL_DEVICES": '["cpu"]'}
    with (settings.data_dir / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "api"], env=env, stdout=log, stderr=log)
        client = Stillroom(f"http://127.0.0.1:{settings.port}", retry=Retry(contact_s=60))
        try:
            until = perf_counter() + 60
            while True:
                try:
                    client.ready()
                    break
                except StillroomError:
                    if perf_counter() > until:
                        raise
                    sleep(0.1)
            yield client
        finally:
            client.close()
            server.terminate()
            server.wait()


def over_http(
    client: Stillroom, pairs_file: Path, folder: Path, *, clusters: int, seed: int
) -> None:
    """Upload, submit the chain at once, wait, download."""
    pairs = client.upload(pairs_file)["sha256"]
    clustering = {"method": "kmeans", "max_clusters": clusters}
    fit = client.submit(
        {"kind": "fit_federated", "pairs": pairs, "clustering": clustering, "seed": seed}
    )
    model = f"{fit['id']}/model"
    cache = client.submit({"kind": "cache_targets", "model": model})
    student = {"model": model, "targets": f"{cache['id']}/targets", "seed": seed}
    distill = client.submit({"kind": "distill", **student})
    judged = {"pairs": pairs, "model": model, "student": f"{distill['id']}/student"}
    evaluate = client.submit({"kind": "evaluate", **judged, "seed": seed})
    for job in (fit, cache, distill, evaluate):
        ended = client.wait(job["id"])
        if ended["state"] != "succeeded":
            raise RuntimeError(f"{ended['kind']} {ended['state']}: {ended['error']}")
    made = {**client.get(distill["id"])["artifacts"], **client.get(evaluate["id"])["artifacts"]}
    for name in ("student_pt", "report_md"):
        client.download(made[name], folder / name, overwrite=True)


def http_seconds(settings: Settings, folder: Path, seed: int) -> float:
    """Time the chain over HTTP on a warm service."""
    with service(settings) as client:
        over_http(client, folder / "tiny.npz", folder, clusters=TINY_CLUSTERS, seed=seed)
        return seconds(lambda: over_http(client, DATA, folder, clusters=CLUSTERS, seed=seed))


def make_tiny(path: Path) -> None:
    """Write the first few pairs, for warming up."""
    with np.load(DATA) as data:
        np.savez(path, **{name: data[name][:TINY_ROWS] for name in data.files})


def main() -> int:
    """Measure in turns and compare."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side, summed")
    parser.add_argument("--threads", type=int, default=2, help="of the worker and of the process")
    parser.add_argument("--plain", type=Path, help="internal: the plain side alone")
    parser.add_argument("--seed", type=int, default=0, help="internal: of the plain side")
    told = parser.parse_args()
    if told.plain is not None:
        print(run_plain(told.plain, told.seed))
        return 0
    rows = []
    for seed in range(told.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_tiny(folder / "tiny.npz")
            settings = Settings(data_dir=folder, port=PORT, threads=told.threads)
            alone = plain_seconds(settings, folder, seed)
            served = http_seconds(settings, folder, seed)
        rows.append((seed, alone, served, served / alone))
    print_table(["seed", "one process, s", "over HTTP, s", "ratio"], rows)
    ratio = sum(row[2] for row in rows) / sum(row[1] for row in rows)
    figure = Figure("wall time over HTTP / in one process", ratio, BAR, at_most=True)
    return verdict("service_overhead", figure, check=told.check)


if __name__ == "__main__":
    sys.exit(main())
