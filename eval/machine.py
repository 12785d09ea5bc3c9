"""The machine that speed is measured on: what else runs on it, how fast it reads memory."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

READ_BYTES = 256 << 20  # of each thread; beyond any cache


def load_average() -> float:
    """Processes that ran or waited for a processor, over the last minute."""
    return os.getloadavg()[0]


def read_bandwidth(threads: int) -> float:
    """GB/s of summing 256 MB per thread, on 2 MB pages where the system gives them; the median of five runs."""
    arrays = [_on_huge_pages(READ_BYTES) for _ in range(threads)]
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(np.sum, arrays))
            rates.append(sum(a.nbytes for a in arrays) / (time.perf_counter() - begin) / 1e9)
    return statistics.median(rates)


def _on_huge_pages(num_bytes: int) -> NDArray[np.int64]:
    # The array keeps the mapping alive.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.int64)
    array[:] = 1
    return array
