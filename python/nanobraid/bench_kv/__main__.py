"""``python -m nanobraid.bench_kv`` is the command ``nanobraid bench-kv``."""

import sys

from nanobraid.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench-kv", *sys.argv[1:]]))
