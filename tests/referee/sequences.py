"""Invents cases: legal blocks of every extension, and words near and far from legal ones.

A :class:`Recipe` is all that decides a batch, so a batch is named by it. Blocks never loop: branches go forward, a
computed jump goes to a known place or, last in its block, to nowhere. The registers that the driver lives on
(sscratch, stvec, satp) are only changed by units that put them back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from tests.referee import assembly as asm
from tests.referee import values
from tests.referee.case import (
    CSR,
    DATA_S,
    DATA_U,
    EXEC_S,
    EXEC_U,
    FS_CLEAN,
    FS_DIRTY,
    FS_INITIAL,
    FS_MASK,
    FS_OFF,
    MXR,
    PAGE,
    SIE,
    SPIE,
    SPP,
    SUM,
    Case,
)
from vmm.engine.rv64.instructions import BY_NAME, INSTRUCTIONS, Instruction

GROUPS = ("integer", "multiply", "memory", "atomic", "float", "compressed", "control", "csr", "system")

_LOADS = {"lb": 1, "lh": 2, "lw": 4, "ld": 8, "lbu": 1, "lhu": 2, "lwu": 4, "flw": 4, "fld": 8}
_STORES = {"sb": 1, "sh": 2, "sw": 4, "sd": 8, "fsw": 4, "fsd": 8}
_COMPRESSED_MEMORY = ("c.lw", "c.ld", "c.fld", "c.sw", "c.sd", "c.fsd")
_STACK_MEMORY = ("c.lwsp", "c.ldsp", "c.fldsp", "c.swsp", "c.sdsp", "c.fsdsp")
_BRANCHES = ("beq", "bne", "blt", "bge", "bltu", "bgeu")
_JUMPS = ("c.j", "c.beqz", "c.bnez")
_SYSTEM = ("fence", "fence.i", "ecall", "ebreak", "sret", "wfi", "sfence.vma")
_INTEGER = tuple(
    row.name
    for row in INSTRUCTIONS
    if row.match & 0x7F in (0x13, 0x1B, 0x33, 0x3B, 0x37)
    and row.length == 4
    and not (row.match & 0x7F in (0x33, 0x3B) and row.match >> 25 == 1)
)
_MULTIPLY = tuple(
    row.name for row in INSTRUCTIONS if row.match & 0x57 == 0x13 and row.match >> 25 == 1 and row.match & 0x20
)
_FLOAT = tuple(
    row.name for row in INSTRUCTIONS if row.length == 4 and row.match & 0x7F in (0x43, 0x47, 0x4B, 0x4F, 0x53)
)
_AMO = tuple(row.name for row in INSTRUCTIONS if row.name.startswith("amo"))
_COMPRESSED = tuple(
    row.name
    for row in INSTRUCTIONS
    if row.length == 2 and row.name not in (*_COMPRESSED_MEMORY, *_STACK_MEMORY, *_JUMPS, "c.jr", "c.jalr", "c.ebreak")
)

#: CSRs of S-mode that only units of their own may touch, since the driver or QEMU's freedom depends on them.
_GUARDED = frozenset(
    CSR[name]
    for name in (
        *("sstatus", "sie", "stvec", "scounteren", "senvcfg", "sscratch", "sepc", "scause", "stval", "sip", "stimecmp"),
        *("satp", "cycle", "time", "instret"),
    )
)
_COUNTERS = frozenset(CSR[name] for name in ("cycle", "time", "instret"))
_VS = 3 << 9
_ROUNDING = (0, 1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides a batch: a seed, how many cases, which instruction groups, how long the blocks are (in units)."""

    seed: int
    cases: int = 200
    groups: tuple[str, ...] = GROUPS
    length: int = 12
    user: float = 0.25


@dataclass(frozen=True, slots=True)
class _Forward:
    """A branch or jump over the next ``distance`` units."""

    row: Instruction
    operands: dict[str, int]
    distance: int


_Unit = bytes | _Forward


def word_bytes(*words: int) -> bytes:
    """32-bit instructions in memory order."""
    return b"".join(word.to_bytes(4, "little") for word in words)


class _Composer:
    """One block in the making: registers, which of them point into the data page, and the units so far."""

    def __init__(self, random: Random, recipe: Recipe) -> None:
        self.random = random
        self.user = random.random() < recipe.user
        self.x = [0] + [values.integer(random) for _ in range(31)]
        singles = random.choice((0.2, 0.5, 0.8))
        self.f = [values.float_register(random, singles) for _ in range(32)]
        self.pointers: dict[int, int] = {}
        self.links = False
        self.ended = False
        self.started = False
        for register in {2, random.randrange(8, 16), random.randrange(8, 16), random.randrange(1, 32)}:
            self._point(register)

    def _point(self, register: int) -> None:
        random = self.random
        window = DATA_U if self.user else DATA_S
        if random.random() < 0.06:
            window = DATA_S if self.user else DATA_U
        offset = random.randrange(0, PAGE, 16) if random.random() < 0.3 else random.randrange(1024, 3072, 16)
        self.x[register] = window + offset
        self.pointers[register] = offset

    def free(self, *, compressed: bool = False) -> int:
        """A register to write: seldom one that points, and then it does so no longer."""
        random = self.random
        register = random.randrange(8, 16) if compressed else random.randrange(32)
        for _ in range(4):
            if register not in self.pointers:
                break
            register = random.randrange(8, 16) if compressed else random.randrange(32)
        self.pointers.pop(register, None)
        return register

    def scratch(self, count: int) -> list[int]:
        """Distinct registers, none of them x0 or pointing."""
        return self.random.sample([index for index in range(1, 32) if index not in self.pointers], count)

    def word(self, row: Instruction, **fixed: int) -> bytes:
        """``row`` with random operands, except those given."""
        random = self.random
        self.pointers.pop(dict(row.bits.implied).get("rd", 0), None)
        while True:
            word = row.match | random.getrandbits(8 * row.length) & ~row.mask
            operands = {name: value for name, value in row.fields(word).items() if name in row.operands}
            for place in row.bits.fields:
                if place.name == "rd":
                    operands["rd"] = self.free(compressed=place.compressed)
                elif place.name == "rm":
                    operands["rm"] = (
                        random.choice((*_ROUNDING * 3, *(7,) * 6)) if random.random() < 0.97 else random.choice((5, 6))
                    )
            # A field that is both rd and rs1 has one value.
            if "rd" in operands and any(
                a is not b and a.low == b.low for a in row.bits.fields for b in row.bits.fields
            ):
                operands["rs1"] = operands["rd"]
            operands |= fixed
            word = row.encode(**operands)
            if row.matches(word):
                return word.to_bytes(row.length, "little")

    def pick(self, names: tuple[str, ...]) -> Instruction:
        return BY_NAME[self.random.choice(names)]

    # One method a group; each returns the units of one step.

    def integer(self) -> list[_Unit]:
        return [self.word(self.pick(_INTEGER))]

    def multiply(self) -> list[_Unit]:
        return [self.word(self.pick(_MULTIPLY))]

    def compressed(self) -> list[_Unit]:
        if self.random.random() < 0.35:
            return self._compressed_memory()
        return [self.word(self.pick(_COMPRESSED))]

    def _compressed_memory(self) -> list[_Unit]:
        near = [register for register in self.pointers if 8 <= register < 16]
        if near and self.random.random() < 0.6:
            return [self.word(self.pick(_COMPRESSED_MEMORY), rs1=self.random.choice(near))]
        if 2 in self.pointers:
            return [self.word(self.pick(_STACK_MEMORY))]
        return [self.word(self.pick(_COMPRESSED))]

    def memory(self) -> list[_Unit]:
        random = self.random
        names = {**_LOADS, **_STORES}
        name = random.choice(tuple(names))
        if not self.pointers or random.random() < 0.02:
            return [self.word(BY_NAME[name])]
        register = random.choice(tuple(self.pointers))
        width = names[name]
        kind = random.random()
        if kind < 0.8:
            low, high = -min(self.pointers[register], 2048), min(PAGE - self.pointers[register], 2048)
            offset = random.randrange(low, high, width)
            offset -= offset % width
        elif kind < 0.95:
            low, high = -min(self.pointers[register], 2048), min(PAGE - self.pointers[register], 2048)
            offset = random.randrange(low, high)
        else:
            offset = random.choice((-self.pointers[register] - 1, PAGE - self.pointers[register] - 1))
            offset = min(max(offset, -2048), 2047)
        return [self.word(BY_NAME[name], rs1=register, imm=offset)]

    def atomic(self) -> list[_Unit]:
        random = self.random
        if not self.pointers:
            return self.integer()
        register = random.choice(tuple(self.pointers))
        kind = random.random()
        if kind < 0.55:
            return [self.word(self.pick(_AMO), rs1=register)]
        size = random.choice("wd")
        load, store = BY_NAME[f"lr.{size}"], BY_NAME[f"sc.{size}"]
        if kind < 0.7:
            return [self.word(store, rs1=register)]
        (other,) = self.scratch(1)
        if kind < 0.74:
            move = word_bytes(asm.addi(other, register, random.randrange(1, 8)))
            return [move + self.word(self.pick((*_AMO, "lr.w", "lr.d")), rs1=other)]
        if kind < 0.82:
            # To an address far from the reservation: it must fail.
            move = word_bytes(asm.addi(other, register, random.choice((-1, 1)) * random.choice((256, 512, 1024))))
            return [self.word(load, rs1=register, rd=0) + move + self.word(store, rs1=other)]
        between = self.word(self.pick(_INTEGER), rd=other) if random.random() < 0.5 else b""
        pair = self.word(load, rs1=register, rd=other) + between + self.word(store, rs1=register)
        if random.random() < 0.3 and register in self.pointers:
            # The reservation is used up by the first.
            pair += self.word(store, rs1=register)
        return [pair]

    def float(self) -> list[_Unit]:
        random = self.random
        kind = random.random()
        if kind < 0.06 and self.pointers:
            return self.memory()
        units: list[_Unit] = [self.word(self.pick(_FLOAT))]
        if kind < 0.6:
            csr = random.choice(("fflags", "fflags", "fcsr"))
            row = BY_NAME["csrrw" if csr == "fflags" and random.random() < 0.6 else "csrrs"]
            units.append(self.word(row, csr=CSR[csr], rs1=0))
        elif kind < 0.66:
            mode = random.choice(_ROUNDING) if random.random() < 0.9 else random.randrange(5, 8)
            units.append(self.word(BY_NAME["csrrwi"], csr=CSR["frm"], zimm=mode))
        return units

    def control(self) -> list[_Unit]:
        random = self.random
        kind = random.random()
        distance = random.randrange(0, 5)
        if kind < 0.45:
            near = random.randrange(32)
            second = near if random.random() < 0.2 else random.randrange(32)
            return [_Forward(self.pick(_BRANCHES), {"rs1": near, "rs2": second}, distance)]
        if kind < 0.7:
            row = self.pick(_JUMPS)
            return [_Forward(row, {} if row.name == "c.j" else {"rs1": random.randrange(8, 16)}, distance)]
        self.links = True
        if kind < 0.8:
            return [_Forward(BY_NAME["jal"], {"rd": self.free()}, distance)]
        if kind < 0.85:
            return [self.word(BY_NAME["auipc"])]
        (base,) = self.scratch(1)
        start = word_bytes(asm.u_type(0x17, base, 0))
        if kind < 0.95:
            return [start + word_bytes(asm.jalr(self.free(), base, 8 + random.getrandbits(1)))]
        row = BY_NAME[random.choice(("c.jr", "c.jalr"))]
        self.pointers.pop(asm.RA, None)
        return [start + word_bytes(asm.addi(base, base, 10)) + row.encode(rs1=base).to_bytes(2, "little")]

    def csr(self) -> list[_Unit]:
        random = self.random
        row = self.pick(("csrrw", "csrrs", "csrrc", "csrrwi", "csrrsi", "csrrci"))
        if random.random() < 0.4 or self.user:
            name = random.choice(("fflags", "frm", "fcsr", "fcsr"))
            if self.user and random.random() < 0.15:
                return [self._counter()]
            if self.user and random.random() < 0.1:
                return [self.word(row, csr=random.choice(tuple(_GUARDED - _COUNTERS)))]
            return [self.word(row, csr=CSR[name])]
        if random.random() < 0.05:
            return [self.word(row, csr=self._absent_csr())]
        return [self._supervisor_csr()]

    def _counter(self) -> bytes:
        """A counter is read and forgotten: that it can be is all that two machines agree on."""
        (register,) = self.scratch(1)
        read = self.word(BY_NAME["csrrs"], rd=register, csr=self.random.choice(tuple(_COUNTERS)), rs1=0)
        return read + word_bytes(asm.addi(register, asm.ZERO, 0))

    def _absent_csr(self) -> int:
        while True:
            number = self.random.getrandbits(12)
            if number not in _GUARDED:
                return number

    def _supervisor_csr(self) -> bytes:
        """One access to a CSR of S-mode, with a value that no freedom of the specification makes ambiguous."""
        random = self.random
        value, old, other = self.scratch(3)
        name = random.choice((*("sstatus",) * 4, "sie", "sip", "sscratch", "sepc", "scause", "stval", "scounteren"))
        name = random.choice((name, name, name, "senvcfg", "stvec", "satp", "counter"))
        if name == "counter":
            return self._counter()
        if name == "satp":
            return self._reserved_satp(value, old, other)
        if name in ("sscratch", "stvec"):
            csr = CSR[name]
            load = _constant(value, random.getrandbits(20) << 2 | (name == "stvec" and random.getrandbits(1)))
            exchange = word_bytes(asm.csrrw(old, csr, value), asm.csrrw(other, csr, old), asm.addi(old, asm.ZERO, 0))
            return load + exchange
        wide = random.random() < 0.5
        content = {
            # VS is left alone: QEMU 7.2 lets it be written without vectors. SIE is left to units that expect
            # interrupts.
            "sstatus": random.getrandbits(32) & ~_VS & ~SIE
            if wide
            else random.choice((SUM, MXR, SPP, SPIE, SUM | MXR)),
            "sie": random.getrandbits(12),
            "sip": random.getrandbits(12),
            "sepc": random.getrandbits(31) & ~1,
            "scause": random.getrandbits(4),
            "stval": random.getrandbits(32),
            "scounteren": random.getrandbits(3),
            "senvcfg": random.getrandbits(1),
        }[name]
        if name in ("sie", "sip") and random.random() < 0.5:
            content &= 0x222
        # What sepc held is a code address: no wild jump may follow.
        self.links = self.links or name == "sepc"
        operation = random.choice((asm.csrrw, asm.csrrw, asm.csrrs, asm.csrrc))
        look = b""
        if name == "sstatus":
            # FS may be Dirty earlier with us than with QEMU (see `verdict.ALLOWANCES`): it must not get into registers,
            # nor may single bits of it be changed.
            content &= ~(0 if operation is asm.csrrw else FS_MASK)
            low = asm.i_type(0x13, 7, old, old, 0x7FF)
            look = word_bytes(low, asm.r_type(0x13, 5, 0, other, other, 15), asm.r_type(0x13, 1, 0, other, other, 16))
        exchange = word_bytes(operation(old, CSR[name], value), asm.csrrs(other, CSR[name], 0))
        return _constant(value, content) + exchange + look

    def _reserved_satp(self, value: int, old: int, other: int) -> bytes:
        """A write of satp with a reserved mode has no effect (volume II, 4.1.11)."""
        mode = self.random.choice((1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15))
        return word_bytes(
            asm.addi(value, asm.ZERO, mode),
            asm.r_type(0x13, 1, 1, value, value, 60 - 32),
            asm.csrrw(old, CSR["satp"], value),
            asm.csrrs(other, CSR["satp"], 0),
        )

    def system(self) -> list[_Unit]:
        random = self.random
        kind = random.random()
        if kind < 0.2:
            return [self.word(self.pick(("fence", "fence.i")))]
        if kind < 0.35 and not self.started:
            return self._rewritten_code()
        if kind < 0.42:
            # An environment call from S-mode is answered in a0 and a1.
            self.pointers.pop(asm.A0, None)
            self.pointers.pop(asm.A1, None)
            return [self.word(BY_NAME[random.choice(("ecall", "ebreak", "c.ebreak"))])]
        if kind < 0.5 and not self.links:
            self.ended = True
            return [self.word(BY_NAME["jalr"])]
        if self.user:
            return (
                [self.word(BY_NAME[random.choice(("ecall", "sret", "wfi", "sfence.vma"))])]
                if kind < 0.55
                else self.csr()
            )
        if kind < 0.65:
            return [self.word(BY_NAME["sfence.vma"])]
        if kind < 0.75:
            return [self._supervisor_return()]
        return [self._interrupt()]

    def _supervisor_return(self) -> bytes:
        """SRET to the next unit; into U-mode (where its page may not be executed) unless SPP was set."""
        target, status = self.scratch(2)
        self.links = True
        prepare = b""
        if self.random.random() < 0.8:
            prepare = _constant(status, self.random.choice((SPP, SPP | SPIE))) + word_bytes(
                asm.csrrs(0, CSR["sstatus"], status)
            )
        go = (asm.u_type(0x17, target, 0), asm.addi(target, target, 16), asm.csrrw(0, CSR["sepc"], target), asm.SRET)
        return prepare + word_bytes(*go)

    def _interrupt(self) -> bytes:
        """A software or timer interrupt becomes pending and enabled, in any order; half the time for WFI to find."""
        (bit,) = self.scratch(1)
        random = self.random
        if random.random() < 0.5:
            pending = word_bytes(asm.csrrw(0, CSR["stimecmp"], 0))
            number = 0x20
        else:
            pending = word_bytes(asm.csrrwi(0, CSR["sip"], 2))
            number = 2
        enable = _constant(bit, number) + word_bytes(asm.csrrs(0, CSR["sie"], bit))
        steps = [pending, enable]
        random.shuffle(steps)
        if random.random() < 0.5:
            closed = word_bytes(0x1001_7073)  # csrrci x0, sstatus, 2
            return closed + steps[0] + steps[1] + word_bytes(asm.WFI)
        return steps[0] + steps[1] + word_bytes(0x1001_6073)  # csrrsi x0, sstatus, 2

    def _rewritten_code(self) -> list[_Unit]:
        """Store an instruction and a return, FENCE.I, call them; then other ones at the same place."""
        random = self.random
        if len(self.pointers) > 3:
            self.pointers.pop(next(iter(self.pointers)))
        first, second, base, writer, link = self.scratch(5)
        offset = random.randrange(256, 3840, 2)
        for register in (first, second):
            target = random.choice([index for index in range(32) if index not in (second, base, writer, link)])
            row = self.pick(("addi", "xori", "slli", "addiw"))
            self.pointers.pop(target, None)
            word = row.encode(rd=target, rs1=random.randrange(32), imm=random.randrange(32))
            self.x[register] = word | asm.jalr(asm.ZERO, link) << 32
        self.x[base] = (EXEC_U if self.user else EXEC_S) + offset
        self.x[writer] = (DATA_U if self.user else DATA_S) + offset if random.random() < 0.5 else self.x[base]
        self.links = True
        call = (asm.FENCE_I, asm.jalr(link, base))
        return [word_bytes(asm.sd(first, writer, 0), *call, asm.sd(second, writer, 0), *call)]


def _constant(register: int, value: int) -> bytes:
    """register = value, 0..2^32-1, by two shifts; nothing but ``register`` changes."""
    high, middle, low = value >> 21, value >> 10 & 0x7FF, value & 0x3FF
    shift = asm.r_type(0x13, 1, 0, register, register, 0)
    steps = [asm.addi(register, asm.ZERO, high), shift | 11 << 20, asm.i_type(0x13, 6, register, register, middle)]
    return word_bytes(*steps, shift | 10 << 20, asm.i_type(0x13, 6, register, register, low))


def _resolve(units: list[_Unit]) -> tuple[bytes, ...]:
    positions = [0]
    for unit in units:
        positions.append(positions[-1] + (len(unit) if isinstance(unit, bytes) else unit.row.length))
    resolved = []
    for index, unit in enumerate(units):
        if isinstance(unit, bytes):
            resolved.append(unit)
            continue
        target = positions[min(index + 1 + unit.distance, len(units))]
        offset = target - positions[index]
        limit = 1 << unit.row.bits.immediate_bits - 1
        offset = offset if offset < limit else unit.row.length
        resolved.append(unit.row.encode(**unit.operands, imm=offset).to_bytes(unit.row.length, "little"))
    return tuple(resolved)


def _status(random: Random) -> int:
    states = (*(FS_DIRTY,) * 12, *(FS_INITIAL,) * 4, *(FS_CLEAN,) * 6, FS_OFF)
    return random.choice(states) | random.choice((0, 0, SUM, MXR, SUM | MXR)) | random.choice((0, SPIE))


def _data(random: Random) -> bytes:
    page = bytearray(random.randbytes(PAGE))
    for at in range(0, PAGE, 64):
        page[at : at + 8] = values.double(random).to_bytes(8, "little")
        page[at + 8 : at + 12] = values.single(random).to_bytes(4, "little")
        page[at + 16 : at + 24] = values.integer(random).to_bytes(8, "little")
    return bytes(page)


def generate(recipe: Recipe) -> list[Case]:
    """The batch that ``recipe`` names: always the same."""
    random = Random(recipe.seed)
    pages = [_data(random) for _ in range(4)]
    cases = []
    for index in range(recipe.cases):
        composer = _Composer(random, recipe)
        steps: dict[str, Callable[[], list[_Unit]]] = {name: getattr(composer, name) for name in GROUPS}
        units: list[_Unit] = []
        length = random.randrange(1, recipe.length + 1)
        while len(units) < length and not composer.ended:
            units += steps[random.choice(recipe.groups)]()
            composer.started = True
        cases.append(
            Case(
                units=_resolve(units),
                x=tuple(composer.x),
                f=tuple(composer.f),
                fcsr=random.choice((*_ROUNDING * 6, 5, 6, 7)) << 5 | random.choice((0, random.getrandbits(5))),
                sstatus=_status(random),
                user=composer.user,
                data=random.choice(pages),
                title=f"case {index} of {recipe}",
            )
        )
    return cases


def is_safe_word(word: int, *, user: bool) -> bool:
    """Whether a word of unknown meaning can stand alone in a case: it cannot loop, wait or disarm the driver."""
    opcode, funct3 = word & 0x7F, word >> 12 & 7
    if word & 3 != 3:
        return not (word & 3 == 1 and word >> 13 & 7 in (5, 6, 7))
    if opcode == 0x6F or (opcode == 0x63 and funct3 not in (2, 3)):
        return False
    if opcode != 0x73:
        return True
    if funct3 == 0:
        return user or word not in (asm.SRET, asm.WFI)
    return word >> 20 not in (_COUNTERS if user else _GUARDED)


def lone_words(words: list[int], seed: int) -> list[Case]:
    """Cases of one word each: 16 bits where the lowest two say so, else 32."""
    random = Random(seed)
    recipe = Recipe(seed)
    page = _data(random)
    template = []
    for user in (False, True):
        composer = _Composer(random, replace(recipe, user=float(user)))
        # x0 aside, every register points into the data page: what looks like an access is one.
        composer.x = [0] + [(DATA_U if user else DATA_S) + random.randrange(1024, 3072, 16) for _ in range(31)]
        template.append(composer)
    cases = []
    for word in words:
        user = random.random() < 0.25
        if not is_safe_word(word, user=user):
            continue
        composer = template[user]
        size = 4 if word & 3 == 3 else 2
        unit = (word & (1 << 8 * size) - 1).to_bytes(size, "little")
        cases.append(
            Case(
                units=(unit,),
                x=tuple(composer.x),
                f=tuple(composer.f),
                sstatus=FS_DIRTY,
                user=user,
                data=page,
                title=f"word {word:#x}",
            )
        )
    return cases


def near_misses(seed: int, count: int) -> list[int]:
    """Words one or two bits away from a legal instruction."""
    random = Random(seed)
    composer = _Composer(random, Recipe(seed))
    words = []
    for _ in range(count):
        row = random.choice(INSTRUCTIONS)
        word = int.from_bytes(composer.word(row), "little")
        for _ in range(random.choice((0, 1, 1, 2))):
            word ^= 1 << random.randrange(8 * row.length)
        words.append(word)
    return words
