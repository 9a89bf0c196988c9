"""Memory that a step gives back is kept for the next one, on a CPU with glibc; and few of oneDNN's kernels are kept.

glibc returns every large block to the system when it is freed, and the system clears each page anew when it is touched again:
a step of SmolLM2 took 150,000 to 270,000 page faults, a fifth of its time (docs/decisions.md).

oneDNN writes a kernel for every shape of a bfloat16 product, 0.3 MB each, and keeps the last 1,024 of them; torch's interface to
it keeps 1,024 of its own. Without padding nearly every row has a shape of its own: 0.6 GB of kernels.
"""

from __future__ import annotations

import ctypes
import gc
import os
from functools import cache

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # malloc.h
# More than a layer's products have shapes in one microbatch: with fewer, each layer would write them anew.
KERNELS = 128


def keep_few_kernels() -> None:
    """Ask oneDNN to keep :data:`KERNELS` shapes, in this process. It reads this before its first product; what the user
    has set stays."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


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
