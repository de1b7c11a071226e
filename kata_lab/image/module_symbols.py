"""Takes the symbols out of a kernel module that nothing refers to.

A module for RISC-V keeps a local label (``.L…``) for every place that the assembler named, since a linker might move
code: ext4 of Debian has 216,000 symbols, and relocations refer to 11,000 of them. The kernel reads, copies and goes
through all of them when it loads the module (kernel/module/main.c), for which a guest on the rv64 engine pays 90
million instructions. What is left is what the loader needs, and the names of functions. The file is an ELF relocatable
one (System V gABI 4.1, chapter 4); one that is not of the 64-bit, little-endian kind is left as it is.
"""

from __future__ import annotations

import struct

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_IDENTITY = b"\x7fELF\x02\x01"
_RELOCATABLE = 1
_SYMTAB, _RELA, _NOBITS, _REL, _GROUP, _INDICES = 2, 4, 8, 9, 17, 18
_LABEL = b".L"


def without_unused_labels(module: bytes) -> bytes:
    """The module without those local labels to which no relocation refers."""
    if not module.startswith(_IDENTITY):
        return module
    header = list(_HEADER.unpack_from(module))
    offset, count = header[6], header[12]
    sections = [list(_SECTION.unpack_from(module, offset + each * _SECTION.size)) for each in range(count)]
    kinds = [each[1] for each in sections]
    odd = {_REL, _GROUP, _INDICES} & set(kinds)
    if header[1] != _RELOCATABLE or kinds.count(_SYMTAB) != 1 or odd:
        return module
    contents = [b"" if each[1] in (0, _NOBITS) else module[each[4] : each[4] + each[5]] for each in sections]
    table = kinds.index(_SYMTAB)
    names = sections[table][6]
    if names == header[13]:
        return module
    relocations = [each for each in range(count) if kinds[each] == _RELA and sections[each][6] == table]

    used = {info >> 32 for each in relocations for _, info, _ in _RELOCATION.iter_unpack(contents[each])}
    places: dict[int, int] = {}
    symbols, strings = bytearray(), bytearray(b"\0")
    for index, (name, info, other, section, value, size) in enumerate(_SYMBOL.iter_unpack(contents[table])):
        text = contents[names][name : contents[names].index(b"\0", name)]
        if text.startswith(_LABEL) and info >> 4 == 0 and index not in used:
            continue
        places[index] = len(symbols) // _SYMBOL.size
        symbols += _SYMBOL.pack(len(strings) if text else 0, info, other, section, value, size)
        if text:
            strings += text + b"\0"
    first = sections[table][7]
    sections[table][7] = sum(index < first for index in places)
    contents[table], contents[names] = bytes(symbols), bytes(strings)
    for each in relocations:
        moved = bytearray()
        for place, info, addend in _RELOCATION.iter_unpack(contents[each]):
            moved += _RELOCATION.pack(place, places[info >> 32] << 32 | info & 0xFFFFFFFF, addend)
        contents[each] = bytes(moved)
    return _laid_out(header, sections, contents)


def _laid_out(header: list[int], sections: list[list[int]], contents: list[bytes]) -> bytes:
    """The file with its sections one after the other, in the order that they had, and their headers behind them."""
    out = bytearray(_HEADER.size)
    for each in sorted(range(len(sections)), key=lambda index: sections[index][4]):
        if sections[each][1] == 0:
            continue
        out += bytes(-len(out) % max(sections[each][8], 1))
        sections[each][4] = len(out)
        if sections[each][1] != _NOBITS:
            sections[each][5] = len(contents[each])
            out += contents[each]
    out += bytes(-len(out) % 8)
    header[6] = len(out)
    _HEADER.pack_into(out, 0, *header)
    for section in sections:
        out += _SECTION.pack(*section)
    return bytes(out)
