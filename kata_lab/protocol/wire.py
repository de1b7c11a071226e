"""Protocol Buffers' binary encoding (Protocol Buffers documentation, "Encoding") of messages that are dictionaries.

A schema maps the full name of a message to its fields by number::

    {"grpc.WaitProcessRequest": {1: ("container_id", "string", "one"), 2: ("exec_id", "string", "one")}}

A field has a name, a kind (a scalar's name, or the full name of a message) and a label: ``one``, ``many``,
``optional``, or for a map the kind of its keys. Decoding gives every field a value: what was sent, else the default of
proto3; a message that was not sent is None, an ``optional`` field too. Encoding leaves out defaults, and refuses names
and values that the schema does not have. Unknown fields are skipped, as the specification wants.

The same module runs in the guest under MicroPython, hence no imports and plain code. Left out: groups, floats, and
keeping unknown fields.
"""

MAX_DEPTH = 16

_VARINT = 0
_FIXED64 = 1
_BYTES = 2
_FIXED32 = 5

_BOUNDS = {
    "int32": (-(1 << 31), (1 << 31) - 1),
    "int64": (-(1 << 63), (1 << 63) - 1),
    "uint32": (0, (1 << 32) - 1),
    "uint64": (0, (1 << 64) - 1),
    "enum": (-(1 << 31), (1 << 31) - 1),
}
_DEFAULTS = {"string": "", "bytes": b"", "bool": False, "int32": 0, "int64": 0, "uint32": 0, "uint64": 0, "enum": 0}


class WireError(ValueError):
    """Bytes that are no message of the kind, or a dictionary that the schema does not describe."""


def encode(schema, name, message):
    """The bytes of ``message``, a dictionary, as message ``name`` of ``schema``.

    Raises:
        WireError: a field that the message does not have, or a value that its kind does not hold.
    """
    out = bytearray()
    left = len(message)
    for number in schema[name]:
        field, kind, label = schema[name][number]
        if field not in message:
            continue
        left -= 1
        value = message[field]
        if value is None:
            continue
        where = name, field
        if label == "one":
            if kind in _DEFAULTS and value == _DEFAULTS[kind] and isinstance(value, type(_DEFAULTS[kind])):
                continue
            _put(out, schema, number, kind, value, where)
        elif label == "optional":
            _put(out, schema, number, kind, value, where)
        elif label == "many":
            if not isinstance(value, (list, tuple)):
                raise WireError(f"{_named(where)} is {value!r}, it must be a list")
            if kind in _BOUNDS or kind == "bool":
                packed = bytearray()
                for each in value:
                    _put_varint(packed, _checked(kind, each, where))
                if packed:
                    _put_varint(out, number << 3 | _BYTES)
                    _put_varint(out, len(packed))
                    out += packed
            else:
                for each in value:
                    _put(out, schema, number, kind, each, where)
        else:
            if not isinstance(value, dict):
                raise WireError(f"{_named(where)} is {value!r}, it must be a dictionary")
            for key in value:
                entry = bytearray()
                _put(entry, schema, 1, label, key, where)
                _put(entry, schema, 2, kind, value[key], where)
                _put_varint(out, number << 3 | _BYTES)
                _put_varint(out, len(entry))
                out += entry
    if left:
        known = [each[0] for each in schema[name].values()]
        unknown = next(each for each in message if each not in known)
        known = ", ".join(known) or "none"
        raise WireError(f"{name} has no field {unknown!r}; it has {known}")
    return bytes(out)


def decode(schema, name, data, depth=0):
    """The dictionary that ``data`` holds, as message ``name`` of ``schema``.

    Raises:
        WireError: bytes that end early, a field of another wire type, text that is not UTF-8, or too much nesting.
    """
    return _decode(schema, schema[name], name, data, depth)


def _decode(schema, fields, name, data, depth):
    if depth > MAX_DEPTH:
        raise WireError(f"{name} is nested deeper than {MAX_DEPTH} messages")
    message = {}
    for number in fields:
        field, kind, label = fields[number]
        if label == "many":
            message[field] = []
        elif label == "optional" or (label == "one" and kind not in _DEFAULTS):
            message[field] = None
        elif label == "one":
            message[field] = _DEFAULTS[kind]
        else:
            message[field] = {}
    at, end = 0, len(data)
    while at < end:
        tag, at = _take_varint(data, at, name)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _take_varint(data, at, name)
        elif wire == _BYTES:
            length, at = _take_varint(data, at, name)
            if length > end - at:
                raise WireError(f"{name} ends in the middle of field {number}")
            value = data[at : at + length]
            at += length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
            if at > end:
                raise WireError(f"{name} ends in the middle of field {number}")
            value = None
        else:
            raise WireError(f"{name} has wire type {wire}, which there is not")
        if number not in fields:
            continue
        field, kind, label = fields[number]
        where = name, field
        if label == "many":
            if wire == _BYTES and (kind in _BOUNDS or kind == "bool"):
                inner, named = 0, _named(where)
                while inner < len(value):
                    one, inner = _take_varint(value, inner, named)
                    message[field].append(_scalar(kind, one, _VARINT, where))
            else:
                message[field].append(_value(schema, kind, value, wire, where, depth))
        elif label == "one" or label == "optional":
            message[field] = _value(schema, kind, value, wire, where, depth)
        else:
            if wire != _BYTES:
                raise WireError(f"{_named(where)} has wire type {wire}, it must be {_BYTES}")
            parts = {1: ("key", label, "one"), 2: ("value", kind, "one")}
            entry = _decode(schema, parts, _named(where), value, depth + 1)
            message[field][entry["key"]] = entry["value"]
    return message


def _named(where):
    """A field for people. Its name is made when it is needed: to make a text is dear in MicroPython."""
    return ".".join(where)


def _put(out, schema, number, kind, value, where):
    if kind in _BOUNDS or kind == "bool":
        _put_varint(out, number << 3 | _VARINT)
        _put_varint(out, _checked(kind, value, where))
        return
    if kind == "string":
        if not isinstance(value, str):
            raise WireError(f"{_named(where)} is {value!r}, it must be text")
        data = value.encode()
    elif kind == "bytes":
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise WireError(f"{_named(where)} is {value!r}, it must be bytes")
        data = value
    else:
        if not isinstance(value, dict):
            raise WireError(f"{_named(where)} is {value!r}, it must be a dictionary, a message {kind}")
        data = encode(schema, kind, value)
    _put_varint(out, number << 3 | _BYTES)
    _put_varint(out, len(data))
    out += data


def _checked(kind, value, where):
    if kind == "bool":
        if not isinstance(value, bool):
            raise WireError(f"{_named(where)} is {value!r}, it must be True or False")
        return int(value)
    low, high = _BOUNDS[kind]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise WireError(f"{_named(where)} is {value!r}, it must be a whole number from {low} to {high}")
    return value & 0xFFFFFFFFFFFFFFFF


def _put_varint(out, value):
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _take_varint(data, at, where):
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise WireError(f"{where} has a number that ends early or is longer than 64 bits")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7


def _value(schema, kind, value, wire, where, depth):
    if kind in _DEFAULTS:
        return _scalar(kind, value, wire, where)
    if wire != _BYTES:
        raise WireError(f"{_named(where)} has wire type {wire}, it must be {_BYTES}")
    return decode(schema, kind, value, depth + 1)


def _scalar(kind, value, wire, where):
    expected = _BYTES if kind in ("string", "bytes") else _VARINT
    if wire != expected:
        raise WireError(f"{_named(where)} has wire type {wire}, it must be {expected}")
    if kind == "string":
        try:
            return str(bytes(value), "utf-8")
        except ValueError as error:
            raise WireError(f"{_named(where)} is not UTF-8") from error
    if kind == "bytes":
        return bytes(value)
    if kind == "bool":
        return value != 0
    if kind in ("uint32", "uint64"):
        return value & 0xFFFFFFFF if kind == "uint32" else value
    bits = 64 if kind == "int64" else 32
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value
