"""How long until a learner has a shell: ``python -m tests.browser.first_shell [RUNS]`` measures it in a real page.

Counted from the start of JupyterLab, with guests built and the CPU compiled: to the server's answer, to a page whose
kernel is ready, to the prompt in a terminal on the first sandbox.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.browser.jupyter import Notebook, browser, notebook, server

CELLS = (
    "from kata_lab import lab\n"
    "from kata_lab.runtime import Sandbox\n"
    "sandbox = Sandbox.create(memory_mib=192)\n"
    "await sandbox.start()\n"
    "lab.terminal(sandbox)",
    "await sandbox.stop()",
)


def measure(directory: Path) -> tuple[float, float, float]:
    """Seconds to the server, to the kernel, to the shell."""
    places = [directory / name for name in ("notebooks", "profile", "pictures")]
    for place in places:
        place.mkdir()
    notebooks, profile, pictures = places
    notebook(notebooks / "first.ipynb", CELLS)
    with browser(profile) as page:
        page.goto("about:blank")
        start = time.monotonic()
        with server(notebooks) as address:
            served = time.monotonic() - start
            shown = Notebook(page, address.format("first.ipynb"), pictures)
            shown.open()
            ready = time.monotonic() - start
            shown.run(0)
            page.locator(".xterm-rows").get_by_text("#").first.wait_for()
            shell = time.monotonic() - start
            shown.run(1)
    return served, ready, shell


def main() -> None:
    """Measure, and print a line for each run."""
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        with tempfile.TemporaryDirectory() as directory:
            served, ready, shell = measure(Path(directory))
        print(f"server {served:.1f} s, page and kernel {ready:.1f} s, shell {shell:.1f} s", flush=True)


if __name__ == "__main__":
    main()
