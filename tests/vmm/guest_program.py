"""Small guest programs for tests of the VM: S-mode code behind a RISC-V Image header, one instruction at a time."""

from __future__ import annotations

import struct
from pathlib import Path

from vmm.engine.rv64.instructions import BY_NAME
from vmm.engine.rv64.registers import CSR_NUMBERS, X_NAMES
from vmm.sbi import DBCN, HSM, SRST

TEXT = 0x8020_0000
HEADER_BYTES = 64
UART = 0x1000_0000


class Program:
    """Code from ``TEXT`` + 64 on; labels are resolved when the image is made."""

    def __init__(self) -> None:
        self._words: list[int | tuple[str, str, dict[str, int]]] = []
        self._labels: dict[str, int] = {}
        self._data: list[tuple[str, bytes]] = []

    def label(self, name: str) -> Program:
        self._labels[name] = TEXT + HEADER_BYTES + 4 * len(self._words)
        return self

    def put(self, name: str, **operands: int | str) -> Program:
        """One instruction; register operands may be ABI names, ``csr`` a CSR's name, ``imm`` a label."""
        target = operands.get("imm")
        numbers = {key: self._number(key, value) for key, value in operands.items() if key != "imm"}
        if isinstance(target, str):
            self._words.append((name, target, numbers))
        else:
            if target is not None:
                numbers["imm"] = target
            self._words.append(BY_NAME[name].encode(**numbers))
        return self

    def load_immediate(self, register: str, value: int) -> Program:
        """Any 64-bit value, 11 bits at a time."""
        value &= (1 << 64) - 1
        highest = max(value.bit_length() - 1, 0) // 11 * 11
        self.put("addi", rd=register, rs1="zero", imm=value >> highest)
        for shift in range(highest - 11, -1, -11):
            self.put("slli", rd=register, rs1=register, imm=11)
            self.put("ori", rd=register, rs1=register, imm=value >> shift & 0x7FF)
        return self

    def load_address(self, register: str, label: str) -> Program:
        self.put("auipc", rd=register, imm=0)
        self._words.append(("addi from auipc", label, {"rd": X_NAMES.index(register), "rs1": X_NAMES.index(register)}))
        return self

    def ecall(self, extension: int, function: int, *arguments: int) -> Program:
        for index, value in enumerate(arguments):
            self.load_immediate(f"a{index}", value)
        self.load_immediate("a6", function)
        self.load_immediate("a7", extension)
        return self.put("ecall")

    def print(self, text: str) -> Program:
        for byte in text.encode():
            self.ecall(DBCN, 2, byte)
        return self

    def print_uart(self, text: str) -> Program:
        self.load_immediate("t0", UART)
        for byte in text.encode():
            self.load_immediate("t1", byte)
            self.put("sb", rs1="t0", rs2="t1", imm=0)
        return self

    def start_hart(self, hart: int, label: str, opaque: int = 0) -> Program:
        self.load_immediate("a0", hart).load_address("a1", label).load_immediate("a2", opaque)
        return self.ecall_with_registers(HSM, 0)

    def ecall_with_registers(self, extension: int, function: int) -> Program:
        return self.load_immediate("a6", function).load_immediate("a7", extension).put("ecall")

    def reset(self, kind: int = 0, reason: int = 0) -> Program:
        return self.ecall(SRST, 0, kind, reason)

    def forever(self) -> Program:
        """Count in t6 without end."""
        name = f"forever {len(self._words)}"
        return self.label(name).put("addi", rd="t6", rs1="t6", imm=1).put("jal", rd="zero", imm=name)

    def hang(self) -> Program:
        """Jump to itself, with interrupts off: what a kernel does that gave up."""
        name = f"hang {len(self._words)}"
        return self.label(name).put("jal", rd="zero", imm=name)

    def image(self) -> bytes:
        """The Image file."""
        code = b"".join(struct.pack("<I", self._resolve(at, word)) for at, word in enumerate(self._words))
        size = (HEADER_BYTES + len(code) + 4095) // 4096 * 4096 + 4096
        jump = BY_NAME["jal"].encode(rd=0, imm=HEADER_BYTES)
        header = struct.pack("<IIQQQIIQ8s4sI", jump, 0, 0x20_0000, size, 0, 2, 0, 0, b"RISCV\0\0\0", b"RSC\x05", 0)
        return (header + code).ljust(size, b"\0")

    def write(self, path: Path) -> Path:
        """The Image as a file."""
        path.write_bytes(self.image())
        return path

    def _resolve(self, at: int, word: int | tuple[str, str, dict[str, int]]) -> int:
        if isinstance(word, int):
            return word
        name, label, numbers = word
        distance = self._labels[label] - (TEXT + HEADER_BYTES + 4 * at)
        if name == "addi from auipc":
            return BY_NAME["addi"].encode(imm=distance + 4, **numbers)
        return BY_NAME[name].encode(imm=distance, **numbers)

    @staticmethod
    def _number(operand: str, value: int | str) -> int:
        if isinstance(value, int):
            return value
        return CSR_NUMBERS[value] if operand == "csr" else X_NAMES.index(value)
