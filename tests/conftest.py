"""Processes of pytest-xdist share the processors; else each would start threads for all and wait for the others'.

Engines, servers and programs that a test starts inherit the share and take one thread per processor of it.
"""

from __future__ import annotations

import os


def share(processors: set[int], index: int, count: int) -> set[int]:
    """The processors of process `index` of `count`: neighbours, none of another's unless there are too few."""
    ordered = sorted(processors)
    if len(ordered) < count:
        return {ordered[index % len(ordered)]}
    return set(ordered[index * len(ordered) // count : (index + 1) * len(ordered) // count])


if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # gw0, gw1, ...
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, share(os.sched_getaffinity(0), int(worker.removeprefix("gw")), count))
