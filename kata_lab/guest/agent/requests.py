"""Reads requests: Protocol Buffers' binary encoding into dictionaries, as wire.py does, at a tenth of its cost here.

What a message has is prepared when it is first met, by the tag of each field; a message inside another one is read
where it lies. A message that describes a container becomes what the configuration calls it at once (``described``,
see bundle.py): keys have the configuration's names, and what says nothing is not there. wire.py is the referee in the
tests. Left out: floats and groups.
"""

from wire import MAX_DEPTH, WireError

_VARINT, _BYTES = 0, 2
_SKIPPED = {1: 8, 5: 4}  # wire type → length of numbers that no message has
_TEXTS, _MESSAGES, _TEXT, _MESSAGE, _DATA, _MAP, _PACKED = range(7)  # how a field is read
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

    def read(self, name, data, start=0, end=None, depth=0):
        """The dictionary that a part of ``data``, a memoryview, holds as message ``name``. WireError as wire.decode."""
        plan = self._plans.get(name) or self._prepare(name, self._schema[name])
        if depth > MAX_DEPTH:
            raise WireError(f"{name} is nested deeper than {MAX_DEPTH} messages")
        fields, numbers, defaults, fresh = plan
        message = defaults.copy()
        for key, make in fresh:
            message[key] = make()
        at = start
        if end is None:
            end = len(data)
        try:
            while at < end:
                tag = data[at]
                at += 1
                if tag > 127:
                    tag, at = _varint(data, at - 1, name)
                field = fields.get(tag)
                if tag & 7 == _BYTES:
                    length = data[at]
                    at += 1
                    if length > 127:
                        length, at = _varint(data, at - 1, name)
                    start = at
                    at += length
                    if at > end:
                        raise WireError(f"{name} ends in the middle of field {tag >> 3}")
                    if field is None:
                        _refuse(numbers, name, tag)
                        continue
                    key, how, kind, always = field
                    if how <= _MESSAGES:
                        if how == _TEXTS:
                            value = str(data[start:at], "utf-8")
                        else:
                            value = self.read(kind, data, start, at, depth + 1)
                        found = message.get(key)
                        if found is None:
                            message[key] = [value]
                        else:
                            found.append(value)
                        continue
                    if how == _TEXT:
                        value = str(data[start:at], "utf-8")
                    elif how == _MESSAGE:
                        value = self.read(kind, data, start, at, depth + 1)
                    elif how == _DATA:
                        value = bytes(data[start:at])
                    else:
                        found = message.get(key)
                        if found is None:
                            found = message[key] = {} if how == _MAP else []
                        if how == _MAP:
                            entry = self.read(kind, data, start, at, depth + 1)
                            found[entry["key"]] = entry["value"]
                        else:
                            while start < at:
                                value, start = _varint(data, start, name)
                                found.append(_number(kind, value))
                            if start > at:
                                raise WireError(f"{name} has a number that ends early")
                        continue
                elif tag & 7 == _VARINT:
                    value = data[at]
                    at += 1
                    if value > 127:
                        value, at = _varint(data, at - 1, name)
                    if field is None:
                        _refuse(numbers, name, tag)
                        continue
                    key, how, kind, always = field
                    value = _number(kind, value)
                    if how == _PACKED:
                        message.setdefault(key, []).append(value)
                        continue
                else:
                    if tag & 7 not in _SKIPPED:
                        raise WireError(f"{name} has wire type {tag & 7}, which there is not")
                    at += _SKIPPED[tag & 7]
                    _refuse(numbers, name, tag)
                    continue
                if value or always:
                    message[key] = value
                elif key in message:
                    del message[key]
        except UnicodeError:
            raise WireError(f"{name} has text that is not UTF-8")
        except IndexError:
            at = end + 1
        if at > end:
            raise WireError(f"{name} ends early")
        return message

    def _prepare(self, name, schema):
        """The fields by their tags, the numbers of all, what the message has that is sent nothing, and what is made
        anew for each."""
        described = name in self._described
        fields, defaults, fresh = {}, {}, []
        for number in schema:
            key, kind, label = schema[number]
            always = True
            if described:
                key, always = self._key_of(key)
                if key is None:
                    continue
            scalar = kind in _DEFAULTS
            bare = kind in _BITS
            if described and not scalar:
                self._described.add(kind)
            if label in ("one", "optional"):
                how = _TEXT if kind == "string" else _DATA if kind == "bytes" else _MESSAGE
                if always:
                    defaults[key] = _DEFAULTS[kind] if scalar and label == "one" else None
                always = always or label == "optional"
            elif label == "many":
                how = _PACKED if bare else _TEXTS if kind == "string" else _MESSAGES
                if always:
                    fresh.append((key, list))
            else:
                how, inner = _MAP, name + "." + key
                self._prepare(inner, {1: ("key", label, "one"), 2: ("value", kind, "one")})
                kind, bare = inner, False
                if always:
                    fresh.append((key, dict))
            if bare:
                fields[number << 3 | _VARINT] = key, how, kind, always
            if not bare or how == _PACKED:
                fields[number << 3 | _BYTES] = key, how, kind, always
        plan = self._plans[name] = fields, {tag >> 3 for tag in fields}, defaults, fresh
        return plan


def _refuse(numbers, name, tag):
    """A field that nobody knows is skipped; one that is known comes as it is known."""
    if tag >> 3 in numbers:
        raise WireError(f"field {tag >> 3} of {name} has wire type {tag & 7}")


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
