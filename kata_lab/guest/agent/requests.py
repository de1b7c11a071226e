"""Reads requests: Protocol Buffers' binary encoding into dictionaries, as wire.py does, at a fifth of its cost here.

What a message has is prepared when it is first met, by the tag of each field; a message inside another one is read
where it lies. A message that describes a container becomes what the configuration calls it at once (``described``,
see bundle.py): keys have the configuration's names, and what says nothing is not there. wire.py is the referee in the
tests. Left out: floats and groups.
"""

from wire import MAX_DEPTH, WireError

_VARINT, _BYTES = 0, 2
_SKIPPED = {1: 8, 5: 4}  # wire type → length of numbers that no message has
_NUMBER, _TEXT, _MESSAGE, _DATA, _NUMBERS = range(5)  # what a field holds, all but the first after its length
_IF_SAID, _ALWAYS, _APPENDED, _MAPPED = range(4)  # how it comes into the message
_MOST_KEPT, _LONGEST_KEPT = 512, 64  # texts that were read before, and bytes of one
_BITS = {"bool": 1, "uint32": 32, "uint64": 64, "int32": -32, "enum": -32, "int64": -64}  # negative with a sign
_DEFAULTS = {"string": "", "bytes": b"", "bool": False, "int32": 0, "int64": 0, "uint32": 0, "uint64": 0, "enum": 0}


class Reader:
    """Reads messages of a schema, a mapping as in wire.py."""

    def __init__(self, schema, described=(), key_of=None):
        """``described`` are the messages, with those in them, whose fields ``key_of`` names.

        It gives the key, None if the field is not wanted, and whether it is to be there when it says nothing.
        """
        self._schema = schema
        self._described = set(described)
        self._key_of = key_of
        self._plans = {}
        self._texts = {}

    def read(self, name, data, start=0, end=None, depth=0):
        """The dictionary that a part of ``data``, a memoryview, holds as message ``name``; bytes in it are views of it.

        WireError is raised as by wire.decode.
        """
        plan = self._plans.get(name) or self._prepare(name, self._schema[name])
        if depth > MAX_DEPTH:
            raise WireError(f"{name} is nested deeper than {MAX_DEPTH} messages")
        fields, numbers, defaults, fresh = plan
        texts = self._texts
        message = defaults.copy()
        for key, make in fresh:
            message[key] = make()
        if end is None:
            end = len(data)
        try:
            while start < end:
                tag = data[start]
                start += 1
                if tag > 127:
                    tag, start = _varint(data, start - 1, name)
                field = fields.get(tag)
                if field is None:
                    start = _skip(data, start, numbers, name, tag)
                    continue
                key, what, kind, how = field
                value = data[start]
                start += 1
                if value > 127:
                    value, start = _varint(data, start - 1, name)
                if what == _NUMBER:
                    value = _number(kind, value)
                else:
                    # The number is a length.
                    at, start = start, start + value
                    if start > end:
                        raise WireError(f"{name} ends in the middle of field {tag >> 3}")
                    if what == _TEXT:
                        value = bytes(data[at:start])
                        value = texts.get(value) or self._text(value)
                    elif what == _MESSAGE:
                        value = self.read(kind, data, at, start, depth + 1)
                    elif what == _DATA:
                        value = data[at:start]
                    else:
                        _unpack(message.setdefault(key, []), kind, data, at, start, name)
                        continue
                if how <= _ALWAYS:
                    if value or how:
                        message[key] = value
                    elif key in message:
                        del message[key]
                elif how == _MAPPED:
                    message.setdefault(key, {})[value["key"]] = value["value"]
                elif key in message:
                    message[key].append(value)
                else:
                    message[key] = [value]
        except UnicodeError:
            raise WireError(f"{name} has text that is not UTF-8")
        except IndexError:
            start = end + 1
        if start > end:
            raise WireError(f"{name} ends early")
        return message

    def _text(self, data):
        """To make a text, MicroPython looks through every name that it knows: what came before is kept instead."""
        text = str(data, "utf-8")
        if 0 < len(data) <= _LONGEST_KEPT:
            if len(self._texts) >= _MOST_KEPT:
                self._texts.clear()
            self._texts[data] = text
        return text

    def _prepare(self, name, schema):
        """The fields by their tags, the numbers of all, what a message has that says nothing, and what is made anew."""
        described = name in self._described
        fields, defaults, fresh = {}, {}, []
        for number in schema:
            key, kind, label = schema[number]
            always = True
            if described:
                key, always = self._key_of(key)
                if key is None:
                    continue
            if described and kind not in _DEFAULTS:
                self._described.add(kind)
            what = _NUMBER if kind in _BITS else {"string": _TEXT, "bytes": _DATA}.get(kind, _MESSAGE)
            if label in ("one", "optional"):
                how = _ALWAYS if always or label == "optional" else _IF_SAID
                if always:
                    defaults[key] = _DEFAULTS.get(kind) if label == "one" else None
            elif label == "many":
                how = _APPENDED
                if what == _NUMBER:
                    fields[number << 3 | _BYTES] = key, _NUMBERS, kind, how
            else:
                what, how, inner = _MESSAGE, _MAPPED, name + "." + key
                self._prepare(inner, {1: ("key", label, "one"), 2: ("value", kind, "one")})
                kind = inner
            if always and how > _ALWAYS:
                fresh.append((key, dict if how == _MAPPED else list))
            fields[number << 3 | (_VARINT if what == _NUMBER else _BYTES)] = key, what, kind, how
        plan = self._plans[name] = fields, {tag >> 3 for tag in fields}, defaults, fresh
        return plan


def _skip(data, at, numbers, name, tag):
    """Where a field ends that nobody knows; one that is known comes as it is known."""
    wire = tag & 7
    if tag >> 3 in numbers:
        raise WireError(f"field {tag >> 3} of {name} has wire type {wire}")
    if wire in _SKIPPED:
        return at + _SKIPPED[wire]
    if wire not in (_VARINT, _BYTES):
        raise WireError(f"{name} has wire type {wire}, which there is not")
    value, at = _varint(data, at, name)
    return at + value if wire == _BYTES else at


def _unpack(found, kind, data, at, end, name):
    """Add numbers that are packed into one field."""
    while at < end:
        value, at = _varint(data, at, name)
        found.append(_number(kind, value))
    if at > end:
        raise WireError(f"{name} has a number that ends early")


def _varint(data, at, name):
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise WireError(f"{name} has a number that is longer than 64 bits")


def _number(kind, value):
    bits = _BITS[kind]
    if bits == 1:
        return value != 0
    if bits > 0:
        return value & 0xFFFFFFFF if bits == 32 else value
    value &= (1 << -bits) - 1
    return value - (1 << -bits) if value >> (-bits - 1) else value
