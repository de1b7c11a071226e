"""The command line, whose shims have fake sandboxes: ``python -m tests.kata_lab.shim.fake_cli run ...``."""

from __future__ import annotations

import sys

from kata_lab.cli import main
from kata_lab.shim import launch

if __name__ == "__main__":
    launch.PROGRAM = ("-m", "tests.kata_lab.shim.fake")
    sys.exit(main())
