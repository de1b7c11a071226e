"""Flattened device trees: a writer, a reader and a printer.

Follows the Devicetree Specification v0.4, chapter 5 (the flattened format, version 17) and section 2.2 (names). A blob
is::

    header               40 bytes, big-endian words: magic d00dfeed, sizes and offsets of the blocks
    memory reservations  (address, size) pairs of 64 bits, ended by a pair of zeros
    structure            tokens: BEGIN_NODE name, PROP length name-offset value, END_NODE, END
    strings              property names, each once, ended by NUL

A tree is made of :func:`node` calls and holds every value as the bytes that go into the blob, so that what is read back
equals what was written. Left out: phandle references by label, overlays, and versions below 16.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from vmm.errors import BootError, ConfigError

MAGIC: Final = 0xD00DFEED
VERSION: Final = 17
LAST_COMPATIBLE_VERSION: Final = 16

_HEADER: Final = struct.Struct(">10I")
_RESERVATION: Final = struct.Struct(">QQ")
_BEGIN_NODE, _END_NODE, _PROP, _NOP, _END = 1, 2, 3, 4, 9
_MAX_DEPTH: Final = 64

# Section 2.2.1 and 2.2.4; a unit address follows the name after "@".
_NODE_NAME: Final = re.compile(r"[0-9A-Za-z,._+-]{1,31}(@[0-9A-Za-z,._+-]+)?")
_PROPERTY_NAME: Final = re.compile(r"[0-9A-Za-z,._+?#-]{1,31}")

#: What a property may be given as: True (no value), a cell, cells, text, a list of texts, or the bytes themselves.
Value: TypeAlias = bool | int | str | bytes | Sequence[int] | Sequence[str]


@dataclass(frozen=True)
class Node:
    """A node of a device tree; ``properties`` holds the values as they stand in the blob."""

    name: str
    properties: dict[str, bytes] = field(default_factory=dict)
    children: tuple[Node, ...] = ()

    def find(self, path: str) -> Node:
        """The node at ``path`` below this one, for instance ``/soc/serial@10000000``.

        Raises:
            ConfigError: there is no such node.
        """
        found = self
        for name in filter(None, path.split("/")):
            below = {child.name: child for child in found.children}
            if name not in below:
                present = ", ".join(below) or "no nodes"
                raise ConfigError(f"device tree path {path} ends at {name!r}; there is {present}")
            found = below[name]
        return found

    def cells(self, name: str) -> tuple[int, ...]:
        """The property's value as 32-bit cells."""
        value = self._value(name)
        if len(value) % 4:
            raise ConfigError(
                f"property {name} of {self.name or '/'} has {len(value)} bytes, which are not whole cells"
            )
        return struct.unpack(f">{len(value) // 4}I", value)

    def strings(self, name: str) -> tuple[str, ...]:
        """The property's value as a list of texts."""
        return tuple(self._value(name).decode("utf-8", "replace").removesuffix("\0").split("\0"))

    def _value(self, name: str) -> bytes:
        if name not in self.properties:
            raise ConfigError(f"node {self.name or '/'} has no property {name}; it has {', '.join(self.properties)}")
        return self.properties[name]

    def __str__(self) -> str:
        return "".join(_source_lines(self, 0))


def node(name: str, properties: Mapping[str, Value] | None = None, *children: Node) -> Node:
    """Make a node. The root's name is empty.

    Raises:
        ConfigError: a name that the specification does not allow, two children of one name, or a value that does not
            fit its cell.
    """
    if name and not _NODE_NAME.fullmatch(name):
        raise ConfigError(
            f"device tree node name {name!r} must be 1 to 31 of 0-9 a-z A-Z , . _ + - and may end in @unit"
        )
    encoded: dict[str, bytes] = {}
    for key, value in (properties or {}).items():
        if not _PROPERTY_NAME.fullmatch(key):
            raise ConfigError(f"device tree property name {key!r} must be 1 to 31 of 0-9 a-z A-Z , . _ + ? # -")
        if value is not False:
            encoded[key] = _encode(key, value)
    names = [child.name for child in children]
    if "" in names or len(set(names)) != len(names):
        raise ConfigError(f"children of device tree node {name or '/'} need names of their own, not {', '.join(names)}")
    return Node(name, encoded, children)


def cells64(*values: int) -> tuple[int, ...]:
    """Each value as two cells, the upper half first: how addresses and sizes of 64 bits are written."""
    return tuple(half for value in values for half in (value >> 32, value & 0xFFFF_FFFF))


def write_fdt(root: Node, reservations: Sequence[tuple[int, int]] = (), boot_cpu: int = 0) -> bytes:
    """The blob of a tree.

    Args:
        root: the root node, whose name is empty.
        reservations: (address, size) of memory the kernel must leave alone.
        boot_cpu: the ``reg`` of the CPU that enters the kernel.
    """
    if root.name:
        raise ConfigError(f"the root of a device tree has an empty name, not {root.name!r}")
    structure, strings = bytearray(), bytearray()
    _write_node(root, structure, strings, {})
    structure += _END.to_bytes(4, "big")
    reserved = b"".join(_RESERVATION.pack(*each) for each in (*reservations, (0, 0)))
    # 5.2: the reservations are 8-aligned and the structure is 4-aligned; both follow from these sizes.
    structure_at = _HEADER.size + len(reserved)
    strings_at = structure_at + len(structure)
    total = strings_at + len(strings)
    header = _HEADER.pack(
        *(MAGIC, total, structure_at, strings_at, _HEADER.size, VERSION, LAST_COMPATIBLE_VERSION),
        *(boot_cpu, len(strings), len(structure)),
    )
    return header + reserved + structure + strings


def read_fdt(blob: bytes) -> Node:
    """The tree in a blob.

    Raises:
        BootError: the blob is not a device tree, or is damaged.
    """
    if len(blob) < _HEADER.size:
        raise BootError(f"a device tree of {len(blob)} bytes is truncated; its header alone has {_HEADER.size}")
    magic, total, structure_at, strings_at, _, _, compatible, _, strings_size, structure_size = _HEADER.unpack_from(
        blob
    )
    if magic != MAGIC:
        raise BootError(f"a device tree must start with {MAGIC:#x}, not {magic:#x}")
    if compatible > VERSION:
        raise BootError(f"a device tree needs a reader of version {compatible}; this one knows version {VERSION}")
    if total > len(blob) or structure_at + structure_size > total or strings_at + strings_size > total:
        raise BootError(f"a device tree of {len(blob)} bytes is truncated; its header speaks of {total}")
    reader = _Reader(blob[structure_at : structure_at + structure_size], blob[strings_at : strings_at + strings_size])
    if reader.token() != _BEGIN_NODE:
        raise BootError("a device tree's structure must begin with its root node")
    root = reader.node(0)
    if reader.token() != _END:
        raise BootError("a device tree's structure must end after its root node")
    return root


def _encode(name: str, value: Value) -> bytes:
    if value is True:
        return b""
    if isinstance(value, bytes):
        return value
    if isinstance(value, int):
        value = (value,)
    if isinstance(value, str):
        value = (value,)
    parts: list[bytes] = []
    for item in value:
        if isinstance(item, str):
            if "\0" in item:
                raise ConfigError(f"device tree property {name} has the text {item!r}, which must hold no NUL")
            parts.append(item.encode() + b"\0")
        elif 0 <= item < 1 << 32:
            parts.append(item.to_bytes(4, "big"))
        else:
            raise ConfigError(f"device tree property {name} has the cell {item:#x}, which must fit 32 bits")
    return b"".join(parts)


def _write_node(written: Node, structure: bytearray, strings: bytearray, offsets: dict[str, int]) -> None:
    structure += _BEGIN_NODE.to_bytes(4, "big") + _padded(written.name.encode() + b"\0")
    for name, value in written.properties.items():
        if name not in offsets:
            offsets[name] = len(strings)
            strings += name.encode() + b"\0"
        structure += struct.pack(">III", _PROP, len(value), offsets[name]) + _padded(value)
    for child in written.children:
        _write_node(child, structure, strings, offsets)
    structure += _END_NODE.to_bytes(4, "big")


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


class _Reader:
    """Walks over the structure block; every step checks that what it takes is there."""

    def __init__(self, structure: bytes, strings: bytes) -> None:
        self._structure = structure
        self._strings = strings
        self._position = 0

    def token(self) -> int:
        while (token := self._word()) == _NOP:
            pass
        return token

    def node(self, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            raise BootError(f"a device tree may be nested at most {_MAX_DEPTH} deep")
        name = self._text(self._structure, self._position)
        self._take(len(name) + 1)
        properties: dict[str, bytes] = {}
        children: list[Node] = []
        while (token := self.token()) != _END_NODE:
            if token == _PROP:
                length, name_offset = self._word(), self._word()
                properties[self._text(self._strings, name_offset).decode("utf-8", "replace")] = self._take(length)
            elif token == _BEGIN_NODE:
                children.append(self.node(depth + 1))
            else:
                raise BootError(
                    f"a device tree's structure has the unknown token {token:#x} at {self._position - 4:#x}"
                )
        return Node(name.decode("utf-8", "replace"), properties, tuple(children))

    def _word(self) -> int:
        return int.from_bytes(self._take(4), "big")

    def _take(self, length: int) -> bytes:
        taken = self._structure[self._position : self._position + length]
        if len(taken) != length:
            raise BootError(f"a device tree's structure ends at {len(self._structure):#x}, in the middle of an entry")
        self._position += length + -length % 4
        return taken

    @staticmethod
    def _text(block: bytes, start: int) -> bytes:
        end = block.find(b"\0", start)
        if end < 0:
            raise BootError(f"a device tree has a name at {start:#x} that does not end")
        return block[start:end]


def _source_lines(shown: Node, depth: int) -> Iterator[str]:
    """Device tree source, as dtc reads it."""
    indent = "\t" * depth
    if depth == 0:
        yield "/dts-v1/;\n\n"
    yield f"{indent}{shown.name or '/'} {{\n"
    for name, value in shown.properties.items():
        yield f"{indent}\t{name} = {_source_value(value)};\n" if value else f"{indent}\t{name};\n"
    for child in shown.children:
        yield "\n"
        yield from _source_lines(child, depth + 1)
    yield f"{indent}}};\n"


def _source_value(value: bytes) -> str:
    """A guess at what the bytes mean, since a blob does not say: texts if all are printable, else cells, else bytes."""
    texts = value[:-1].split(b"\0")
    if value.endswith(b"\0") and all(text and all(0x20 <= byte < 0x7F for byte in text) for text in texts):
        return ", ".join('"' + text.decode().replace("\\", "\\\\").replace('"', '\\"') + '"' for text in texts)
    if len(value) % 4 == 0:
        return "<" + " ".join(f"{cell:#x}" for cell in struct.unpack(f">{len(value) // 4}I", value)) + ">"
    return "[" + value.hex(" ") + "]"
