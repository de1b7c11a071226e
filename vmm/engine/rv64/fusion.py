"""Which instructions in a row become one fused record: the patterns, matched in guest memory as it is decoded.

Compilers and kernels spend much of their code on a few of them: registers saved and restored, arguments set, far calls,
and loops that copy or clear memory. All instructions of a fused record lie in one page.

Patterns; what an instruction makes is there for the next one::

    2 to 4 loads of 8 bytes from one base, whose offsets are near each other; the same of stores
    2 additions of a constant: addi and its short forms, c.mv, c.li; such an addition and a branch
    slli and add; add and a load of 8 bytes
    auipc and jalr that call, auipc and addi that make an address
    an addition to sp, and c.jr
    loop: loads from a source and stores of the same words to a target in the same order; both advanced; a branch back
          on one of them and an end
    loop: stores of one register to a target, which is advanced; a branch back on it and an end
"""

from __future__ import annotations

from vmm.engine.rv64.decoder import decode_word
from vmm.engine.rv64.fused import ABOVE, BELOW, OPERATIONS
from vmm.engine.rv64.instructions import BY_NAME
from vmm.engine.rv64.layout import REACH, SINK
from vmm.engine.rv64.native import load_u16, native

LD, C_LD, C_LDSP = (BY_NAME[name].operation for name in ("ld", "c.ld", "c.ldsp"))
SD, C_SD, C_SDSP = (BY_NAME[name].operation for name in ("sd", "c.sd", "c.sdsp"))
ADDI, C_ADDI, C_MV, C_LI = (BY_NAME[name].operation for name in ("addi", "c.addi", "c.mv", "c.li"))
C_ADDI4SPN, C_ADDI16SP = (BY_NAME[name].operation for name in ("c.addi4spn", "c.addi16sp"))
AUIPC, JALR, C_JR = (BY_NAME[name].operation for name in ("auipc", "jalr", "c.jr"))
BEQ, BNE, BLT, BGE, BLTU, BGEU = (BY_NAME[n].operation for n in ("beq", "bne", "blt", "bge", "bltu", "bgeu"))
C_BEQZ, C_BNEZ = BY_NAME["c.beqz"].operation, BY_NAME["c.bnez"].operation
SLLI, C_SLLI, ADD, C_ADD = (BY_NAME[name].operation for name in ("slli", "c.slli", "add", "c.add"))
TWO_LOADS, TWO_STORES, ADD_TWICE = (OPERATIONS[name] for name in ("two loads", "two stores", "add twice"))
CALL, ADDRESS, RETURN = (OPERATIONS[name] for name in ("call", "address", "return"))
ADD_BEQ, ADD_BNE, ADD_BLT = (OPERATIONS[f"add, {name}"] for name in ("beq", "bne", "blt"))
ADD_BGE, ADD_BLTU, ADD_BGEU = (OPERATIONS[f"add, {name}"] for name in ("bge", "bltu", "bgeu"))
SHIFT_ADD, ADD_LOAD = OPERATIONS["shift, add"], OPERATIONS["add, load"]
COPY, FILL = OPERATIONS["copy loop"], OPERATIONS["fill loop"]

RA = 1
MOST = 4  #: loads or stores in one record
LONGEST = REACH // 4  #: instructions of a loop
SP = 2


@native
def length_at(host: int, offset: int) -> int:
    """Bytes of the instruction at an offset in the page at a host address."""
    return 4 if load_u16(host + offset) & 3 == 3 else 2


@native
def record_at(host: int, offset: int) -> int:
    """The record of the instruction alone; 0 if it is not wholly in the page."""
    if offset > 4094:
        return 0
    low = load_u16(host + offset)
    if low & 3 == 3:
        if offset > 4092:
            return 0
        low |= load_u16(host + offset + 2) << 16
    return decode_word(low)


@native
def is_load(operation: int) -> int:
    """Whether it loads 8 bytes into an x register."""
    return 1 if operation in (LD, C_LD, C_LDSP) else 0


@native
def is_store(operation: int) -> int:
    """Whether it stores 8 bytes of an x register."""
    return 1 if operation in (SD, C_SD, C_SDSP) else 0


@native
def is_addition(operation: int) -> int:
    """Whether it adds a constant to a register, or to none."""
    if operation in (ADDI, C_ADDI, C_MV, C_LI):
        return 1
    return 1 if operation in (C_ADDI4SPN, C_ADDI16SP) else 0


@native
def moved(word: int) -> int:
    """The register that a load fills or a store takes."""
    return word >> 8 & 255 if is_load(word & 255) else word >> 24 & 255


@native
def augend(word: int) -> int:
    """The register that an addition of a constant begins with."""
    return word >> 24 & 255 if word & 255 == C_MV else word >> 16 & 255


@native
def fuse_accesses(host: int, offset: int, plain: int) -> int:
    """As many loads or stores as go together."""
    loads = is_load(plain & 255)
    base, first, register = plain >> 16 & 255, plain >> 32, moved(plain)
    if first & 7 or register == SINK:
        return plain
    length = length_at(host, offset)
    packed = base << 8 | register << 13 | (length >> 2) << 49 | (first >> 3) << 55
    count, slots = 1, length >> 1
    while count < MOST and not (loads and register == base):
        place = offset + (slots << 1)
        word = record_at(host, place)
        if not (is_load(word & 255) if loads else is_store(word & 255)) or word >> 16 & 255 != base:
            break
        register = moved(word)
        distance = (word >> 32) - first + BELOW
        if register == SINK or distance & 7 or distance < 0 or distance > BELOW + ABOVE:
            break
        count += 1
        slots += length_at(host, place) >> 1
        packed |= register << (8 + 5 * count) | (distance >> 3) << (25 + 4 * count)
    if count == 1:
        return plain
    if loads:
        return packed | slots << 45 | TWO_LOADS + count - 2
    return packed | slots << 45 | TWO_STORES + count - 2


@native
def added(word: int) -> int:
    """Target, source and constant of an addition, as the first ones of a record; one to x0 becomes one that changes
    nothing."""
    register = word >> 8 & 255
    if register == SINK:
        return RA << 8 | RA << 13
    return register << 8 | augend(word) << 13 | (word >> 32) << 52


@native
def branch_after(operation: int) -> int:
    """The operation of an addition and this branch; 0 if it is none."""
    if operation in (BEQ, C_BEQZ):
        return ADD_BEQ
    if operation in (BNE, C_BNEZ):
        return ADD_BNE
    if operation == BLT:
        return ADD_BLT
    if operation == BGE:
        return ADD_BGE
    if operation == BLTU:
        return ADD_BLTU
    return ADD_BGEU if operation == BGEU else 0


@native
def fuse_additions(host: int, offset: int, plain: int) -> int:
    """An addition with the one behind it, a return, or a branch."""
    register = plain >> 8 & 255
    length = length_at(host, offset)
    word = record_at(host, offset + length)
    if register == SP and augend(plain) == SP and word & 255 == C_JR and word >> 16 & 255 != SP:
        return RETURN | (word >> 16 & 255) << 16 | (plain >> 32) << 32
    slots = (length + length_at(host, offset + length)) >> 1
    if is_addition(word & 255):
        second = added(word)
        targets = (second >> 8 & 31) << 18 | (second >> 13 & 31) << 23
        return ADD_TWICE | added(plain) | targets | slots << 28 | (second >> 52 & 4095) << 40
    operation = branch_after(word & 255)
    if operation:
        distance = (length << 2) + (word >> 32) >> 3 & 8191
        right = 0 if word & 255 in (C_BEQZ, C_BNEZ) else word >> 24 & 255
        return operation | added(plain) | (word >> 16 & 255) << 18 | right << 23 | slots << 28 | distance << 36
    return plain


@native
def fuse_shift(host: int, offset: int, plain: int) -> int:
    """A shift with the addition behind it."""
    length = length_at(host, offset)
    word = record_at(host, offset + length)
    target, second = plain >> 8 & 255, word >> 8 & 255
    if word & 255 not in (ADD, C_ADD) or target == SINK or second == SINK:
        return plain
    slots = (length + length_at(host, offset + length)) >> 1
    packed = SHIFT_ADD | target << 8 | (plain >> 16 & 255) << 13 | second << 18 | slots << 33
    return packed | (word >> 16 & 255) << 23 | (word >> 24 & 255) << 28 | (plain >> 32 & 63) << 36


@native
def fuse_add(host: int, offset: int, plain: int) -> int:
    """An addition of two registers with the load behind it."""
    length = length_at(host, offset)
    word = record_at(host, offset + length)
    target, second = plain >> 8 & 255, word >> 8 & 255
    if not is_load(word & 255) or target == SINK or second == SINK:
        return plain
    slots = (length + length_at(host, offset + length)) >> 1
    packed = ADD_LOAD | target << 8 | (plain >> 16 & 255) << 13 | (plain >> 24 & 255) << 18 | slots << 33
    return packed | (word >> 16 & 255) << 23 | second << 28 | (length >> 2) << 49 | (word >> 32) << 52


@native
def fuse_address(host: int, offset: int, plain: int) -> int:
    """An auipc with the call or the address that it begins."""
    register = plain >> 8 & 255
    word = record_at(host, offset + 4)
    total = (plain >> 32) + (word >> 32)
    if register == SINK or word >> 8 & 255 != register or total != total << 32 >> 32:
        return plain
    if word & 255 == JALR and word >> 16 & 255 == register:
        return CALL | register << 8 | (total & -2) << 32
    if (word & 255 == ADDI or word & 255 == C_ADDI) and word >> 16 & 255 == register:
        slots = 2 + (length_at(host, offset + 4) >> 1)
        return ADDRESS | register << 8 | slots << 24 | total << 32
    return plain


@native
def overwrites(host: int, offset: int, end: int, register: int) -> int:
    """Whether a load between two offsets fills a register."""
    place = offset
    while place < end:
        word = record_at(host, place)
        if is_load(word & 255) and word >> 8 & 255 == register:
            return 1
        place += length_at(host, place)
    return 0


@native
def fuse_loop(host: int, offset: int, plain: int) -> int:
    """A loop that copies or fills and begins here, or 0."""
    copies = is_load(plain & 255)
    if plain >> 32 or (copies and plain >> 8 & 255 == SINK):
        return 0
    source = plain >> 16 & 255 if copies else SINK
    target = SINK if copies else plain >> 16 & 255
    value = SINK if copies else plain >> 24 & 255
    place, matching = offset, offset  # where we are; where the load is whose word is stored next
    loaded, stored, read, written = 0, 0, 0, 0  # words; by how much source and target were advanced
    live, count = 0, 0  # registers, as bits, whose words are still to be stored; instructions
    while count < LONGEST:
        word = record_at(host, place)
        operation = word & 255
        count += 1
        if is_load(operation):
            register = word >> 8 & 255
            if not copies or word >> 16 & 255 != source or (word >> 32) + read != loaded << 3:
                return 0
            if register in (SINK, source) or live >> register & 1:
                return 0
            live |= 1 << register
            loaded += 1
        elif is_store(operation):
            register = word >> 24 & 255
            if target == SINK:
                target = word >> 16 & 255
            if word >> 16 & 255 != target or (word >> 32) + written != stored << 3 or register == target:
                return 0
            if copies:
                while matching < place and not is_load(record_at(host, matching) & 255):
                    matching += length_at(host, matching)
                if matching == place or record_at(host, matching) >> 8 & 255 != register:
                    return 0
                matching += length_at(host, matching)
                live &= ~(1 << register)
            elif register != value:
                return 0
            stored += 1
        elif operation in (ADDI, C_ADDI):
            register = word >> 8 & 255
            if word >> 16 & 255 != register:
                return 0
            if register == source:
                read += word >> 32
            elif register == target:
                written += word >> 32
            else:
                return 0
        else:
            break
        place += length_at(host, place)
    if word >> 32 != (offset - place) << 2 or live or target == SINK or source == target or written != stored << 3:
        return 0
    if copies and (loaded != stored or read != written):
        return 0
    left, right = word >> 16 & 255, word >> 24 & 255
    compared, end = left, right
    included, equal = 0, 0
    if operation == BGEU:
        compared, end, included = right, left, 1
    elif operation == BNE:
        equal = 1
        if right in (source, target):
            compared, end = right, left
    elif operation != BLTU:
        return 0
    if (compared != source and compared != target) or end in (source, target):
        return 0
    packed = (
        end << 26 | included << 32 | stored << 33 | count << 39 | (length_at(host, offset) >> 2) << 49 | equal << 50
    )
    packed |= target << 21
    if compared == target:
        packed |= 1 << 31
    if not copies:
        return packed | FILL | value << 8
    if overwrites(host, offset, place, end) or overwrites(host, offset, place, target):
        return 0
    return packed | COPY | source << 16 | (plain >> 8 & 255) << 8


@native
def fused_at(host: int, offset: int) -> int:
    """The record of the instruction at an offset in the page at a host address, with what follows if that can be."""
    plain = record_at(host, offset)
    operation = plain & 255
    if is_load(operation) or is_store(operation):
        loop = fuse_loop(host, offset, plain)
        return loop if loop else fuse_accesses(host, offset, plain)
    if operation == AUIPC:
        return fuse_address(host, offset, plain)
    if is_addition(operation):
        return fuse_additions(host, offset, plain)
    if operation in (SLLI, C_SLLI):
        return fuse_shift(host, offset, plain)
    if operation in (ADD, C_ADD):
        return fuse_add(host, offset, plain)
    return plain


#: Functions that are called, never made part of their callers.
CALLED = [fuse_accesses, fuse_additions, fuse_address, fuse_shift, fuse_add, fuse_loop, fused_at, record_at]
