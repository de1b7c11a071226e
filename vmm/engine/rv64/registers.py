"""Names and numbers of the registers: the ABI's names, and the CSRs that an S-mode guest can see.

After the RISC-V ABIs Specification 1.0 (chapter 1) and the privileged architecture 1.12, table 2.2 and 2.3.
"""

from __future__ import annotations

X_NAMES = (
    ["zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1"]
    + [f"a{index}" for index in range(8)]
    + [f"s{index}" for index in range(2, 12)]
    + [f"t{index}" for index in range(3, 7)]
)
F_NAMES = (
    [f"ft{index}" for index in range(8)]
    + ["fs0", "fs1"]
    + [f"fa{index}" for index in range(8)]
    + [f"fs{index}" for index in range(2, 12)]
    + [f"ft{index}" for index in range(8, 12)]
)

FFLAGS, FRM, FCSR = 0x001, 0x002, 0x003
SSTATUS, SIE, STVEC, SCOUNTEREN, SENVCFG = 0x100, 0x104, 0x105, 0x106, 0x10A
SSCRATCH, SEPC, SCAUSE, STVAL, SIP, STIMECMP = 0x140, 0x141, 0x142, 0x143, 0x144, 0x14D
SATP = 0x180
CYCLE, TIME, INSTRET = 0xC00, 0xC01, 0xC02

CSR_NUMBERS: dict[str, int] = {
    "fflags": FFLAGS,
    "frm": FRM,
    "fcsr": FCSR,
    "sstatus": SSTATUS,
    "sie": SIE,
    "stvec": STVEC,
    "scounteren": SCOUNTEREN,
    "senvcfg": SENVCFG,
    "sscratch": SSCRATCH,
    "sepc": SEPC,
    "scause": SCAUSE,
    "stval": STVAL,
    "sip": SIP,
    "stimecmp": STIMECMP,
    "satp": SATP,
    "cycle": CYCLE,
    "time": TIME,
    "instret": INSTRET,
}
CSR_NAMES: dict[int, str] = {number: name for name, number in CSR_NUMBERS.items()}

#: Exception codes of scause (privileged architecture 1.12, table 4.2).
EXCEPTIONS: dict[int, str] = {
    0: "instruction address misaligned",
    1: "instruction access fault",
    2: "illegal instruction",
    3: "breakpoint",
    4: "load address misaligned",
    5: "load access fault",
    6: "store/AMO address misaligned",
    7: "store/AMO access fault",
    8: "environment call from U-mode",
    9: "environment call from S-mode",
    12: "instruction page fault",
    13: "load page fault",
    15: "store/AMO page fault",
}
