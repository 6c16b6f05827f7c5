"""What a worker does with memory that its libraries have freed: it keeps it for their next step.

By its defaults the C library gives each large block back to the kernel as soon as it is freed, and
the next step of a blend pays for every page of it again: a seventh of the time of the targets that
`bench/fanout_scaling.py` computes, and more where two workers do it at once.
"""

import ctypes

KEPT_BYTES = 1 << 30
"""Freed memory that is kept at most, and the size from which a block goes back at once."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""


def keep_freed() -> bool:
    """Keep freed memory from now on; False where the C library has no such setting."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # musl, macOS
        return False
    names = (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD)
    return all(library.mallopt(name, ctypes.c_int(KEPT_BYTES)) == 1 for name in names)


def give_back() -> None:
    """Give what is kept back to the kernel: others on this machine may need it."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
