"""Shapes that plain JSON must have: small checks that are put together, and say where a value is and what is wrong.

A check is called with a value and its JSON path (``$.process.args[0]``); it returns nothing, or raises. So a document's
whole form is one expression that can be read beside its specification. Objects are strict: a field that the shape does
not name is refused, with the nearest name that it has.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kata_lab.errors import KataLabError

Check = Callable[[Any, str], None]

INT64 = (1 << 63) - 1
UINT32 = (1 << 32) - 1
UINT64 = (1 << 64) - 1
LONGEST_TEXT = 4096
MOST_ITEMS = 4096

_SHOWN = 80
_PLAIN_NAME = re.compile(r"[A-Za-z_][\w-]*")


class ShapeError(KataLabError):
    """Plain data that has not the form it must have; the message begins with the JSON path."""


def shown(value: Any) -> str:
    """A value as JSON, cut short when it is long."""
    if isinstance(value, str) and len(value) > _SHOWN:
        return f"{json.dumps(value[:_SHOWN])}… ({len(value)} characters)"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 80:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return repr(value)[:_SHOWN]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or else all of a few."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not near:  # another case, or a prefix left out, is no small difference to difflib
        near = [each for each in names if each.lower().endswith(name.lower())][:1] if name else []
    if near:
        return f"did you mean {near[0]!r}?"
    return f"it is one of {', '.join(names)}" if 0 < len(names) <= 30 else "check its spelling"


def inside(path: str, name: str) -> str:
    """The JSON path of a field."""
    return f"{path}.{name}" if _PLAIN_NAME.fullmatch(name) else f"{path}[{shown(name)}]"


def refuse(path: str, value: Any, should: str) -> ShapeError:
    """The error that says so."""
    return ShapeError(f"{path} is {shown(value)}: {should}")


def text(*, longest: int = LONGEST_TEXT, empty: bool = True) -> Check:
    """A text without NUL that UTF-8 can carry, of at most `longest` characters."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, str):
            raise refuse(path, value, "it must be a text")
        if len(value) > longest:
            raise refuse(path, value, f"it must have at most {longest} characters")
        if not value and not empty:
            raise refuse(path, value, "it must not be empty")
        if "\0" in value:
            raise refuse(path, value, "it must not contain a NUL character")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise refuse(path, value, "it must not contain half of a surrogate pair")

    return check


def matching(pattern: str, should: str, *, longest: int = LONGEST_TEXT) -> Check:
    """A text that wholly matches a regular expression; `should` ends the sentence of a refusal."""
    is_text = text(longest=longest)

    def check(value: Any, path: str) -> None:
        is_text(value, path)
        if not re.fullmatch(pattern, value):  # compiled when it is first needed
            raise refuse(path, value, should)

    return check


def one_of(*names: str, what: str = "name") -> Check:
    """One of the names; the refusal suggests the nearest."""
    known, is_text = frozenset(names), text()

    def check(value: Any, path: str) -> None:
        is_text(value, path)
        if value not in known:
            raise refuse(path, value, f"there is no such {what}, {nearest(value, known)}")

    return check


def whole(low: int, high: int) -> Check:
    """A whole number from `low` to `high`."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise refuse(path, value, f"it must be a whole number from {low} to {high}")
        if not low <= value <= high:
            raise refuse(path, value, f"it must be from {low} to {high}")

    return check


def flag(value: Any, path: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise refuse(path, value, "it must be true or false")


def list_of(each: Check, *, most: int = MOST_ITEMS, least: int = 0) -> Check:
    """A list."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, list):
            raise refuse(path, value, "it must be a list")
        if not least <= len(value) <= most:
            raise refuse(path, value, f"it must have {least} to {most} items")
        for index, item in enumerate(value):
            each(item, f"{path}[{index}]")

    return check


def map_of(key: Check, each: Check, *, most: int = MOST_ITEMS) -> Check:
    """An object whose names are free."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise refuse(path, value, "it must be an object")
        if len(value) > most:
            raise refuse(path, value, f"it must have at most {most} fields")
        for name, item in value.items():
            key(name, f"{path} (a name in it)")
            each(item, inside(path, name))

    return check


def record(
    fields: Mapping[str, Check],
    *,
    required: Iterable[str] = (),
    refused: Mapping[str, str] | None = None,
    open_ended: bool = False,
) -> Check:
    """An object of known fields.

    Args:
        fields: what each field must be.
        required: names that must be there.
        refused: names that the specification knows and this project does not carry out, with the reason. A null, and
            an empty object, list or text say nothing, and are let pass.
        open_ended: fields that the shape does not name are let pass, as the image specification wants.
    """
    needed, unsupported = tuple(required), refused or {}

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise refuse(path, value, "it must be an object")
        for name in needed:
            if name not in value:
                raise ShapeError(f"{path} has no field {name!r}: it must have one")
        for name, item in value.items():
            if name in fields:
                fields[name](item, inside(path, name))
            elif name in unsupported:
                if item not in (None, {}, [], ""):
                    raise refuse(inside(path, name), item, unsupported[name])
            elif not open_ended:
                raise ShapeError(f"{inside(path, name)} is an unknown field: {nearest(name, fields)}")

    return check


def both(*checks: Check) -> Check:
    """All of the checks, in their order."""

    def check(value: Any, path: str) -> None:
        for each in checks:
            each(value, path)

    return check


def parse_json(data: bytes, origin: str, most: int) -> Any:
    """The value in JSON text; a name given twice, a number that JSON has not, or too much of it is refused.

    Args:
        data: UTF-8.
        origin: what to call the text in messages.
        most: bytes that it may have.

    Raises:
        ShapeError: so.
    """
    if len(data) > most:
        raise ShapeError(f"{origin} has {len(data)} bytes: it must have at most {most}")
    try:
        return json.loads(data, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except RecursionError as error:
        raise ShapeError(f"{origin} is nested too deeply: a few levels are enough") from error
    except ValueError as error:
        raise ShapeError(f"{origin} is not valid JSON: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is given twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
