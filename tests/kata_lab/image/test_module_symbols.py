"""Modules without labels that nothing refers to: smaller, and the same to a loader."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from kata_lab.image.module_symbols import without_unused_labels

TEXT, SYMTAB, STRTAB, RELA = 1, 2, 3, 4


def _module(machine: int = 243, kind: int = 1) -> bytes:
    """A relocatable file: code, five local labels, a function, and a relocation to two of the symbols."""
    strings = b"\0.Lused\0.Lunused\0entry\0local\0"
    names = [0, 1, 8, 8, strings.index(b"local"), strings.index(b"entry")]
    symbols = b"".join(
        struct.pack("<IBBHQQ", name, info, 0, section, value, 0)
        for name, info, section, value in zip(
            names, (0, 0, 0, 0, 0, 0x12), (0, 1, 1, 1, 1, 1), (0, 4, 8, 12, 16, 0), strict=True
        )
    )
    relocations = struct.pack("<QQq", 0, 1 << 32 | 23, 7) + struct.pack("<QQq", 4, 5 << 32 | 19, -1)
    section_names = b"\0.text\0.symtab\0.strtab\0.rela.text\0.shstrtab\0"
    contents = [b"", bytes(range(32)), symbols, strings, relocations, section_names]
    kinds = [(0, 0, 0, 0), (1, 0, 0, 0), (2, STRTAB, 5, 24), (3, 0, 0, 0), (4, SYMTAB, TEXT, 24), (3, 0, 0, 0)]
    titles = [0, *(section_names.index(name) for name in (b".text", b".symtab", b".strtab", b".rela", b".shstr"))]
    out, headers = bytearray(64), b""
    for (section, link, info, size), title, content in zip(kinds, titles, contents, strict=True):
        out += bytes(-len(out) % 8)
        headers += struct.pack("<IIQQQQIIQQ", title, section, 0, 0, len(out), len(content), link, info, 8, size)
        out += content
    out += bytes(-len(out) % 8)
    header = (b"\x7fELF\x02\x01\x01" + bytes(9), kind, machine, 1, 0, 0, len(out), 0, 64, 0, 0, 64, 6, 5)
    struct.pack_into("<16sHHIQQQIHHHHHH", out, 0, *header)
    return bytes(out) + headers


def _read(module: bytes) -> dict[str, Any]:
    file = ELFFile(io.BytesIO(module))
    symbols = list(file.get_section_by_name(".symtab").iter_symbols())
    return {
        "names": [each.name for each in symbols],
        "values": [each["st_value"] for each in symbols],
        "locals": file.get_section_by_name(".symtab")["sh_info"],
        "text": file.get_section_by_name(".text").data(),
        "relocations": [
            (each["r_offset"], each["r_info_type"], each["r_addend"], symbols[each["r_info_sym"]].name)
            for each in file.get_section_by_name(".rela.text").iter_relocations()
        ],
    }


def test_labels_that_nothing_refers_to_go_and_all_else_stays() -> None:
    before, after = _read(_module()), _read(without_unused_labels(_module()))
    assert before["names"] == ["", ".Lused", ".Lunused", ".Lunused", "local", "entry"]
    assert after["names"] == ["", ".Lused", "local", "entry"]
    assert after["values"] == [0, 4, 16, 0]
    assert after["locals"] == 3
    assert after["text"] == before["text"]
    assert after["relocations"] == before["relocations"] == [(0, 23, 7, ".Lused"), (4, 19, -1, "entry")]


def test_a_second_time_changes_nothing() -> None:
    once = without_unused_labels(_module())
    assert without_unused_labels(once) == once
    assert len(once) < len(_module())


@pytest.mark.parametrize("module", [b"", b"no ELF file", _module(kind=3), b"\x7fELF\x01\x01" + _module()[6:]])
def test_what_is_no_relocatable_file_of_64_bits_stays_as_it_is(module: bytes) -> None:
    assert without_unused_labels(module) == module
