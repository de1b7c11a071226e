"""A device writes code that a guest runs: what is fetched afterwards is what the device wrote.

The guest is a small program that drives a device of the test's own. Each round it has the device put a function into
memory, which returns the round's number, and calls it; then it asks for the next one at the same place.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

from tests.vmm.guest_program import HEADER_BYTES, TEXT
from vmm import EndKind, MicroVm, VmConfig
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.queue import Chain, Queue
from vmm.engine.rv64.assembler import assemble

ROUNDS = 150  # more than the stores after which the engine takes a page for data
PAGE_START = 0x8050_0000
ACROSS_PAGES = 0x8050_0FFC  # the first instruction is the last one of its page
FUNCTION = "li a0, {round}\nret"

DRIVER = """
    .equ SLOT, 0x10001000
    .equ TABLE, 0x80400000
    .equ AVAILABLE, 0x80401000
    .equ USED, 0x80402000
    .equ SHARED, 0x80403000     # for hart 1: the round, its answer, the round that it has done

    li   s0, SLOT               # 3.1.1: reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK, queues, DRIVER_OK
    sw   zero, 0x70(s0)
    li   t0, 1
    sw   t0, 0x70(s0)
    li   t0, 3
    sw   t0, 0x70(s0)
    li   t0, 1                  # VERSION_1 is bit 0 of word 1
    sw   t0, 0x24(s0)
    sw   t0, 0x20(s0)
    li   t0, 11
    sw   t0, 0x70(s0)
    sw   zero, 0x30(s0)
    li   t0, 1                  # a queue of one entry
    sw   t0, 0x38(s0)
    li   s1, TABLE
    sw   s1, 0x80(s0)
    li   s3, AVAILABLE
    sw   s3, 0x90(s0)
    li   s4, USED
    sw   s4, 0xa0(s0)
    li   t0, 1
    sw   t0, 0x44(s0)
    li   t0, 15
    sw   t0, 0x70(s0)

    li   s2, CODE               # the only buffer: 8 bytes of code for the device to write
    sd   s2, 0(s1)
    li   t0, 8
    sw   t0, 8(s1)
    li   t0, 2
    sh   t0, 12(s1)
    li   s5, 0
    li   s6, ROUNDS
    li   s7, SHARED
    START

round:
    addi s5, s5, 1
    sh   s5, 2(s3)
    fence rw, rw
    sw   zero, 0x50(s0)
served:
    lhu  t0, 2(s4)
    bne  t0, s5, served
    FENCE
    jalr ra, 0(s2)
    bne  a0, s5, wrong
    jalr ra, 0(s2)
    bne  a0, s5, wrong
    SHARE
    bne  s5, s6, round
    li   a0, 'y'
    j    end
wrong:
    li   a0, 'n'
end:
    li   a7, 0x4442434e         # SBI: print a0, shut down
    li   a6, 2
    ecall
    li   a7, 0x53525354
    li   a6, 0
    li   a0, 0
    li   a1, 0
    ecall

hart_1:
    li   s2, CODE
    li   s7, SHARED
    li   s5, 0
next:
    addi s5, s5, 1
told:
    ld   t0, 0(s7)
    bne  t0, s5, told
    fence rw, rw
    fence.i
    jalr ra, 0(s2)
    sd   a0, 8(s7)
    fence rw, rw
    sd   s5, 16(s7)
    j    next
"""

START_HART_1 = """
    li   a0, 1
    la   a1, hart_1
    li   a7, 0x48534d
    li   a6, 0
    ecall
"""

ASK_HART_1 = """
    fence rw, rw
    sd   s5, 0(s7)
answered:
    ld   t0, 16(s7)
    bne  t0, s5, answered
    fence rw, rw
    ld   t0, 8(s7)
    bne  t0, s5, wrong
"""


class CodeDevice(VirtioDevice):
    """Puts a function into every buffer that returns the buffer's number.

    Args:
        later: carries out the rest of a request, at once or on another thread.
    """

    DEVICE_ID: ClassVar[int] = 42
    KIND: ClassVar[str] = "code"

    def __init__(self, later: Callable[[VirtioDevice, Callable[[], None]], None]) -> None:
        super().__init__()
        self.rounds = 0
        self._later = later

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        return (1,)

    def notify(self, queue: Queue, index: int) -> None:
        for chain in queue.chains():
            self._later(self, partial(self._fill, queue, chain))

    def _fill(self, queue: Queue, chain: Chain) -> None:
        self.rounds += 1
        queue.push(chain, chain.write(assemble(FUNCTION.format(round=self.rounds))))
        queue.signal()


def at_once(device: VirtioDevice, fill: Callable[[], None]) -> None:
    fill()


def on_the_loop(device: VirtioDevice, fill: Callable[[], None]) -> None:
    def serve() -> None:
        with device.served():
            fill()

    device.host.loop.call_soon_threadsafe(serve)


def on_a_worker(device: VirtioDevice, fill: Callable[[], None]) -> None:
    def serve() -> None:
        with device.served():
            fill()

    threading.Thread(target=serve, name="code-worker", daemon=True).start()


def kernel(where: Path, code: int, fence: bool = True, two_harts: bool = False) -> Path:
    """The program as an Image file."""
    text = DRIVER.replace("CODE", hex(code)).replace("ROUNDS", str(ROUNDS)).replace("FENCE", "fence.i" if fence else "")
    text = text.replace("START", START_HART_1 if two_harts else "").replace(
        "SHARE\n", ASK_HART_1 if two_harts else "\n"
    )
    program = assemble(text, TEXT + HEADER_BYTES)
    jump = assemble(f"j {TEXT + HEADER_BYTES}", TEXT)
    header = jump + struct.pack("<IQQQIIQ8s4sI", 0, 0x20_0000, 0x1000, 0, 2, 0, 0, b"RISCV\0\0\0", b"RSC\x05", 0)
    image = where / "Image"
    image.write_bytes((header + program).ljust(0x1000, b"\0"))
    return image


def run(image: Path, device: VirtioDevice, harts: int = 1) -> str:
    """What the guest prints: y if every call returned the number of its round."""
    with MicroVm(VmConfig(kernel=image, memory_mib=8, vcpus=harts), devices=[device]) as vm:
        vm.start()
        end = vm.wait(60)
        assert end.kind is EndKind.SHUTDOWN, end.detail
        return vm.console.text


@pytest.mark.parametrize("later", [at_once, on_the_loop, on_a_worker])
@pytest.mark.parametrize("code", [PAGE_START, ACROSS_PAGES], ids=hex)
def test_code_that_a_device_wrote_is_run_after_a_fence(
    tmp_path: Path, code: int, later: Callable[[VirtioDevice, Callable[[], None]], None]
) -> None:
    device = CodeDevice(later)

    assert run(kernel(tmp_path, code), device) == "y"
    assert device.rounds == ROUNDS


@pytest.mark.parametrize("code", [PAGE_START, ACROSS_PAGES], ids=hex)
def test_on_one_hart_no_fence_is_needed(tmp_path: Path, code: int) -> None:
    # The engine drops what it decoded as soon as it hears of a write, which makes fence.i free on one hart.
    device = CodeDevice(at_once)

    assert run(kernel(tmp_path, code, fence=False), device) == "y"
    assert device.rounds == ROUNDS


@pytest.mark.parametrize("later", [at_once, on_the_loop])
@pytest.mark.parametrize("code", [PAGE_START, ACROSS_PAGES], ids=hex)
def test_another_hart_runs_what_a_device_wrote_after_a_fence_of_its_own(
    tmp_path: Path, code: int, later: Callable[[VirtioDevice, Callable[[], None]], None]
) -> None:
    device = CodeDevice(later)

    assert run(kernel(tmp_path, code, two_harts=True), device, harts=2) == "y"
    assert device.rounds == ROUNDS


def test_device_that_does_not_say_what_it_wrote_shows_that_the_guest_would_notice(tmp_path: Path) -> None:
    class Silent(CodeDevice):
        def _fill(self, queue: Queue, chain: Chain) -> None:
            self.rounds += 1
            chain.write(assemble(FUNCTION.format(round=self.rounds)))
            queue.push(chain, 0)
            queue.signal()

    assert run(kernel(tmp_path, PAGE_START), Silent(at_once)) == "n"


def test_buffer_that_a_device_forgets_ends_the_vm_with_a_report_that_names_the_device(tmp_path: Path) -> None:
    class Forgetful(CodeDevice):
        def _fill(self, queue: Queue, chain: Chain) -> None:
            chain.write(b"never given back")

    with MicroVm(VmConfig(kernel=kernel(tmp_path, PAGE_START), memory_mib=8), devices=[Forgetful(at_once)]) as vm:
        vm.start()
        end = vm.wait(60)

    assert end.kind is EndKind.CRASH
    assert end.detail == (
        "device code raised DeviceError: queue 0's buffers at descriptors [0] were taken and never given back"
    )
