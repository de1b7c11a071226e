"""Values of the action vocabulary as JSON (RFC 8259) and back, derived from how their classes are declared.

What JSON has, travels as it is: None, truth, numbers, text, lists. Everything else is an object of one member, whose
name says what it is::

    {"path": "/boot/Image"}   {"bytes": "AAEC"}   {"tuple": [1, 2]}   {"map": [["vcpus", 2]]}
    {"VmState": "RUNNING"}    an enumeration's member
    {"PauseMicroVm": {}}      a dataclass with its fields

The classes are found by walking from base classes, such as :class:`~vmm.actions.VmmAction`, through their subclasses,
the types of their fields and their answers, so that a new action needs nothing here. Reading checks every field against
its declared type and lets the class check the rest; no other class is ever made, and no code is ever named by what
travels. Text that is no UTF-8, as a path may be, keeps its bytes as lone surrogates.

Left out: classes whose fields are not given to their constructor, values that refer to each other, and sets.
"""

from __future__ import annotations

import base64
import binascii
import collections.abc
import dataclasses
import enum
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Final, TypeVar

from vmm.errors import VmmError

Check = Callable[[object], bool]

_PLAIN: Final = (bool, int, float, str)
_SHOWN: Final = 80  # characters of a value in an error
_SEQUENCES: Final = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS: Final = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


class CodecError(VmmError):
    """A value that cannot travel, or a message that is none."""


class Vocabulary:
    """The classes that travel.

    Args:
        bases: they, their subclasses, and everything that their fields and answers are made of.

    Raises:
        CodecError: two classes have one name, or a declaration cannot be resolved.
    """

    def __init__(self, bases: Iterable[type]) -> None:
        self._bases = tuple(bases)
        self._classes: dict[str, type] = {}
        self._fields: dict[type, dict[str, Check]] = {}
        self._generation = 0
        self._learn()

    def _learn(self) -> None:
        generation = self._count()
        classes: dict[str, type] = {}
        fields: dict[type, dict[str, Check]] = {}
        waiting = [each for base in self._bases for each in _family(base)]
        while waiting:
            found = waiting.pop(0)
            known = classes.get(found.__name__)
            if found in fields:
                continue
            # A dataclass with slots is made twice; the first of the two lives until it is collected.
            if known is not None and (known.__module__, known.__qualname__) != (found.__module__, found.__qualname__):
                raise CodecError(
                    f"two classes are called {found.__name__}, in {known.__module__} and {found.__module__}; what"
                    " travels needs a name of its own"
                )
            hints = {} if issubclass(found, enum.Enum) else _declared(found)
            classes[found.__name__] = found
            fields[found] = {name: _check(hint) for name, hint in hints.items()}
            mentioned = [*hints.values(), *getattr(found, "__orig_bases__", ())]
            waiting += [each for hint in mentioned for part in _classes_in(hint) for each in _family(part)]
        # Whole, since other threads read them.
        self._classes, self._fields, self._generation = classes, fields, generation

    def _count(self) -> int:
        return sum(1 for base in self._bases for _ in _family(base))

    def _find(self, name: str) -> type | None:
        if name not in self._classes and self._generation != self._count():
            self._learn()  # a module with more actions was imported meanwhile
        return self._classes.get(name)

    # To JSON.

    def dumps(self, value: object) -> bytes:
        """``value`` as JSON.

        Raises:
            CodecError: it is, or holds, an instance of a class that does not travel.
        """
        return json.dumps(self.encode(value), separators=(",", ":")).encode("ascii")

    def encode(self, value: object) -> Any:
        """``value`` as what ``json`` takes; CodecError as :meth:`dumps`."""
        kind = type(value)
        if value is None or kind in _PLAIN:
            return value
        if kind is tuple:
            return {"tuple": [self.encode(each) for each in typing.cast("tuple[object, ...]", value)]}
        if isinstance(value, list):
            return [self.encode(each) for each in value]
        if isinstance(value, Mapping):
            return {"map": [[self.encode(key), self.encode(each)] for key, each in value.items()]}
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, PurePath):
            return {"path": str(value)}
        if self._find(kind.__name__) is kind:
            if isinstance(value, enum.Enum):
                return {kind.__name__: value.name}
            return {kind.__name__: {name: self.encode(getattr(value, name)) for name in self._fields[kind]}}
        raise CodecError(f"{_shown(value)} cannot travel: {kind.__name__} is not part of the action vocabulary")

    # From JSON.

    def loads(self, data: bytes, wanted: type = object) -> Any:
        """The value that ``data`` holds, an instance of ``wanted``.

        Raises:
            CodecError: no JSON, no value, or one of another class; in one sentence.
            VmmError: what a class itself says of the values of its fields.
        """
        return self.decode(parse(data), wanted)

    def decode(self, data: Any, wanted: type = object) -> Any:
        """As :meth:`loads`, of what ``json`` gave."""
        try:
            value = self._build(data)
        except RecursionError:
            raise CodecError("a message has values within values beyond any use") from None
        if not isinstance(value, wanted):
            raise CodecError(f"{_shown(value)} came where {_article(wanted.__name__)} must be")
        return value

    def _build(self, data: Any) -> Any:
        if data is None or isinstance(data, _PLAIN):
            return data
        if isinstance(data, list):
            return [self._build(each) for each in data]
        if len(data) != 1:
            raise CodecError(f"the object {_shown(data)} must have one member, whose name says what it is")
        ((name, content),) = data.items()
        builder = _BUILDERS.get(name)
        if builder is not None:
            return builder(self, content)
        known = self._find(name)
        if known is None:
            raise CodecError(f"a message names {name[:_SHOWN]!r}, which is not part of the action vocabulary")
        if issubclass(known, enum.Enum):
            if not isinstance(content, str) or content not in known.__members__:
                raise CodecError(f"{name} has no member {_shown(content)}; it has {', '.join(known.__members__)}")
            return known[content]
        return self._build_dataclass(known, content)

    def _build_dataclass(self, known: type, content: Any) -> Any:
        name, checks = known.__name__, self._fields[known]
        if not isinstance(content, dict):
            raise CodecError(f"{name} came with {_shown(content)}, it must come with an object of its fields")
        values = {}
        for field, part in content.items():
            if field not in checks:
                raise CodecError(f"{name} has no field {field[:_SHOWN]!r}; it has {', '.join(checks) or 'none'}")
            values[field] = value = self._build(part)
            if not checks[field](value):
                declared = getattr(known, "__annotations__", {}).get(field, "another type")
                raise CodecError(f"{field} of {name} is {_shown(value)}, it must be of type {declared}")
        try:
            return known(**values)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CodecError(f"{name} cannot be made of {_shown(values)}: {error}") from error

    def _build_tuple(self, content: Any) -> tuple[Any, ...]:
        if not isinstance(content, list):
            raise CodecError(f"a tuple came as {_shown(content)}, it must come as a list")
        return tuple(self._build(each) for each in content)

    def _build_map(self, content: Any) -> dict[Any, Any]:
        if not isinstance(content, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
            raise CodecError(f"a map came as {_shown(content)}, it must come as a list of pairs")
        try:
            return {self._build(key): self._build(value) for key, value in content}
        except TypeError as error:
            raise CodecError(f"a map has a key that cannot be one: {error}") from error

    def _build_bytes(self, content: Any) -> bytes:
        try:
            return base64.b64decode(content, validate=True)
        except (TypeError, ValueError, binascii.Error) as error:
            raise CodecError(f"bytes came as {_shown(content)}, they must come as base64") from error

    def _build_path(self, content: Any) -> Path:
        if not isinstance(content, str) or "\0" in content:
            raise CodecError(f"a path came as {_shown(content)}, it must come as text without zero bytes")
        return Path(content)


_BUILDERS: Final[Mapping[str, Callable[[Vocabulary, Any], Any]]] = {
    "tuple": Vocabulary._build_tuple,
    "map": Vocabulary._build_map,
    "bytes": Vocabulary._build_bytes,
    "path": Vocabulary._build_path,
}


def parse(data: bytes) -> Any:
    """What ``data`` is as JSON; CodecError if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"a message of {len(data)} bytes is no JSON: {error}") from error


def _family(base: type) -> Iterator[type]:
    """The class and all below it."""
    yield base
    below: list[type] = type.__subclasses__(base)
    for each in below:
        yield from _family(each)


def _declared(found: type) -> dict[str, Any]:
    """The fields that the constructor takes, with their types."""
    if not dataclasses.is_dataclass(found):
        return {}
    try:
        hints = typing.get_type_hints(found)
    except NameError as error:
        raise CodecError(
            f"the fields of {found.__name__} cannot be read ({error}); import their types at run time"
        ) from error
    return {each.name: hints[each.name] for each in dataclasses.fields(found) if each.init}


def _classes_in(hint: Any) -> Iterator[type]:
    """The dataclasses and enumerations that a type is made of."""
    for part in typing.get_args(hint):
        yield from _classes_in(part)
    origin = typing.get_origin(hint) or hint
    if isinstance(origin, type) and (dataclasses.is_dataclass(origin) or issubclass(origin, enum.Enum)):
        yield origin


def _check(hint: Any) -> Check:
    """What tells whether a value is of a declared type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return lambda value: True
    if origin is typing.Annotated:
        return _check(arguments[0])
    if origin is typing.Union or origin is types.UnionType:
        checks = [_check(each) for each in arguments]
        return lambda value: any(check(value) for check in checks)
    if origin is typing.Literal:
        return lambda value: any(type(value) is type(each) and value == each for each in arguments)
    if origin is tuple:
        return _check_tuple(arguments)
    if origin in _MAPPINGS:
        key, item = map(_check, arguments)
        return lambda value: isinstance(value, dict) and all(map(key, value)) and all(map(item, value.values()))
    if origin in _SEQUENCES:
        item = _check(arguments[0])
        return lambda value: isinstance(value, (list, tuple)) and all(map(item, value))
    return _check_class(origin or hint)


def _check_tuple(arguments: tuple[Any, ...]) -> Check:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        item = _check(arguments[0])
        return lambda value: isinstance(value, tuple) and all(map(item, value))
    checks = [_check(each) for each in arguments]
    return lambda value: (
        isinstance(value, tuple)
        and len(value) == len(checks)
        and all(check(each) for check, each in zip(checks, value, strict=True))
    )


def _check_class(wanted: Any) -> Check:
    if wanted is None:
        return lambda value: value is None
    if not isinstance(wanted, type):
        raise CodecError(f"a field of type {wanted!r} cannot travel")
    if wanted is int:
        return lambda value: isinstance(value, int) and not isinstance(value, bool)
    if wanted is float:
        return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
    return lambda value: isinstance(value, wanted)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _article(name: str) -> str:
    return f"an {name}" if name[:1] in "AEIOUaeiou" else f"a {name}"
