"""The device of a worker: whether it is there, and how much memory it offers."""

import os
import subprocess
import sys
from pathlib import Path

from workers.threads import groups

PROBE_S = 120
_PROBE = """
import sys, torch
index, count = int(sys.argv[1]), torch.cuda.device_count()
if index >= count:
    sys.exit(f"torch {torch.__version__} sees {count} GPUs here")
print(torch.cuda.get_device_properties(index).total_memory)
"""


class DeviceMissing(RuntimeError):
    """No such device on this machine."""


def memory_of(device: str) -> int:
    """Return the bytes of a device's memory.

    Raises:
        DeviceMissing: it is not there, or torch cannot use it.
    """
    return machine_memory() if device == "cpu" else _gpu_memory(device)


def machine_memory(root: Path = Path("/")) -> int:
    """Return the machine's memory, or what the control group leaves of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limits.append(int((group / name).read_text()))
            except (OSError, ValueError):  # no such file, or "max"
                continue
    return min(limits)


def _gpu_memory(device: str) -> int:
    """Ask torch, in a process that ends: this one must not touch CUDA before its first chunk."""
    index = device.partition(":")[2]
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE, index],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PROBE_S,
        )
    except subprocess.TimeoutExpired:
        raise DeviceMissing(f"no answer from {device} within {PROBE_S} s") from None
    if asked.returncode:
        why = (asked.stderr.strip().splitlines() or ["torch died"])[-1]
        raise DeviceMissing(f"no device {device}: {why}")
    return int(asked.stdout)
