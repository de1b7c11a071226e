"""``python -m kata_lab`` is ``kata-lab``."""

from __future__ import annotations

import sys

from kata_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
