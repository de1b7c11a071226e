"""Reads interface files in the language of Protocol Buffers 3, as far as the protocols of a sandbox use it.

Understood: packages, imports, messages (nested too), enums, scalar kinds, ``repeated``, ``optional``, ``map``,
``oneof``, services with unary and streaming methods, and comments. Enums are numbers on the wire and here. Left out:
options, extensions, groups, floats and fixed-width kinds, whose use is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final

from kata_lab.errors import KataLabError

Schema = dict[str, dict[int, tuple[str, str, str]]]

PLACE: Final = Path(__file__).parent
SCALARS: Final = ("string", "bytes", "bool", "int32", "int64", "uint32", "uint64")

_TOKEN = re.compile(r'\s+|//[^\n]*|/\*.*?\*/|(?P<token>"[^"\n]*"|[A-Za-z_][\w.]*|\d+|[{}()<>=;,\[\].])', re.DOTALL)


class ProtoError(KataLabError):
    """An interface file that cannot be understood."""


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a service: the messages' full names, and which side streams."""

    request: str
    response: str
    client_streams: bool = False
    server_streams: bool = False


@dataclass(slots=True)
class Interface:
    """What interface files declare.

    Attributes:
        messages: see :mod:`kata_lab.protocol.wire`.
        services: full name → method's name → method.
        enums: full name → name → number.
    """

    messages: Schema = field(default_factory=dict)
    services: dict[str, dict[str, Method]] = field(default_factory=dict)
    enums: dict[str, dict[str, int]] = field(default_factory=dict)


@lru_cache
def load(*files: str) -> Interface:
    """The interface in ``files`` of this package and all that they import.

    Raises:
        ProtoError: a file that is missing or cannot be understood.
    """
    reader = _Reader()
    for name in files:
        reader.read(name)
    return reader.resolve()


class _Reader:
    def __init__(self) -> None:
        self._interface = Interface()
        self._read: set[str] = set()
        self._tokens: Iterator[str] = iter(())
        self._ahead = ""
        self._file = ""
        self._package = ""

    def read(self, name: str) -> None:
        if name in self._read:
            return
        self._read.add(name)
        path = PLACE / name
        if not path.is_file():
            raise ProtoError(f"there is no interface file {name!r} beside {PLACE.name}/proto.py")
        kept = self._tokens, self._ahead, self._file, self._package
        self._tokens, self._file, self._package = self._split(path.read_text(), name), name, ""
        self._next()
        while self._ahead:
            self._statement()
        self._tokens, self._ahead, self._file, self._package = kept

    def _split(self, text: str, name: str) -> Iterator[str]:
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                line = text.count("\n", 0, at) + 1
                raise ProtoError(f"{name}:{line}: {text[at]!r} is not understood")
            at = match.end()
            if match["token"]:
                yield match["token"]

    def _next(self) -> str:
        taken, self._ahead = self._ahead, next(self._tokens, "")
        return taken

    def _expect(self, *wanted: str) -> str:
        token = self._next()
        if token not in wanted:
            raise ProtoError(f"{self._file}: {token!r} stands where {' or '.join(map(repr, wanted))} must")
        return token

    def _statement(self) -> None:
        match self._next():
            case "syntax":
                self._expect("=")
                if self._next() != '"proto3"':
                    raise ProtoError(f"{self._file}: the syntax must be proto3")
                self._expect(";")
            case "package":
                self._package = self._next()
                self._expect(";")
            case "import":
                name = self._next().strip('"')
                self._expect(";")
                self.read(name)
            case "message":
                self._message(self._package)
            case "enum":
                self._enum(self._package)
            case "service":
                self._service()
            case other:
                raise ProtoError(f"{self._file}: {other!r} stands where a declaration must")

    def _message(self, scope: str) -> None:
        name = f"{scope}.{self._next()}"
        fields: dict[int, tuple[str, str, str]] = {}
        self._interface.messages[name] = fields
        self._expect("{")
        self._fields(name, fields)

    def _fields(self, name: str, fields: dict[int, tuple[str, str, str]]) -> None:
        while (token := self._next()) != "}":
            label = "one"
            if token == "message":
                self._message(name)
                continue
            if token == "enum":
                self._enum(name)
                continue
            if token == "oneof":
                self._next()
                self._expect("{")
                inside: dict[int, tuple[str, str, str]] = {}
                self._fields(name, inside)
                fields.update({number: (each, kind, "optional") for number, (each, kind, _) in inside.items()})
                continue
            if token == "map":
                self._expect("<")
                label = self._next()
                self._expect(",")
                kind = self._next()
                self._expect(">")
            elif token in ("repeated", "optional"):
                label = "many" if token == "repeated" else "optional"
                kind = self._next()
            else:
                kind = token
            field_name = self._next()
            self._expect("=")
            number = self._next()
            self._expect(";")
            if not number.isdigit() or int(number) in fields:
                raise ProtoError(
                    f"{self._file}: field {name}.{field_name} has number {number}, it needs one of its own"
                )
            fields[int(number)] = (field_name, kind, label)

    def _enum(self, scope: str) -> None:
        values = self._interface.enums[f"{scope}.{self._next()}"] = {}
        self._expect("{")
        while (name := self._next()) != "}":
            self._expect("=")
            values[name] = int(self._next())
            self._expect(";")

    def _service(self) -> None:
        methods = self._interface.services[f"{self._package}.{self._next()}"] = {}
        self._expect("{")
        while self._expect("rpc", "}") == "rpc":
            name = self._next()
            request, client = self._side()
            self._expect("returns")
            response, server = self._side()
            self._expect(";")
            methods[name] = Method(request, response, client, server)

    def _side(self) -> tuple[str, bool]:
        self._expect("(")
        streams = self._ahead == "stream"
        if streams:
            self._next()
        name = self._next()
        self._expect(")")
        return name, streams

    def resolve(self) -> Interface:
        """Kinds by their full names."""
        found = self._interface
        for name, fields in found.messages.items():
            for number, (field_name, kind, label) in fields.items():
                fields[number] = (field_name, self._kind(kind, name), label)
        for service, methods in found.services.items():
            for name, method in methods.items():
                request, response = (self._kind(each, service) for each in (method.request, method.response))
                methods[name] = Method(request, response, method.client_streams, method.server_streams)
        return found

    def _kind(self, kind: str, scope: str) -> str:
        if kind in SCALARS or kind in self._interface.messages:
            return kind
        while scope:
            full = f"{scope}.{kind}"
            if full in self._interface.messages:
                return full
            if full in self._interface.enums:
                return "enum"
            scope = scope.rpartition(".")[0]
        if kind in self._interface.enums:
            return "enum"
        raise ProtoError(f"no interface file declares {kind!r}")
