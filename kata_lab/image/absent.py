"""Empty shared libraries, in place of those that programs are linked with and never need in a guest.

Debian's fio is linked with the clients of four storage clusters, 40 MB of libraries that the loader maps and relocates
at every start. A description names such a library under ``exclude.libraries``; here it becomes one with the same name,
symbols and versions, all of whose functions are one illegal instruction: who calls one ends with SIGILL. The form is
that of the System V gABI 4.1 (chapters 4 and 5) and of the Linux Standard Base 5.0 (symbol versioning, 10.7)::

    page 0, read and execute                                          page 1, read and write
    ELF header, program headers, .dynsym, versions, .hash, .dynstr, code     .dynamic

Leaves out data: a program that uses a variable of an absent library is refused.
"""

from __future__ import annotations

import io
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kata_lab.errors import ImageError
from kata_lab.image.description import Description, did_you_mean
from kata_lab.image.tree import RootTree

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

_MULTIARCH = {"riscv64": "riscv64-linux-gnu", "amd64": "x86_64-linux-gnu"}
_MACHINES = {"riscv64": (243, 5, bytes(4)), "amd64": (62, 0, b"\x0f\x0b")}  # number, e_flags, an illegal instruction
_PAGE = 4096
_EHDR, _PHDR = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")
_SYMBOL, _ENTRY = struct.Struct("<IBBHQQ"), struct.Struct("<qQ")
_VERDEF, _VERDAUX = struct.Struct("<HHHHIII"), struct.Struct("<II")
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 4, 5, 6, 10, 11, 14
_DT_VERSYM, _DT_VERDEF, _DT_VERDEFNUM = 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD
_GLOBAL_FUNCTION, _BASE = 0x12, 1


@dataclass
class _Wanted:
    """What programs want of one absent library: symbol → its version, "" for none."""

    symbols: dict[str, str] = field(default_factory=dict)
    users: list[str] = field(default_factory=list)


def add_absent_libraries(tree: RootTree, description: Description) -> None:
    """Put the empty libraries that a description asks for into its root.

    Raises:
        DescriptionError: a library that is there all the same, or that no program needs.
        ImageError: a program that needs data of one.
    """
    wanted = {name: _Wanted() for name in description.excluded_libraries}
    if not wanted:
        return
    directory = f"usr/lib/{_MULTIARCH[description.architecture]}"
    for place, name in enumerate(wanted):
        if tree.read(f"{directory}/{name}") is not None or tree.read(f"usr/lib/{name}") is not None:
            problem = f"{name!r} is in the image: exclude the package that brings it, too"
            raise description.refusal(f"$.exclude.libraries[{place}]", problem)
    needed: set[str] = set()
    for path, content in _elf_files(tree):
        elf = _open(content)
        names = _needed(elf)
        needed.update(names)
        if wanted.keys() & set(names):
            _collect(elf, path, names, wanted, tree, description.architecture)
    for place, (name, each) in enumerate(wanted.items()):
        if not each.users:
            problem = f"no program needs a library {name!r}: {did_you_mean(name, needed)}"
            raise description.refusal(f"$.exclude.libraries[{place}]", problem)
        tree.file(f"{directory}/{name}", empty_library(name, each.symbols, description.architecture), owner="(absent)")


def empty_library(name: str, symbols: Mapping[str, str], architecture: str) -> bytes:
    """A shared library of this name with these functions; each has its version ("" for none) and must not be called."""
    machine, flags, code = _MACHINES[architecture]
    versions = sorted({version for version in symbols.values() if version})
    strings = _Strings()
    name_at = strings.add(name)
    functions = sorted(symbols)
    count = len(functions) + 1

    symbols_at = _EHDR.size + 3 * _PHDR.size
    versym_at = symbols_at + count * _SYMBOL.size
    verdef_at = _aligned(versym_at + 2 * count)
    verdef = _version_definitions([name, *versions], strings) if versions else b""
    hash_at = _aligned(verdef_at + len(verdef))
    table = _hash_table(functions)
    strings_at = hash_at + len(table)
    symbol_names = [strings.add(function) for function in functions]
    code_at = _aligned(strings_at + len(strings.data))
    dynamic_at = _aligned(code_at + len(code), _PAGE)

    entries = [
        (_DT_SONAME, name_at),
        (_DT_HASH, hash_at),
        (_DT_STRTAB, strings_at),
        (_DT_SYMTAB, symbols_at),
        (_DT_STRSZ, len(strings.data)),
        (_DT_SYMENT, _SYMBOL.size),
    ]
    if versions:
        entries += [(_DT_VERSYM, versym_at), (_DT_VERDEF, verdef_at), (_DT_VERDEFNUM, len(versions) + 1)]
    dynamic = b"".join(_ENTRY.pack(*entry) for entry in [*entries, (0, 0)])
    image = bytearray(dynamic_at) + dynamic
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    # ET_DYN, no entry, no sections; PT_LOAD twice and PT_DYNAMIC
    image[: _EHDR.size] = _EHDR.pack(
        identity, 3, machine, 1, 0, _EHDR.size, 0, flags, _EHDR.size, _PHDR.size, 3, 0, 0, 0
    )
    end = code_at + len(code)
    for index, header in enumerate(
        (
            (1, 5, 0, 0, 0, end, end, _PAGE),
            (1, 6, dynamic_at, dynamic_at, dynamic_at, len(dynamic), len(dynamic), _PAGE),
            (2, 6, dynamic_at, dynamic_at, dynamic_at, len(dynamic), len(dynamic), 8),
        )
    ):
        _PHDR.pack_into(image, _EHDR.size + index * _PHDR.size, *header)
    for index, (function, at) in enumerate(zip(functions, symbol_names, strict=True), 1):
        _SYMBOL.pack_into(image, symbols_at + index * _SYMBOL.size, at, _GLOBAL_FUNCTION, 0, 1, code_at, len(code))
        version = symbols[function]
        struct.pack_into("<H", image, versym_at + 2 * index, versions.index(version) + 2 if version else 1)
    for at, part in ((verdef_at, verdef), (hash_at, table), (strings_at, bytes(strings.data)), (code_at, code)):
        image[at : at + len(part)] = part
    return bytes(image)


class _Strings:
    """A string table that grows."""

    def __init__(self) -> None:
        self.data = bytearray(b"\0")

    def add(self, text: str) -> int:
        at = len(self.data)
        self.data += text.encode() + b"\0"
        return at


def _aligned(offset: int, to: int = 8) -> int:
    return -(-offset // to) * to


def _version_definitions(names: list[str], strings: _Strings) -> bytes:
    """Verdef and Verdaux of each version; the first is the library itself."""
    data = bytearray()
    size = _VERDEF.size + _VERDAUX.size
    for index, name in enumerate(names, 1):
        following = 0 if index == len(names) else size
        data += _VERDEF.pack(1, _BASE if index == 1 else 0, index, 1, elf_hash(name), _VERDEF.size, following)
        data += _VERDAUX.pack(strings.add(name), 0)
    return bytes(data)


def _hash_table(functions: list[str]) -> bytes:
    buckets, chains = [0] * max(len(functions), 1), [0] * (len(functions) + 1)
    for index, function in enumerate(functions, 1):
        bucket = elf_hash(function) % len(buckets)
        chains[index], buckets[bucket] = buckets[bucket], index
    return struct.pack(f"<{2 + len(buckets) + len(chains)}I", len(buckets), len(chains), *buckets, *chains)


def elf_hash(name: str) -> int:
    """The hash function of the gABI (chapter 5, Hash Table)."""
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF000_0000
        value = (value ^ high >> 24) & ~high
    return value


def _elf_files(tree: RootTree) -> Iterator[tuple[str, bytes]]:
    """Path and content of every program and library of the root."""
    for path, node in tree.nodes():
        if stat.S_ISREG(node.mode) and (node.mode & 0o111 or ".so" in path):
            content = node.content
            if content.startswith(b"\x7fELF"):
                yield path, content


def _open(content: bytes) -> ELFFile:
    from elftools.elf.elffile import ELFFile

    return ELFFile(io.BytesIO(content))


def _needed(elf: ELFFile) -> list[str]:
    section: Any = elf.get_section_by_name(".dynamic")
    return [] if section is None else [tag.needed for tag in section.iter_tags("DT_NEEDED")]


def _collect(
    elf: ELFFile, path: str, names: list[str], wanted: Mapping[str, _Wanted], tree: RootTree, architecture: str
) -> None:
    """Note what one program or library wants of the absent ones; an unversioned symbol may be of any of them."""
    defined: set[str] = set()
    for name in names:
        content = tree.read(f"usr/lib/{_MULTIARCH[architecture]}/{name}") or tree.read(f"usr/lib/{name}")
        if content is not None:
            table: Any = _open(content).get_section_by_name(".dynsym")
            defined.update(each.name for each in table.iter_symbols() if each["st_shndx"] != "SHN_UNDEF")
    origins = _version_origins(elf)
    absent = [name for name in names if name in wanted]
    symbols: Any = elf.get_section_by_name(".dynsym")
    versions: Any = elf.get_section_by_name(".gnu.version")
    for index, symbol in enumerate(symbols.iter_symbols()):
        if symbol["st_shndx"] != "SHN_UNDEF" or symbol["st_info"]["bind"] != "STB_GLOBAL" or not symbol.name:
            continue
        number = versions.get_symbol(index)["ndx"] if versions is not None else "VER_NDX_GLOBAL"
        library, version = origins.get(number, ("", "")) if isinstance(number, int) else ("", "")
        if library in wanted:
            owner = library
        elif not library and symbol.name not in defined:
            owner = absent[0]
        else:
            continue
        if symbol["st_info"]["type"] == "STT_OBJECT":
            raise ImageError(f"/{path} needs the variable {symbol.name} of {owner}: do not exclude that library")
        wanted[owner].symbols[symbol.name] = version
    for name in absent:
        wanted[name].users.append(path)


def _version_origins(elf: ELFFile) -> dict[int, tuple[str, str]]:
    """Index of a version → the library that has it, and its name."""
    section: Any = elf.get_section_by_name(".gnu.version_r")
    if section is None:
        return {}
    return {
        each["vna_other"] & 0x7FFF: (library.name, each.name)
        for library, versions in section.iter_versions()
        for each in versions
    }
