"""How a bench speaks: a table, then one line that counts. Shared by every file here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter


@dataclass(frozen=True)
class Figure:
    """A measured value and the bar it must reach."""

    name: str
    value: float
    bar: float
    at_most: bool = False
    """The bar is an upper limit instead of a lower one."""

    @property
    def met(self) -> bool:
        """Whether the bar is reached; a NaN never reaches it."""
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        missed = "" if self.met else ", MISSED"
        return f"{self.name} {self.value:.3g} (bar {sign} {self.bar:.3g}{missed})"


def options(description: str | None) -> argparse.ArgumentParser:
    """Return the parser every bench starts from: ``--check`` makes a missed bar an exit of 1."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    return parser


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns, the first to the left, the others to the right."""
    lines = [[_cell(value) for value in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        first, *others = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def verdict(title: str, *figures: Figure, check: bool = True) -> int:
    """Print the line that counts; return the exit code, 1 where ``check`` and a bar is missed."""
    met = all(figure.met for figure in figures)
    print(f"{'PASS' if met else 'FAIL'} {title}: {'; '.join(map(str, figures))}", flush=True)
    return int(check and not met)


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = perf_counter()
    work()
    return perf_counter() - start


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
