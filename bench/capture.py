"""Capture of two models of 135 M parameters: speed, memory, and equal bytes by several workers.

Both models have the sizes of SmolLM2-135M and random weights, or are the folders given; nothing
that is measured depends on the weights' values. "Plain" is the forward pass of both models without
their heads, over the same batches. Needs Linux, which tells a process's peak and forgets it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from bench._language_models import SMOLLM2_135M, WIDE_LAYER, random_model, random_pairs
from bench._report import Figure, options, print_table, seconds, verdict
from bench.target_cache import now_bytes, status_bytes
from core.specs.transport import Capture, Permute
from core.transport import moment_files
from core.transport.capture import capture
from core.transport.fold_folders import fold_folder
from core.transport.fold_folders import shape_of as shape_of_folder
from core.transport.fold_plans import FoldPlan
from core.transport.loading import load_model
from core.transport.memory import fold_bytes, kept_bytes, moments_bytes
from core.transport.moments import Captured, Moments, add_rows
from core.transport.pairs import Pair, make_batch, plan_batches
from core.transport.streams import run_backbone, shape_of

SPEED_BAR, RATE_BAR, MEMORY_BAR = 0.7, 0.5, 0.1
WORKERS = 4
GIVE_BACK = ["MALLOC_MMAP_THRESHOLD_=1048576"]
"""Without it glibc keeps up to some 32 MiB that were freed, and a peak is not what was held."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pass:
    """What one run of a pair of models reads."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    pairs: Sequence[Pair]
    batch_tokens: int

    @classmethod
    def of(cls, folders: Sequence[Path], asked: argparse.Namespace, *, seed: int = 0) -> Pass:
        """Load both models and draw texts of up to 512 tokens that fill ``--batches``."""
        models = [load_model(folder, device=CPU, maps=asked.permute) for folder in folders]
        ids = min(shape_of(model).vocabulary for model in models)
        longest = min(512, asked.batch_tokens)
        count = asked.batches * asked.batch_tokens // longest
        pairs = random_pairs(count, shortest=longest // 2, longest=longest, seed=seed, ids=ids)
        return cls(models[0], models[1], pairs, asked.batch_tokens)

    def capture(self, permute: Permute | None = None) -> Captured:
        """Sum all moments."""
        return capture(
            self.student,
            self.teacher,
            self.pairs,
            options=Capture(batch_tokens=self.batch_tokens),
            layer_map=range(shape_of(self.student).layers),
            permute=permute,
            report=lambda done, total: None,
        )

    @torch.no_grad()
    def plain(self, *, heads: bool = False) -> None:
        """Run both models over the same batches and keep nothing."""
        for numbers in plan_batches(self.pairs, batch_tokens=self.batch_tokens):
            batch = make_batch(self.pairs, numbers)
            for model, ids in (
                (self.student, batch.student_ids),
                (self.teacher, batch.teacher_ids),
            ):
                if heads:
                    model(input_ids=ids, use_cache=False)
                else:
                    run_backbone(model, ids)


def main() -> int:
    """Make the models, measure all four, print; return the exit code."""
    parser = options(__doc__)
    parser.add_argument("--student", type=Path, help="a model's folder; by default random weights")
    parser.add_argument("--teacher", type=Path, help="likewise")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--permute", action="store_true", help="neurons and heads too (no bars)")
    parser.add_argument("--folder", type=Path, help="where files go; by default a temporary one")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--chunks", type=int, nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.part:
        folders = asked.student, asked.teacher
        print(json.dumps(PARTS[asked.part](folders, asked)))
        return 0
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        return measure(Path(name), asked)


def measure(folder: Path, asked: argparse.Namespace) -> int:
    """Run every part, each in a process of its own."""
    folders = (
        asked.student or random_model(folder / "student", SMOLLM2_135M, seed=1),
        asked.teacher or random_model(folder / "teacher", SMOLLM2_135M, seed=2),
    )
    shapes = [shape_of_folder(path) for path in folders]
    print(
        f"student {shapes[0].parameters:,} parameters, teacher {shapes[1].parameters:,}; "
        f"{asked.threads} threads; {asked.batches} batches of at most {asked.batch_tokens} tokens"
    )
    part = Parts(folder, folders, asked)
    speed = part("speed")
    print_table(
        ["pass over both models", "seconds", "tokens/s of a text", "of plain"], speed["rows"]
    )
    rate = part("products")
    print_table(["float32 products", "GFLOP/s"], rate["rows"])
    peaks = [part("moments_memory"), part("fold_memory")]
    print_table(
        ["peak memory", "measured MiB", "formula MiB", "apart"],
        [row for peak in peaks for row in peak["rows"]],
    )
    one, several = part.workers(1), part.workers(WORKERS)
    print_table(["moments by", "SHA-256 of the sums"], [["1 worker", one], [f"{WORKERS}", several]])
    if asked.permute:
        print("with --permute no bar counts: the document permutes chosen layers alone")
        return 0
    return verdict(
        f"capture, {shapes[0].parameters / 1e6:.0f} M and {shapes[1].parameters / 1e6:.0f} M",
        Figure("speed of plain forward passes", speed["value"], SPEED_BAR),
        Figure("products of the sgemm rate", rate["value"], RATE_BAR),
        Figure("moments: memory apart from formula", peaks[0]["value"], MEMORY_BAR, at_most=True),
        Figure("fold: memory apart from formula", peaks[1]["value"], MEMORY_BAR, at_most=True),
        Figure(f"equal sums of 1 and {WORKERS} workers", float(one == several), 1),
        check=asked.check,
    )


@dataclass(frozen=True)
class Parts:
    """Runs parts of this bench as processes: what one leaves in memory is none of the others'."""

    folder: Path
    folders: tuple[Path, Path]
    asked: argparse.Namespace

    def __call__(self, part: str, *more: str, folder: Path | None = None) -> Any:
        """Return what a part prints."""
        asked = self.asked
        told = ["env", *GIVE_BACK] if part.endswith("_memory") else []
        told += [sys.executable, "-m", "bench.capture", "--part", part]
        told += ["--student", str(self.folders[0]), "--teacher", str(self.folders[1])]
        told += ["--folder", str(folder or self.folder), "--threads", str(asked.threads)]
        told += ["--batch-tokens", str(asked.batch_tokens), "--batches", str(asked.batches)]
        told += ["--repeats", str(asked.repeats), *(["--permute"] * asked.permute), *more]
        done = subprocess.run(told, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    def workers(self, count: int) -> str:
        """Capture WORKERS chunks by so many processes; return the hash of their sum in order."""
        folder = self.folder / f"chunks_{count}"
        folder.mkdir()
        shares = [[str(at) for at in range(WORKERS)][first::count] for first in range(count)]
        with ThreadPoolExecutor(count) as pool:
            for made in [
                pool.submit(self, "chunks", "--chunks", *share, folder=folder) for share in shares
            ]:
                made.result()
        paths = [folder / f"{at}.safetensors" for at in range(WORKERS)]
        summed = sha256()
        for site in moment_files.check_files(paths)["sites"]:
            for sums in moment_files.sum_site(paths, site).tensors().values():
                summed.update(sums.numpy().tobytes())
        for path in paths:
            with path.open("rb") as file:
                summed.update(file_digest(file, "sha256").digest())
            path.unlink()
        return summed.hexdigest()


def speed_part(folders: Sequence[Path], asked: argparse.Namespace) -> Any:
    """Time capture beside plain passes, in turns; the ratio is the median over the turns."""
    run = Pass.of(folders, asked)
    permute = Permute() if asked.permute else None
    works: dict[str, Callable[[], object]] = {
        "plain, without heads": run.plain,
        "plain, with heads": lambda: run.plain(heads=True),
        "capture of all moments": lambda: run.capture(permute),
    }
    run.plain()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(asked.repeats):
        for name, work in works.items():
            taken[name].append(seconds(work))
    plain = taken["plain, without heads"]
    ratios = {
        name: median(own / of for own, of in zip(plain, spent, strict=True))
        for name, spent in taken.items()
    }
    tokens = sum(len(text.student.ids) for text in run.pairs)
    rows = [[name, min(of), f"{tokens / min(of):.0f}", ratios[name]] for name, of in taken.items()]
    return {"rows": rows, "value": ratios["capture of all moments"]}


def products_part(folders: Sequence[Path], asked: argparse.Namespace) -> Any:
    """Time the moments of a batch beside a square product; both the best of many turns.

    Counted is what must be computed: of a symmetric product the upper half.
    """
    s, t = (shape_of_folder(folder).width for folder in folders)
    n, side = asked.batch_tokens, 2048
    x, y = torch.randn(n, s), torch.randn(n, t)
    square, ones = torch.randn(side, side), torch.ones(n)
    sums = Moments.zeros(s, t, device=CPU)
    needed = n * (s * (s + 1) + t * (t + 1) + 2 * s * t)
    mine, theirs = [], []
    for _ in range(5 * asked.repeats):
        mine.append(seconds(lambda: add_rows(sums, x, y, ones)))
        theirs.append(seconds(lambda: square @ square))
    rate, sgemm = needed / min(mine) / 1e9, 2 * side**3 / min(theirs) / 1e9
    rows = [[f"sgemm, {side}^3", f"{sgemm:.1f}"], [f"moments of {n} rows", f"{rate:.1f}"]]
    return {"rows": rows, "value": rate / sgemm}


def moments_memory_part(folders: Sequence[Path], asked: argparse.Namespace) -> Any:
    """Measure the peak of a capture above that of the plain passes: sums and kept rows."""
    run = Pass.of(folders, asked)
    permute = Permute() if asked.permute else None
    student, teacher = shape_of(run.student), shape_of(run.teacher)
    run.plain()
    plain = peak_of(run.plain)
    found: list[Captured] = []
    peak = peak_of(lambda: found.append(run.capture(permute))) - plain
    sums = moments_bytes(student, teacher, permute)
    kept = kept_bytes(
        student,
        teacher,
        permute,
        batch_tokens=asked.batch_tokens,
        max_tokens=max(text.tokens for text in run.pairs),
        dtype="float32",
    )
    name = f"moments ({sums / 2**20:.0f}) and kept rows ({kept / 2**20:.0f})"
    return compared(name, peak, sums + kept)


def fold_memory_part(folders: Sequence[Path], asked: argparse.Namespace) -> Any:
    """Measure the peak of two folds, each when it has run once: what that loads, it keeps."""
    folder = Path(asked.folder)
    wide = random_model(folder / "wide", WIDE_LAYER, seed=0)
    rows, apart = [], []
    for name, source in (("the student", folders[0]), ("one wide layer", wide)):
        plan = a_plan(source)
        fold_folder(source, folder / f"first {name}", plan)
        before = now_bytes()

        def fold(name: str = name, source: Path = source, plan: FoldPlan = plan) -> None:
            fold_folder(source, folder / f"second {name}", plan)

        # The plan's map was there before.
        told = fold_bytes(plan.shape, width=plan.width, maps=0, variant="global")
        found = compared(f"fold of {name}", peak_of(fold) - before, told)
        rows += found["rows"]
        apart.append(found["value"])
    return {"rows": rows, "value": max(apart)}


def a_plan(folder: Path) -> FoldPlan:
    """Return a fold by one reflection, which is a rotation as good as any, and cheap to make."""
    shape = shape_of_folder(folder)
    random = torch.Generator().manual_seed(0)
    v = torch.randn(shape.width, 1, dtype=torch.float64, generator=random)
    square = torch.eye(shape.width, dtype=torch.float64)
    square.addmm_(v, v.mT, alpha=-2 / float(v.square().sum()))
    return FoldPlan(shape, "global", {"global": square})


def chunks_part(folders: Sequence[Path], asked: argparse.Namespace) -> Any:
    """Capture some of the chunks, each of its own short texts, and write their files."""
    asked.batches, asked.batch_tokens = 1, 256
    for at in asked.chunks:
        found = Pass.of(folders, asked, seed=100 + at).capture()
        path = Path(asked.folder) / f"{at}.safetensors"
        moment_files.save_moments(path, found, facts={"run_id": "bench"})
    return asked.chunks


def peak_of(work: Callable[[], object]) -> int:
    """Return the process's peak while it works, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    work()
    return status_bytes("VmHWM")


def compared(name: str, measured: int, formula: int) -> Any:
    """Return a row of the table, and how far apart the two are."""
    apart = abs(measured / formula - 1)
    return {"rows": [[name, measured / 2**20, formula / 2**20, apart]], "value": apart}


PARTS: dict[str, Callable[[Sequence[Path], argparse.Namespace], Any]] = {
    "speed": speed_part,
    "products": products_part,
    "moments_memory": moments_memory_part,
    "fold_memory": fold_memory_part,
    "chunks": chunks_part,
}


if __name__ == "__main__":
    sys.exit(main())
