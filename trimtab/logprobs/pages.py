"""Memory that a step gives back is kept for the next one, on a CPU with glibc.

glibc returns every large block to the system when it is freed, and the system clears each page anew when it is touched again:
a step of SmolLM2 took 150,000 to 270,000 page faults, a fifth of its time (docs/decisions.md).
"""

from __future__ import annotations

import ctypes
import gc
import os
from functools import cache

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # malloc.h


@cache
def keep_pages() -> bool:
    """Ask the allocator of this process to keep what is freed. Returns whether it does: only glibc can be asked.

    The peak is what it was; after it, memory is returned by :func:`give_back` alone. Settings of the user's own in
    ``MALLOC_*_`` or in ``GLIBC_TUNABLES`` are left alone.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1), mallopt(TOP_PAD, 64 * 2**20)])


def give_back() -> None:
    """Return what is free to the system, between the stages of a run: pieces that one stage leaves would lie beside the next
    one's."""
    gc.collect()
    if keep_pages():
        ctypes.CDLL(None).malloc_trim(0)
