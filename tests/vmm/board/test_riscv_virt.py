"""The board as a whole: the device tree and the wiring must agree with the bus."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from vmm.board.fdt import Node, read_fdt
from vmm.board.riscv_virt import (
    INTERRUPT_SOURCES,
    PLIC_BASE,
    RAM_BASE,
    UART_BASE,
    UART_INTERRUPT,
    Chosen,
    RiscvVirtBoard,
    virtio_address,
    virtio_interrupt,
)
from vmm.console import Console
from vmm.errors import ConfigError
from vmm.memory import GuestMemory


class Harts:
    """Stands for the harts: the level of each one's supervisor external interrupt."""

    def __init__(self, count: int) -> None:
        self.levels = [False] * count
        self.outputs = [partial(self.levels.__setitem__, hart) for hart in range(count)]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(RAM_BASE, 128 << 20) as made:
        yield made


def nothing(level: bool) -> None:
    """A hart that does not listen."""


def all_nodes(tree: Node) -> Iterator[Node]:
    yield tree
    for child in tree.children:
        yield from all_nodes(child)


def test_guest_prints_and_reads_through_the_bus(memory: GuestMemory) -> None:
    console = Console()
    board = RiscvVirtBoard(memory, console, [nothing])

    for byte in b"hi":
        board.bus.write(UART_BASE, 1, byte)
    console.write("x")

    assert console.output == b"hi"
    assert board.bus.read(UART_BASE, 1) == ord("x")


def test_typing_interrupts_the_hart_that_enabled_the_uart(memory: GuestMemory) -> None:
    harts, console = Harts(3), Console()
    board = RiscvVirtBoard(memory, console, harts.outputs)
    board.bus.write(PLIC_BASE + 4 * UART_INTERRUPT, 4, 1)
    board.bus.write(PLIC_BASE + 0x2000 + 0x80 * 2, 4, 1 << UART_INTERRUPT)
    board.bus.write(UART_BASE + 1, 1, 1)
    assert harts.levels == [False, False, False]

    console.write("x")
    assert harts.levels == [False, False, True]
    claimed = board.bus.read(PLIC_BASE + 0x20_0004 + 0x1000 * 2, 4)
    board.bus.read(UART_BASE, 1)
    board.bus.write(PLIC_BASE + 0x20_0004 + 0x1000 * 2, 4, claimed)

    assert claimed == UART_INTERRUPT
    assert harts.levels == [False, False, False]


def test_every_device_in_the_tree_answers_on_the_bus(memory: GuestMemory) -> None:
    board = RiscvVirtBoard(memory, Console(), [nothing], slots=12)
    tree = read_fdt(board.build_fdt(Chosen()))

    described = {}
    for each in tree.find("/soc").children:
        base_high, base, size_high, size = each.cells("reg")
        described[base_high << 32 | base] = size_high << 32 | size

    assert described == {each.base: each.size for each in board.bus.attachments}


def test_interrupts_in_the_tree_are_all_different(memory: GuestMemory) -> None:
    tree = RiscvVirtBoard(memory, Console(), [nothing], slots=64).device_tree(Chosen())

    used = [each.cells("interrupts")[0] for each in all_nodes(tree) if "interrupts" in each.properties]

    assert len(set(used)) == len(used) == 65
    assert all(1 <= number <= INTERRUPT_SOURCES for number in used)


def test_each_hart_has_one_supervisor_context(memory: GuestMemory) -> None:
    tree = RiscvVirtBoard(memory, Console(), [nothing] * 4).device_tree(Chosen())
    controllers = [tree.find(f"/cpus/cpu@{hart}/interrupt-controller").cells("phandle")[0] for hart in range(4)]

    wired = tree.find(f"/soc/interrupt-controller@{PLIC_BASE:x}").cells("interrupts-extended")

    assert wired == tuple(cell for phandle in controllers for cell in (phandle, 9))
    phandles = [each.cells("phandle")[0] for each in all_nodes(tree) if "phandle" in each.properties]
    assert len(set(phandles)) == len(phandles) == 5


def test_tree_describes_harts_and_memory(memory: GuestMemory) -> None:
    tree = RiscvVirtBoard(memory, Console(), [nothing] * 2, mmu="riscv,sv39").device_tree(Chosen())
    hart = tree.find("/cpus/cpu@1")

    assert tree.find("/memory@80000000").cells("reg") == (0, RAM_BASE, 0, 128 << 20)
    assert tree.find("/cpus").cells("timebase-frequency") == (10_000_000,)
    assert hart.strings("riscv,isa") == ("rv64imafdc_zicsr_zifencei_zihintpause_zicntr_sstc",)
    assert hart.strings("riscv,isa-base") == ("rv64i",)
    assert hart.strings("riscv,isa-extensions") == (*"imafdc", "zicsr", "zifencei", "zihintpause", "zicntr", "sstc")
    assert hart.strings("mmu-type") == ("riscv,sv39",)


def test_kernel_is_told_what_was_chosen(memory: GuestMemory) -> None:
    board = RiscvVirtBoard(memory, Console(), [nothing])

    chosen = board.device_tree(Chosen("console=ttyS0 quiet", (0x8300_0000, 0x8312_3456))).find("/chosen")

    assert chosen.strings("bootargs") == ("console=ttyS0 quiet",)
    assert chosen.cells("linux,initrd-start") == (0, 0x8300_0000)
    assert chosen.cells("linux,initrd-end") == (0, 0x8312_3456)
    assert chosen.strings("stdout-path") == ("/soc/serial@10000000",)
    assert len(chosen.properties["rng-seed"]) == 32
    assert len(chosen.properties["kaslr-seed"]) == 8


def test_seeds_repeat_only_when_a_seed_is_given(memory: GuestMemory) -> None:
    board = RiscvVirtBoard(memory, Console(), [nothing])

    assert board.build_fdt(Chosen(seed=5)) == board.build_fdt(Chosen(seed=5))
    assert board.build_fdt(Chosen(seed=5)) != board.build_fdt(Chosen(seed=6))
    assert board.build_fdt(Chosen()) != board.build_fdt(Chosen())


def test_command_line_that_linux_would_cut_off_is_refused(memory: GuestMemory) -> None:
    board = RiscvVirtBoard(memory, Console(), [nothing])
    board.build_fdt(Chosen("x" * 1023))

    with pytest.raises(ConfigError, match="command line has 1024 bytes; Linux on RISC-V takes at most 1023"):
        board.build_fdt(Chosen("x" * 1024))


def test_slots_are_placeholders(memory: GuestMemory) -> None:
    board = RiscvVirtBoard(memory, Console(), [nothing], slots=3)

    found = [board.bus.read(virtio_address(slot), 4) for slot in range(3)]

    assert found == [0x7472_6976] * 3
    assert [virtio_interrupt(slot) for slot in (0, 7, 8, 9)] == [1, 8, 9, 11]
    assert virtio_address(1) == 0x1000_2000


@pytest.mark.parametrize(
    ("harts", "slots", "mmu", "message"),
    [
        (0, 8, "riscv,sv48", "0 harts must have 1 to 64"),
        (65, 8, "riscv,sv48", "65 harts must have 1 to 64"),
        (1, 65, "riscv,sv48", "65 virtio-mmio slots must have 0 to 64"),
        (1, -1, "riscv,sv48", "-1 virtio-mmio slots"),
        (1, 8, "sv48", "MMU type 'sv48' must be one of riscv,sv39, riscv,sv48"),
    ],
)
def test_board_that_cannot_be_is_refused(memory: GuestMemory, harts: int, slots: int, mmu: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RiscvVirtBoard(memory, Console(), [nothing] * harts, slots, mmu)


def test_memory_elsewhere_is_refused() -> None:
    with (
        GuestMemory(0x4000_0000, 4096) as memory,
        pytest.raises(ConfigError, match="based at 0x80000000, not 0x40000000"),
    ):
        RiscvVirtBoard(memory, Console(), [nothing])


@pytest.mark.parametrize("source", [0, 97])
def test_interrupt_line_that_does_not_exist_is_refused(memory: GuestMemory, source: int) -> None:
    board = RiscvVirtBoard(memory, Console(), [nothing])

    with pytest.raises(ConfigError, match=f"interrupt {source} does not exist on this board; it has 1 to 96"):
        board.irq_line(source)
