"""A real JupyterLab with one notebook, and headless Chromium that shows it, for tests that look at what a person sees.

Both have directories of their own, so that nothing of the person who runs the tests is read or changed. The browser is
the machine's Chromium, which Playwright drives and does not bring along.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
import psutil
import pytest
from playwright.sync_api import Locator, Page, sync_playwright

SCREENSHOTS = "KATA_LAB_SCREENSHOTS"  # variable of the environment: a directory for pictures of the page
SECONDS = 120.0  # for what takes two seconds on an idle machine
END_SECONDS = 30.0  # that the server may take to end its kernels before all are killed
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
DISABLED = ("@jupyterlab/apputils-extension:announcements",)  # asks the network


def notebook(path: Path, cells: Sequence[str]) -> Path:
    """Write a notebook of code cells."""
    document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    document.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(document, path)
    return path


@contextlib.contextmanager
def server(directory: Path) -> Iterator[str]:
    """JupyterLab over the notebooks of ``directory``; gives its address, which ends with what lets one in."""
    token, private = secrets.token_hex(16), directory / ".jupyter"
    (private / "config" / "labconfig").mkdir(parents=True)
    page_config = {"disabledExtensions": dict.fromkeys(DISABLED, True)}
    (private / "config" / "labconfig" / "page_config.json").write_text(json.dumps(page_config))
    places = {f"JUPYTER_{each}_DIR": str(private / each.lower()) for each in ("CONFIG", "DATA", "RUNTIME")}
    environment = {**os.environ, **places, "IPYTHONDIR": str(private / "ipython"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"),
        *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={directory}"),
        "--LabApp.extension_manager=readonly",
    ]
    log = directory / "server.log"
    with log.open("wb") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
    try:
        yield f"{_address(process, private / 'runtime', log)}/doc/tree/{{}}?token={token}"
    finally:
        _end(process)


def _address(process: subprocess.Popen[bytes], runtime: Path, log: Path) -> str:
    described = runtime / f"jpserver-{process.pid}.json"
    deadline = time.monotonic() + SECONDS
    while True:
        with contextlib.suppress(OSError, ValueError):
            return str(json.loads(described.read_text())["url"]).rstrip("/")
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"JupyterLab does not start: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, which ends its kernels; what is left after a while is killed."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(family)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of headless Chromium."""
    program = next((found for each in CHROMIUM if (found := shutil.which(each))), None)
    if program is None:
        pytest.fail("Chromium is not installed: install the Debian package chromium")
    with sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            profile,
            executable_path=program,
            args=list(QUIET),
            headless=True,
            viewport={"width": 1280, "height": 1000},
        )
        try:
            page = context.pages[0]
            page.set_default_timeout(SECONDS * 1000)
            yield page
        finally:
            context.close()


class Notebook:
    """The notebook that a page shows.

    Args:
        page: of the browser.
        address: of the notebook.
        pictures: where screenshots go.
    """

    def __init__(self, page: Page, address: str, pictures: Path) -> None:
        self.page = page
        self._address = address
        self._pictures = pictures

    def open(self) -> None:
        """Load it, also anew; returns when its kernel is ready."""
        self.page.goto(self._address)
        self.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        self.page.get_by_text("| Idle").wait_for()

    def cell(self, number: int) -> Locator:
        """A cell, from 0."""
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(number)

    def run(self, number: int) -> None:
        """Run a cell; returns when it has ended."""
        cell = self.cell(number)
        cell.locator(".cm-content").click()
        before = cell.locator(".jp-InputArea-prompt").first.inner_text()
        self.page.keyboard.press("Control+Enter")
        done = "([cell, before]) => { const said = cell.innerText.trim(); return said !== before && /\\d/.test(said); }"
        prompt = cell.locator(".jp-InputArea-prompt").first.element_handle()
        self.page.wait_for_function(done, arg=[prompt, before.strip()])

    def said(self, number: int) -> str:
        """The text of a cell's last output."""
        return self.cell(number).locator(".jp-OutputArea-output").last.inner_text().strip()

    def drag(self, handle: Locator, right: float) -> None:
        """Take something with the mouse and move it to the right, in pixels."""
        handle.scroll_into_view_if_needed()
        place = handle.bounding_box()
        assert place is not None
        x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + right, y, steps=5)
        self.page.mouse.up()

    def restart(self) -> None:
        """Restart the kernel, by the menu."""
        self.page.get_by_role("menuitem", name="Kernel").click()
        self.page.get_by_text("Restart Kernel…").click()
        self.page.locator(".jp-Dialog button.jp-mod-warn").click()

    def save(self) -> None:
        """Save the notebook; returns when that is done."""
        with self.page.expect_response(lambda each: each.request.method == "PUT" and "contents" in each.url):
            self.page.get_by_role("button", name=re.compile("^Save and")).first.click()

    def screenshot(self, name: str) -> Path:
        """Keep a picture of the page."""
        path = self._pictures / f"{name}.png"
        self.page.screenshot(path=path)
        return path


def pictures(otherwise: Path) -> Path:
    """Where screenshots go."""
    place = Path(os.environ.get(SCREENSHOTS) or otherwise)
    place.mkdir(parents=True, exist_ok=True)
    return place
