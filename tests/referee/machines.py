"""The machines that run an image: `qemu-system-riscv64` and our engine.

QEMU is started without firmware (`-bios none`); a machine-mode prelude of our own opens all memory to S-mode,
delegates every trap but the supervisor's environment call, and answers that call as the harness answers our engine's:
SRST ends the run, everything else is "not supported". Guest RAM is a shared memory file, so the results are simply
read from it.

The CPU is QEMU's `rv64` reduced to what our hart implements: RV64GC, Zicsr, Zifencei, Zicntr, Sstc. A second one is
parked: with a single CPU, QEMU would translate an atomic operation as a load and a store, and report its faults as a
load's.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
from collections.abc import Sequence

from tests.referee import assembly as asm
from tests.referee.assembly import A0, A1, A7, T0, T1, T6, ZERO, Assembler
from tests.referee.case import Case, Outcome, RefereeError
from tests.referee.image import (
    COMMONS,
    COMMONS_CONTENT,
    ENTRY,
    MEMORY_BASE,
    MEMORY_SIZE,
    SBI_ANSWER,
    SRST,
    build_image,
)
from vmm.engine.base import ExitReason
from vmm.engine.rv64.hart import Rv64Engine
from vmm.memory import GuestMemory

QEMU = "qemu-system-riscv64"
_CPU = "rv64,h=off,zba=off,zbb=off,zbc=off,zbs=off,Zfh=off,v=off,svinval=off,svnapot=off,svpbmt=off,sstc=on"
_RUN_SECONDS = 30
_RUN_INSTRUCTIONS = 300_000_000

_MSTATUS, _MEDELEG, _MIDELEG, _MTVEC, _MCOUNTEREN, _MENVCFG = 0x300, 0x302, 0x303, 0x305, 0x306, 0x30A
_MSCRATCH, _MEPC, _MCAUSE, _PMPCFG0, _PMPADDR0 = 0x340, 0x341, 0x342, 0x3A0, 0x3B0
_MHARTID = 0xF14
_DELEGATED_EXCEPTIONS = 0xB1FF
_DELEGATED_INTERRUPTS = 0x222
_ECALL_FROM_S = 9
_TEST_DEVICE = 0x10_0000
_TEST_PASS, _TEST_FAIL = 0x5555, 0x3333


def _prelude() -> bytes:
    """Machine mode: from reset into the image's S-mode entry, and the environment calls it makes later."""
    code = Assembler(MEMORY_BASE)
    code.emit(asm.csrrs(T0, _MHARTID, ZERO))
    code.beq(T0, ZERO, "first")
    code.label("parked")
    code.emit(asm.WFI)
    code.jump("parked")
    code.label("first")
    for csr, value in (
        (_PMPADDR0, (1 << 54) - 1),
        (_PMPCFG0, 0x1F),
        (_MEDELEG, _DELEGATED_EXCEPTIONS),
        (_MIDELEG, _DELEGATED_INTERRUPTS),
        (_MCOUNTEREN, 7),
        (_MENVCFG, 1 << 63),
        (_MSTATUS, 1 << 11 | 2 << 32 | 2 << 34),
        (_MEPC, ENTRY),
    ):
        code.load(T0, value)
        code.emit(asm.csrrw(ZERO, csr, T0))
    code.load_address(T0, "trap")
    code.emit(asm.csrrw(ZERO, _MTVEC, T0))
    code.load_address(T0, "save")
    code.emit(asm.csrrw(ZERO, _MSCRATCH, T0), asm.MRET)

    code.align(4)
    code.label("trap")
    code.emit(asm.csrrw(T6, _MSCRATCH, T6), asm.sd(T0, T6, 0), asm.sd(T1, T6, 8))
    code.emit(asm.csrrs(T0, _MCAUSE, ZERO), asm.addi(T0, T0, -_ECALL_FROM_S))
    code.bne(T0, ZERO, "fail")
    code.load(T0, SRST)
    code.beq(T0, A7, "pass")
    code.emit(asm.csrrs(T0, _MEPC, ZERO), asm.addi(T0, T0, 4), asm.csrrw(ZERO, _MEPC, T0))
    code.emit(asm.addi(A0, ZERO, SBI_ANSWER[0]), asm.addi(A1, ZERO, SBI_ANSWER[1]))
    code.emit(asm.ld(T0, T6, 0), asm.ld(T1, T6, 8), asm.csrrw(T6, _MSCRATCH, T6), asm.MRET)
    code.label("fail")
    code.load(T1, _TEST_FAIL)
    code.jump("end")
    code.label("pass")
    code.load(T1, _TEST_PASS)
    code.label("end")
    code.load(T0, _TEST_DEVICE)
    code.emit(asm.sw(T1, T0, 0))
    code.jump("end")
    code.align(8)
    code.label("save")
    code.data(bytes(16))
    return code.assemble()


def run_on_qemu(cases: Sequence[Case]) -> list[Outcome]:
    """The outcome of every case on QEMU.

    Raises:
        RefereeError: QEMU is missing, ended otherwise than by the driver's last call, or did not end.
    """
    image = build_image(cases)
    with contextlib.ExitStack() as stack:
        file = os.memfd_create("referee-ram")
        stack.callback(os.close, file)
        os.ftruncate(file, MEMORY_SIZE)
        memory = stack.enter_context(mmap.mmap(file, MEMORY_SIZE))
        for address, content in ((MEMORY_BASE, _prelude()), (COMMONS, COMMONS_CONTENT), (ENTRY, image.content)):
            memory[address - MEMORY_BASE : address - MEMORY_BASE + len(content)] = content
        _execute(
            [
                *(
                    QEMU,
                    "-M",
                    "virt,memory-backend=ram",
                    "-smp",
                    "2",
                    "-m",
                    f"{MEMORY_SIZE >> 20}M",
                    "-cpu",
                    _CPU,
                    "-bios",
                    "none",
                ),
                *("-object", f"memory-backend-file,id=ram,size={MEMORY_SIZE},mem-path=/proc/self/fd/{file},share=on"),
                *("-nodefaults", "-display", "none", "-serial", "none", "-monitor", "none"),
            ],
            file,
        )
        return image.outcomes(
            lambda address, length: memory[address - MEMORY_BASE : address - MEMORY_BASE + length],
        )


def _execute(command: list[str], file: int) -> None:
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=(file,)
        )
    except FileNotFoundError as error:
        raise RefereeError(f"{QEMU} is not installed; the package qemu-system-misc holds it") from error
    with process:
        try:
            output, _ = process.communicate(timeout=_RUN_SECONDS)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise RefereeError(
                f"{QEMU} did not finish a batch within {_RUN_SECONDS} s; a case must not loop"
            ) from error
    if process.returncode:
        raise RefereeError(f"{QEMU} ended with status {process.returncode} instead of 0: {output.decode()[-500:]}")


def run_on_engine(cases: Sequence[Case]) -> list[Outcome]:
    """The outcome of every case on our engine, one hart.

    Raises:
        RefereeError: the hart came back for any other reason than an environment call.
    """
    image = build_image(cases)
    with GuestMemory(MEMORY_BASE, MEMORY_SIZE) as memory, Rv64Engine(memory, clock="deterministic") as engine:
        memory.write(COMMONS, COMMONS_CONTENT)
        memory.write(ENTRY, image.content)
        hart = engine.harts[0]
        hart.reset(ENTRY, 0, 0)
        while True:
            left = hart.run(_RUN_INSTRUCTIONS)
            if left.reason is not ExitReason.SBI_CALL:
                raise RefereeError(f"our hart came back with {left} at {hart.pc:#x}; it must only call SBI, and soon")
            if left.args[7] == SRST:
                return image.outcomes(memory.read)
            hart.complete_sbi(*SBI_ANSWER)
