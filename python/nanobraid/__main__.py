"""``python -m nanobraid`` is the command ``nanobraid``."""

import sys

from nanobraid.cli import main

if __name__ == "__main__":
    sys.exit(main())
