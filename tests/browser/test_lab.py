"""The lab as a person sees it: JupyterLab in a browser, a terminal that is typed into, sliders that are moved.

``KATA_LAB_SCREENSHOTS`` names a directory for the pictures of the page; pytest's own is used without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.browser.jupyter import SECONDS, Notebook, browser, notebook, pictures, server

expect.set_options(timeout=SECONDS * 1000)

START = """
from kata_lab import lab
from kata_lab.runtime import Sandbox
sandbox = Sandbox.create(vcpus=1, max_vcpus=2, memory_mib=192)
await sandbox.start()
print(sandbox.state)
"""
FLOOD = """
import threading
from concurrent.futures import Future

from kata_lab.lab.terminal_view import Terminal

class Flood:
    "Prints as fast as it may, once a page shows it: 4 MB of lines with a number."
    sized, closed, begun = True, Future(), False
    def open(self, screen):
        self.screen = screen
    def resize(self, size):
        if not self.begun:
            self.begun = True
            threading.Thread(target=self.print_all).start()
    def print_all(self):
        for number in range(64):
            room = self.screen.show(b"%07d\\r\\n" % number * (65536 // 9))
            if room is not None:
                room.result()
        self.screen.say("all is printed", over=True)
    def close(self):
        pass

flood = Terminal(Flood())
flood
"""
CELLS = (
    START,
    "lab.terminal(sandbox)",
    "controls = lab.HotplugControls(sandbox)\ncontrols",
    "print(len(sandbox.containers))",
    FLOOD,
    "await sandbox.stop()\nprint(sandbox.state)",
)
SANDBOX, TERMINAL, CONTROLS, CONTAINERS, PRINTS, STOP = range(len(CELLS))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """The notebook with a sandbox that runs, and a terminal on it."""
    directory = tmp_path_factory.mktemp("lab")
    notebook(directory / "live.ipynb", CELLS)
    shown = pictures(tmp_path_factory.mktemp("pictures"))
    with server(directory) as address, browser(tmp_path_factory.mktemp("profile")) as page:
        opened = Notebook(page, address.format("live.ipynb"), shown)
        try:
            opened.open()
            opened.run(SANDBOX)
            assert opened.said(SANDBOX) == "running"
            opened.run(TERMINAL)
            yield opened
        finally:
            opened.screenshot("last")


def type_line(lab: Notebook, text: str) -> None:
    lab.cell(TERMINAL).locator(".xterm-screen").click()
    lab.page.keyboard.type(text + "\n")


def expect_line(lab: Notebook, pattern: str) -> None:
    expect(lab.cell(TERMINAL).locator(".xterm-rows")).to_contain_text(re.compile(pattern))


def test_what_is_typed_runs_in_the_guest_and_is_shown(lab: Notebook) -> None:
    expect_line(lab, "/ #")

    type_line(lab, "echo $((40 + 2)) grüße, $(uname -m)")

    expect_line(lab, "42 grüße, riscv64")
    expect(lab.cell(TERMINAL).locator(".kata-terminal-status")).to_contain_text("sh in container")


def test_what_is_pasted_arrives_as_it_is(lab: Notebook) -> None:
    lab.cell(TERMINAL).locator(".xterm-screen").click()

    lab.page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.setData("text/plain", "echo 'pasted: ✓' | tr a-z A-Z\\n");
            document.activeElement.dispatchEvent(
                new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
        }"""
    )

    expect_line(lab, "PASTED: ✓")


def test_the_guests_terminal_has_the_size_of_the_window(lab: Notebook) -> None:
    size = lab.cell(TERMINAL).locator(".kata-terminal-size")
    before = size.inner_text()

    lab.page.set_viewport_size({"width": 900, "height": 1000})
    expect(size).not_to_have_text(before)
    columns, rows = size.inner_text().split(" × ")
    type_line(lab, "stty size")

    expect_line(lab, f"{rows} {columns}")


def test_a_slider_that_is_moved_changes_the_number_of_cpus_in_the_guest(lab: Notebook) -> None:
    lab.run(CONTROLS)
    type_line(lab, "echo $(nproc) cpu")
    expect_line(lab, "1 cpu")

    lab.drag(lab.cell(CONTROLS).locator(".noUi-handle").first, 300)
    expect(lab.cell(CONTROLS)).to_contain_text("the guest has 2 vCPUs")
    type_line(lab, "echo $(nproc) cpus")

    expect_line(lab, "2 cpus")
    assert lab.screenshot("controls").stat().st_size > 0


def test_a_page_that_is_loaded_anew_finds_the_terminal_as_it_was(lab: Notebook) -> None:
    type_line(lab, "mark=here; clear; echo $mark | tr a-z A-Z")
    expect_line(lab, "HERE")
    lab.save()

    lab.open()

    expect_line(lab, "HERE")
    type_line(lab, "echo still $mark")
    expect_line(lab, "still here")


def test_a_terminal_goes_when_its_cell_is_run_again(lab: Notebook) -> None:
    lab.run(TERMINAL)
    type_line(lab, "echo new$((1 + 1))")
    expect_line(lab, "new2")

    lab.run(CONTAINERS)

    assert lab.said(CONTAINERS) == "1"


def test_what_prints_without_end_does_not_choke_the_page(lab: Notebook) -> None:
    lab.run(PRINTS)

    expect(lab.cell(PRINTS).locator(".kata-terminal-status")).to_have_text("all is printed")
    expect(lab.cell(PRINTS).locator(".xterm-rows")).to_contain_text("0000063")


def test_a_terminal_says_that_its_sandbox_is_gone(lab: Notebook) -> None:
    lab.run(STOP)

    assert lab.said(STOP) == "stopped"
    expect(lab.cell(TERMINAL).locator(".kata-terminal-over .kata-terminal-status")).to_contain_text("ended")


def test_a_terminal_says_that_its_kernel_is_gone(lab: Notebook) -> None:
    lab.restart()

    expect(lab.cell(TERMINAL).locator(".kata-terminal-status")).to_contain_text("kernel of this terminal is gone")
    lab.run(CONTAINERS)
    assert "name 'sandbox' is not defined" in lab.said(CONTAINERS)
