"""What travels between a VMM process and the one that uses it: frames, messages, and errors.

A frame is a length and as many bytes of JSON, one message each (:mod:`vmm.rpc.codec`)::

    u32 length, big endian │ message, at most 4 MiB

::

    client                               server
    Hello(protocol, version) ──────────►
                             ◄────────── Welcome(protocol, version, pid), or Refused(sentence) and the end
    Request(number, action)  ──────────►
                             ◄────────── Answer(number, value), or Failure(number, …) in place of it
                             ◄────────── events: StateChanged, ConfigurationChanged, ConsoleOutput, MilestonesReached,
                                         VmEnded

Requests are answered in any order, each under its number; what changed because of a request is told before its answer.
A message that cannot be read is answered with a Failure, without a number if it has none, and the connection goes on.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vmm.actions import Empty, MachineEnd, VmmAction, VmState
from vmm.config import VmConfig
from vmm.errors import VmmError
from vmm.metrics import VmMetrics
from vmm.rpc.codec import CodecError, Vocabulary, parse
from vmm.trace import Milestone

PROTOCOL: Final = 1  #: raised with every change that the other side cannot read
MAX_FRAME: Final = 4 << 20  #: bytes of one message
LENGTH: Final = struct.Struct(">I")


class RpcError(VmmError):
    """A VMM process that cannot be reached, has gone, refuses the client, or failed in a way that it did not expect."""


class BusyError(RpcError):
    """More requests at once than a VMM process takes."""


@dataclass(frozen=True, slots=True)
class Message:
    """Base of everything that is one frame."""


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """The client's first words."""

    protocol: int
    version: str


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """The server's answer to a client that speaks the same protocol; the server is process ``pid``."""

    protocol: int
    version: str
    pid: int


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """The server does not serve this client, and says why."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Request(Message):
    """An action; the client chooses the number."""

    number: int
    action: VmmAction[Any]


@dataclass(frozen=True, slots=True)
class Answer(Message):
    """What the action of that number answered."""

    number: int
    value: Any


@dataclass(frozen=True, slots=True)
class Failure(Message):
    """The error of the action of that number; None for a message that has none.

    Attributes:
        number: of the request.
        kind: module and name of the error's class.
        sentence: what it says.
        attributes: what else the error has, as far as it can travel.
    """

    number: int | None
    kind: str
    sentence: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StateChanged(Message):
    """The VM is in another state."""

    state: VmState


@dataclass(frozen=True, slots=True)
class ConfigurationChanged(Message):
    """The VM's configuration is another one."""

    config: VmConfig


@dataclass(frozen=True, slots=True)
class ConsoleOutput(Message):
    """The guest printed."""

    data: bytes


@dataclass(frozen=True, slots=True)
class MilestonesReached(Message):
    """Milestones that were not told yet."""

    milestones: tuple[Milestone, ...]


@dataclass(frozen=True, slots=True)
class VmEnded(Message):
    """The VM has ended, and these are its last counters."""

    end: MachineEnd
    metrics: VmMetrics


# Actions that only a VMM in a process of its own needs: in the same process they are attributes and methods.


@dataclass(frozen=True, slots=True)
class CreateMicroVm(VmmAction[Empty]):
    """Make the VM; the first request of all."""

    config: VmConfig


@dataclass(frozen=True, slots=True)
class ThreadIds:
    """The VMM's threads by name."""

    threads: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class GetThreadIds(VmmAction[ThreadIds]):
    """Ask for the threads of the vCPUs and of the VM's event loop."""


@dataclass(frozen=True, slots=True)
class Counters:
    """The VM's counters."""

    metrics: VmMetrics


@dataclass(frozen=True, slots=True)
class ReadMetrics(VmmAction[Counters]):
    """Ask for the counters at once, without waiting for the actions before."""


@dataclass(frozen=True, slots=True)
class Typed:
    """How many bytes the guest's serial port took."""

    count: int


@dataclass(frozen=True, slots=True)
class TypeOnConsole(VmmAction[Typed]):
    """Type; if the serial port has no room, answered a little later with what it took then."""

    data: bytes


@functools.cache
def vocabulary() -> Vocabulary:
    """Everything that travels."""
    return Vocabulary((Message, VmmAction))


@functools.cache
def version() -> str:
    """The version of Kata Lab that is installed here."""
    try:
        return importlib.metadata.version("kata-lab")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def pack(message: Message) -> bytes:
    """The message as a frame.

    Raises:
        CodecError: it cannot travel, or is longer than a frame may be.
    """
    data = vocabulary().dumps(message)
    if len(data) > MAX_FRAME:
        raise CodecError(f"{type(message).__name__} has {len(data)} bytes, a message has at most {MAX_FRAME}")
    return LENGTH.pack(len(data)) + data


def unpack(data: bytes) -> Message:
    """The message of a frame, without its length.

    Raises:
        CodecError: it is none.
        VmmError: the fields of what it holds do not fit together.
    """
    message: Message = vocabulary().loads(data, Message)
    return message


def greeting(data: bytes) -> tuple[object, object]:
    """Protocol and version of a Hello, which any version can read of any other; CodecError if it is none."""
    content = parse(data)
    hello = content.get("Hello") if isinstance(content, dict) else None
    if not isinstance(hello, dict):
        raise CodecError("the first message of a client must be a Hello")
    return hello.get("protocol"), hello.get("version")


def require_same_version(hello: bytes, what: str) -> None:
    """Refuse a client that ``what``, the process here, may not understand.

    Raises:
        CodecError: it did not say Hello.
        RpcError: it is of another version.
    """
    protocol, other = greeting(hello)
    if protocol != PROTOCOL or other != version():
        raise RpcError(
            f"{what} is kata-lab {version()} with protocol {PROTOCOL}, the client is kata-lab {other} with protocol"
            f" {protocol}; both must come from one installation"
        )


def request_number(data: bytes) -> int | None:
    """The number of a request whose action cannot be read; None if it has none."""
    try:
        number = parse(data)["Request"]["number"]
    except (CodecError, KeyError, TypeError):
        return None
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def failure(number: int | None, error: BaseException, what: str) -> Failure:
    """The error of ``what`` as a message: a VmmError as it is, anything else as an :class:`RpcError` that tells it."""
    if not isinstance(error, VmmError):
        error = RpcError(f"{what} failed in the VMM process, which is a mistake there: {type(error).__name__}: {error}")
    attributes = {}
    for name, value in getattr(error, "__dict__", {}).items():
        try:
            vocabulary().encode(value)
        except CodecError:
            continue
        attributes[name] = value
    kind = type(error)
    return Failure(number, f"{kind.__module__}:{kind.__qualname__}", str(error), attributes)


def rebuilt(told: Failure) -> VmmError:
    """The error that the other side raised: of the same class where it is one of this package."""
    module, _, name = told.kind.partition(":")
    kind: object = None
    if module.split(".")[0] == "vmm":
        try:
            kind = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            kind = None
    if not (isinstance(kind, type) and issubclass(kind, VmmError)):
        return RpcError(told.sentence)
    error = kind.__new__(kind, told.sentence)
    for attribute, value in told.attributes.items():
        setattr(error, attribute, value)
    return error
