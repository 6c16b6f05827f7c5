"""The main job over HTTP: fit, cache, distil and evaluate 6,000 WordNet pairs, in one go.

Starts the service itself unless --url names one.
"""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from client import Retry, Stillroom, StillroomError
from client.bars import job_display, transfers
from client.commands.files import safe_name
from client.render import duration, hits, line
from client.session import say, screen
from client.views import TERMINAL, Job

PAIRS = Path(__file__).with_name("embeddings.npz")
READY_S = 120.0
WANTED = {
    "distill": ("student_pt", "student_onnx"),
    "evaluate": ("report", "report_md", "hits", "cosines", "loss_curve"),
}
HITS = ("1", "5", "10")
HEADINGS = ("", "hit@1", "hit@5", "hit@10", "cosine to teacher", "queries/s")


def chain(client: Stillroom, pairs: str) -> dict[str, Job]:
    """Submit the four jobs at once; each names the job whose output it reads."""

    def submit(kind: str, **fields: Any) -> Job:
        about = {"kind": kind, "name": f"wordnet: {kind}", "labels": {"demo": "wordnet"}}
        return client.submit({**about, **fields})

    clustering = {"method": "kmeans", "max_clusters": 64}
    fit = submit("fit_federated", pairs=pairs, clustering=clustering, seed=0)
    model = f"{fit['id']}/model"
    cache = submit("cache_targets", model=model)
    targets, student = f"{cache['id']}/targets", {"name": "rotor_product"}
    distill = submit("distill", model=model, targets=targets, student=student)
    evaluate = submit("evaluate", pairs=pairs, model=model, student=f"{distill['id']}/student")
    return {job["kind"]: job for job in (fit, cache, distill, evaluate)}


def clear(client: Stillroom) -> None:
    """Cancel what a demo that was interrupted left in the queue; its cached work stays."""
    for job in list(client.list(labels={"demo": "wordnet"})):
        if job["state"] not in TERMINAL:
            client.cancel(job["id"])


def follow(client: Stillroom, jobs: Mapping[str, Job]) -> dict[str, Job]:
    """Show a bar per job until all have ended; the first that did not succeed ends the demo."""
    ended = {}
    with job_display(screen()) as show:
        for job in jobs.values():
            show(job)
        for kind, job in jobs.items():
            ended[kind] = client.wait(job["id"], show)
            if ended[kind]["state"] != "succeeded":
                raise click.ClickException(line(ended[kind]))
    return ended


def download(client: Stillroom, jobs: Mapping[str, Job], folder: Path) -> dict[str, Path]:
    """Fetch the student and the report; return artifact name -> file."""
    paths = {}
    with transfers(screen()) as start:
        for kind, names in WANTED.items():
            offered = {
                o["name"]: o for o in client.artifacts(jobs[kind]["id"]) if o["name"] in names
            }
            for name, output in offered.items():
                path = folder / safe_name(output["file_name"], name)
                report = start(path.name)
                paths[name] = client.download(
                    output["sha256"], path, overwrite=True, on_progress=report
                )
    return paths


def show_report(report: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Print quality beside speed, a row per way of answering."""
    rows = []
    for row in report["evaluation"]["rows"]:
        speed = metrics.get(f"queries_per_second/{row['name']}")
        hit = [f"{row['hits'][k]:.4f}" for k in HITS]
        cells = [row["name"], *hit, f"{row['cosine_mean']:.6f}"]
        rows.append([*cells, f"{speed[-1][1]:,.0f}" if speed else "-"])
    console = screen()
    if not console.is_terminal:
        for cells in (list(HEADINGS), *rows):
            say("".join(f"{cell:<20}" for cell in cells).rstrip())
        return
    table = Table(*HEADINGS, box=None, header_style="bold")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


def run(client: Stillroom, pairs: Path, folder: Path, listing: Path | None) -> None:
    """Run the whole demo against a service that is ready."""
    began = time.monotonic()
    with transfers(screen()) as start:
        uploaded = client.upload(pairs, on_progress=start(pairs.name))
    jobs = follow(client, chain(client, uploaded["sha256"]))
    paths = download(client, jobs, folder)
    for job in jobs.values():
        if job["cache_hits"]:
            say(f"{job['kind']}: {hits(job)}")
    metrics = client.metrics(jobs["evaluate"]["id"])
    show_report(json.loads(paths["report"].read_text(encoding="utf-8")), metrics)
    say(f"\nin {folder}: {', '.join(path.name for path in paths.values())}")
    say(f"took {duration(time.monotonic() - began)}")
    if listing is not None:
        named = {kind: dict(sorted(job["artifacts"].items())) for kind, job in jobs.items()}
        listing.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")


@contextmanager
def service(data_dir: Path, log: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``still up`` as long as the context lasts."""
    command = [sys.executable, "-P", "-m", "client", "up", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--data-dir", str(data_dir)], stdout=out, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_ready(client: Stillroom, process: subprocess.Popen[bytes] | None, log: Path) -> None:
    """Return once the service takes jobs; end the demo if it never does."""
    until = time.monotonic() + READY_S
    while True:
        try:
            client.ready()
        except StillroomError as error:
            if process is not None and process.poll() is not None:
                said = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
                raise click.ClickException(f"the service ended ({log}):\n{said}") from error
            if time.monotonic() > until:
                raise click.ClickException(str(error)) from error
            time.sleep(0.2)
        else:
            return


def free_port(wanted: int | None) -> int:
    """Return a port that nobody uses now: ``wanted``, or any; end the demo where it is in use."""
    with socket.socket() as probe:
        # As the server binds: what lately ended there is no reason to refuse.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise click.ClickException(
                f"port {wanted}: {error.strerror}; for a service that runs there: "
                f"--url http://127.0.0.1:{wanted}"
            ) from error
        port: int = probe.getsockname()[1]
    return port


def tell_where(url: str) -> None:
    """Say where to look."""
    say(f"dashboard  {url}/")
    say(f"API docs   {url}/docs")


@click.command()
@click.option("--url", envvar="STILL_URL", help="A running service, instead of starting one.")
@click.option("--api-key", envvar="STILL_API_KEY", help="For that service.")
@click.option(
    "--pairs",
    default=PAIRS,
    show_default="6,000 of WordNet",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Pairs of your own, in any format the service takes.",
)
@click.option(
    "--port",
    envvar="STILL_PORT",
    show_envvar=True,
    type=click.IntRange(1, 65_535),
    help="Of the service it starts. [default: a free one]",
)
@click.option(
    "--data-dir",
    envvar="STILL_DATA_DIR",
    show_envvar=True,
    default="demo-output/data",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
)
@click.option(
    "--output-dir",
    default="demo-output",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
)
@click.option("--keep", is_flag=True, help="Leave the service running until Ctrl-C.")
@click.option(
    "--json",
    "listing",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write each job's artifacts, name -> SHA-256.",
)
def demo(
    url: str | None,
    api_key: str | None,
    pairs: Path,
    port: int | None,
    data_dir: Path,
    output_dir: Path,
    listing: Path | None,
    *,
    keep: bool,
) -> None:
    """Distil a student of 64 per-cluster rotations and compare it with its teacher."""
    # A demo that is told to end takes the service it started with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    output_dir.mkdir(parents=True, exist_ok=True)
    log = output_dir / "service.log"
    try:
        if url is not None:
            with Stillroom(url, api_key=api_key, retry=Retry(limit_s=300)) as client:
                wait_ready(client, None, log)
                run(client, pairs, output_dir, listing)
                tell_where(client.url)
            return
        port = free_port(port)
        with (
            service(data_dir, log, port) as process,
            Stillroom(f"http://127.0.0.1:{port}", api_key=api_key) as client,
        ):
            say(f"starting the service ({log}) ...")
            wait_ready(client, process, log)
            tell_where(client.url)
            clear(client)
            run(client, pairs, output_dir, listing)
            if keep:
                say("the service runs until Ctrl-C")
                with suppress(KeyboardInterrupt):
                    process.wait()
        say(f"the service has stopped; start it again: still up --data-dir {data_dir}")
    except StillroomError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    demo()
