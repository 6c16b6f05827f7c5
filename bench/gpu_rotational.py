"""The exponential action on a GPU: targets a second, error, logarithms; JAX beside torch.

The error is the longest row of the difference to torch.linalg.matrix_exp in float64. Compiling is
told apart: it is paid once per size and process.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench._report import Figure, options, print_table, seconds, verdict
from bench.rotation_log import haar_rotations
from core.distill.backends import Timing, time_in_turns
from core.distill.teachers.rotational_jax import jax_series
from core.errors import SpecInvalid
from core.rotations.action import Series, exp_action
from core.rotations.chebyshev import run_block
from core.rotations.logarithm import RotationLog, rotation_log
from core.rotations.mixture import Mixture

BLENDED, SAMPLE = 4, 32
SECONDS_BAR, RATE_BAR, ERROR_BAR, LOGS_BAR, APART_BAR = 0.1, 300_000, 1e-6, 5.0, 1e-5
NO_DEVICE = 2
"""Exit code of --check where there is nothing to check it on."""


@dataclass(frozen=True)
class Problem:
    """Queries, and Haar rotations that each of them blends BLENDED of."""

    queries: Tensor
    """[Q, d] float32, unit."""
    logs: RotationLog
    """Of C rotations, float64."""
    mixture: Mixture

    @classmethod
    def of(cls, rotations: Tensor, logs: RotationLog, *, queries: int, seed: int) -> Problem:
        """Draw queries and convex weights over BLENDED distinct clusters each."""
        (C, d, _), device = rotations.shape, rotations.device
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(queries, d, generator=generator)
        clusters = torch.rand(queries, C, generator=generator).topk(BLENDED).indices
        weights = torch.randn(queries, BLENDED, generator=generator).softmax(1)
        mixture = Mixture.from_topk(clusters.to(device), weights.to(device), C)
        return cls(torch.nn.functional.normalize(rows).to(device), logs, mixture)

    def error(self, answers: Tensor) -> float:
        """Longest row of the difference to the float64 exponential, over SAMPLE queries."""
        few = torch.linspace(0, len(self.queries) - 1, SAMPLE).long().to(self.queries.device)
        weights = self.mixture.rows(few).dense().double()
        gaps = []
        for row, weight in zip(few.tolist(), weights, strict=True):
            blend = torch.tensordot(weight, self.logs.bivectors, dims=1)
            exact = self.queries[row].double() @ torch.linalg.matrix_exp(blend)
            gaps.append(torch.linalg.vector_norm(answers[row].double() - exact))
        return float(torch.stack(gaps).max())


def main() -> int:
    """Choose a device; measure there."""
    args = _arguments()
    if args.cpu:
        return _measure(torch.device("cpu"), 2000, 256, 32, check=args.check)
    if not torch.cuda.is_available():
        print("gpu_rotational: no CUDA device here, nothing measured; --cpu is a small form of it")
        return NO_DEVICE if args.check else 0
    return _measure(torch.device("cuda"), 10_000, 768, 142, check=args.check)


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--cpu", action="store_true", help="a small form, JAX beside torch")
    return parser.parse_args()


def _measure(device: torch.device, queries: int, width: int, clusters: int, *, check: bool) -> int:
    """Time logarithms and actions, print the table; bars of speed count on a GPU alone."""
    draws = torch.Generator().manual_seed(0)
    rotations = haar_rotations(clusters, width, generator=draws).double().to(device)
    rotation_log(rotations[:2])  # warm
    found: list[RotationLog] = []
    log_seconds = seconds(lambda: found.append(_waited(device, lambda: rotation_log(rotations))))
    problem = Problem.of(rotations, found[0], queries=queries, seed=1)
    outputs: dict[str, Tensor] = {}
    works, missing = _works(problem, device, outputs)
    timings = time_in_turns(works, device, queries=queries)
    print(f"device: {_device_name(device)}")
    _print(timings, problem, outputs, queries=queries)
    for line in missing:
        print(line)
    print(f"{clusters} logarithms of width {width}: {log_seconds:.4g} s")
    ours = timings[0]
    figures = [
        Figure(
            "max error, 2-norm", max(map(problem.error, outputs.values())), ERROR_BAR, at_most=True
        ),
        Figure(
            "JAX and torch apart",
            math.nan if missing else max(t.difference for t in timings),
            APART_BAR,
            at_most=True,
        ),
    ]
    if device.type == "cuda":
        taken = queries / ours.queries_per_second
        figures += [
            Figure(f"seconds for {queries} targets", taken, SECONDS_BAR, at_most=True),
            Figure("queries/s", ours.queries_per_second, RATE_BAR),
            Figure(f"seconds for {clusters} logarithms", log_seconds, LOGS_BAR, at_most=True),
        ]
    return verdict("gpu_rotational", *figures, check=check)


def _works(
    problem: Problem, device: torch.device, outputs: dict[str, Tensor]
) -> tuple[dict[str, Callable[[], Tensor]], list[str]]:
    """Return what to time, torch first, and a line for what cannot run here."""
    narrow = problem.logs.bivectors.float()

    def action(name: str, series: Series) -> Callable[[], Tensor]:
        def work() -> Tensor:
            outputs[name] = exp_action(
                problem.queries, narrow, problem.mixture, norms=problem.logs.norms, series=series
            )
            return outputs[name]

        return work

    works = {"torch": action("torch", run_block)}
    try:
        works["JAX"] = action("JAX", jax_series(device))
    except SpecInvalid as error:
        return works, [f"JAX not measured: {error.message}"]
    return works, []


def _print(
    timings: tuple[Timing, ...], problem: Problem, outputs: dict[str, Tensor], *, queries: int
) -> None:
    header = [f"{queries} targets, d {problem.queries.shape[1]}", "seconds", "queries/s"]
    rows = [
        (
            timing.name,
            queries / timing.queries_per_second,
            round(timing.queries_per_second),
            timing.compile_seconds,
            problem.error(outputs[timing.name]),
        )
        for timing in timings
    ]
    print_table([*header, "compile s", "error"], rows)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, torch on {torch.get_num_threads()} threads, JAX on what cores there are"


def _waited(device: torch.device, work: Callable[[], RotationLog]) -> RotationLog:
    """Call, and wait for the device."""
    made = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return made


if __name__ == "__main__":
    sys.exit(main())
