"""Document 004 through the service: 384 dimensions to 5 and 25, judged on held-out rows beside PCA.

Needs a running service (``still up``) and nothing but the client.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from client import Stillroom, StillroomError
from client.bars import job_display
from client.session import say, screen

PAIRS = Path(__file__).with_name("wordnet") / "embeddings.npz"
TRAINING = {
    "epochs": 100,
    "batch_size": 512,
    "learning_rate": 0.003,
    "epochs_per_chunk": 10,
}
CURRICULUM = {"stages": 5, "start_tau": 4.0, "end_tau": 0.5, "schedule": "exponential"}


def chain(client: Stillroom, pairs: str, training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Submit the three jobs at once: hold rows out, distil, judge."""
    about = {"labels": {"example": "document-004"}}
    held = client.submit({"kind": "hold_out", "pairs": pairs, **about})
    model = f"{held['id']}/model"
    distil = client.submit({"kind": "distill", "model": model, "training": training, **about})
    student = f"{distil['id']}/student"
    judged = client.submit({"kind": "evaluate", "model": model, "student": student, **about})
    return [dict(job) for job in (held, distil, judged)]


@click.command()
@click.option("--url", envvar="STILL_URL", default="http://127.0.0.1:8321", show_default=True)
@click.option("--api-key", envvar="STILL_API_KEY")
@click.option("--curriculum", is_flag=True, help="Temperatures from 4 to 0.5 in five stages.")
@click.option(
    "--output-dir",
    default="example-output",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
)
def main(url: str, api_key: str | None, output_dir: Path, *, curriculum: bool) -> None:
    """Distil WordNet's targets into 5 and 25 dimensions told from the queries."""
    training = {**TRAINING, "curriculum": CURRICULUM} if curriculum else TRAINING
    try:
        with Stillroom(url, api_key=api_key) as client:
            jobs = chain(client, client.upload(PAIRS)["sha256"], training)
            with job_display(screen()) as show:
                for job in jobs:
                    ended = client.wait(job["id"], show)
                    if ended["state"] != "succeeded":
                        raise click.ClickException(f"{job['kind']}: {ended['error']}")
            output_dir.mkdir(parents=True, exist_ok=True)
            report = output_dir / "report.md"
            client.download(f"{jobs[-1]['id']}/report_md", report, overwrite=True)
            student = output_dir / "student.pt"
            client.download(f"{jobs[1]['id']}/student_pt", student, overwrite=True)
    except StillroomError as error:
        raise click.ClickException(str(error)) from error
    say(report.read_text(encoding="utf-8").split("![", 1)[0])
    say(f"{student} and {report}")


if __name__ == "__main__":
    main()
