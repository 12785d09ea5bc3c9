"""How many threads the engines of tests compute with: two if this process has two processors, else one.

A team that is larger than its processors spins at every barrier. That tokens are the same with any number is in
test_equivalence.py and test_cli.py.
"""

from __future__ import annotations

import os

THREADS = min(2, len(os.sched_getaffinity(0)))
OTHER_THREADS = 3 - THREADS
