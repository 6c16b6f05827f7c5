"""Freed memory: kept for the next step of a worker, given back when it rests."""

import subprocess
import sys

import pytest

STEP = """
import resource, sys
import numpy as np
from workers import allocator

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def step():
    block = np.empty(8 << 20)  # 64 MiB
    block[:] = 1.0

if sys.argv[1] == "keep":
    assert allocator.keep_freed()
step()
kept = resident()
for _ in range(5):
    step()
grown = resident() - kept
allocator.give_back()
print(grown >> 20, kept - resident() >> 20)
"""


def run(mode: str) -> tuple[int, int]:
    """Return the MiB by which five more steps grew, and those that were kept after the first."""
    done = subprocess.run(
        [sys.executable, "-c", STEP, mode], capture_output=True, text=True, check=True
    )
    grown, kept = map(int, done.stdout.split())
    return grown, kept


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_step_uses_the_memory_of_the_one_before() -> None:
    grown, kept = run("keep")

    assert grown < 32
    assert kept >= 60
    assert run("leave")[1] < 32
