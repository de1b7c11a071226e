"""Upcall: how the VMM asks the guest to take or give up CPUs, memory and devices, instead of ACPI.

The VMM is the client of a device manager in the guest, on vsock port 219. It connects, sends the byte ``d``, and is
answered with a CONNECT frame; then each request is answered with one reply. The format is that of Dragonball's kernel
(``DevMgr`` 1.0; the magic number is ``DM`` and that version). Every frame has 1024 bytes, little endian, zeros behind
what is used; ``msg_size`` counts the body alone::

    request   u32 magic │ u32 msg_size │ u32 msg_type │ u32 msg_flags │ body …                          body at 16
    reply     u32 magic │ u32 msg_size │ u32 msg_type │ u32 msg_flags │ i32 result │ body …             body at 20

``result`` is 0, or a negative errno of Linux, and then a body is empty. States of the client::

    WAITING_SERVER ─dial─► WAITING_SERVICE ─CONNECT─► SERVICE_CONNECTED ⇄ SERVICE_BUSY
          ▲                      │                          │                  │
          └──the next request────┴───► RECONNECT_ERROR ◄────┴── lost, late, ───┘
                                                                or wrong

Replies carry no number that would tell which request they answer. So a connection over which anything came that was
not due (a late reply, a second one, garbage) is of no use any more: it is dropped, and the next request makes a new
one. (A second reply that comes only once the next request has been sent can pass for its reply, if of the same type.)
The guest is hostile: it can fail a request, and it can lie about its result, and no more; what it sends is read
into one buffer of 1024 bytes.

Errors::

    UpcallError
    ├── FrameError          bytes that are no frame, or a frame that cannot be made
    ├── UpcallUnavailable   no device manager was reached: the guest has never seen the request
    ├── UpcallRefused       the guest answered that it could not, and is as before
    └── UpcallLost          the request was sent, and no right answer came: the guest may have carried it out

Left out: frames of PCI devices, whose body no kernel defines (their types are known), and ``msg_flags``, which is 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, astuple, dataclass
from typing import Final, NamedTuple, TypeAlias

from vmm.errors import VmmError

PORT: Final = 219  #: of the guest's vsock
SERVICE: Final = b"d"  #: what the client asks for first: the device manager
FRAME_SIZE: Final = 1024
MAGIC: Final = 0x444D_0100
MAX_ERRNO: Final = 4095  #: the largest that Linux can return

RETRY_SECONDS: Final = 0.01
ATTEMPTS: Final = 500  #: to connect, before a request is given up
CONNECT_SECONDS: Final = 20.0  #: for all attempts together
REPLY_SECONDS: Final = 15.0  #: for the guest to carry a request out
RECENT_FRAMES: Final = 256


class UpcallError(VmmError):
    """A request that the guest's device manager did not carry out."""


class FrameError(UpcallError):
    """Bytes that are no frame of the device manager, or fields that no frame can carry."""


class UpcallUnavailable(UpcallError):
    """The device manager was not reached: the guest has never seen the request."""


class UpcallRefused(UpcallError):
    """The guest could not carry the request out, and is as before.

    Attributes:
        errno: why, as a positive number of Linux's errno(3).
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.errno = number


class UpcallLost(UpcallError):
    """The request was sent and not answered rightly: the guest may or may not have carried it out."""


class FrameType(enum.IntEnum):
    """What a frame asks for; the reply has the type of its request."""

    CONNECT = 0
    ADD_CPU = 1
    DEL_CPU = 2
    ADD_MEM = 3
    DEL_MEM = 4
    ADD_MMIO = 5
    DEL_MMIO = 6
    ADD_PCI = 7
    DEL_PCI = 8


_TYPES: Final = frozenset(map(int, FrameType))


class Direction(enum.Enum):
    """Which way a frame goes."""

    REQUEST = "to the guest"
    REPLY = "from the guest"


class Header(NamedTuple):
    """What every frame begins with."""

    magic: int
    msg_size: int
    msg_type: int
    msg_flags: int


@dataclass(frozen=True, slots=True)
class Cpus:
    """How many CPUs shall come or go, 1 to 255."""

    count: int


@dataclass(frozen=True, slots=True)
class ApicCpus:
    """CPUs of a PC: which APICs they have. ``apic_ids`` is 256 bytes, of which the first ``count`` matter."""

    count: int
    apic_version: int
    apic_ids: bytes


@dataclass(frozen=True, slots=True)
class LastCpu:
    """The index of the CPU that came or went last."""

    index: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Guest-physical memory: base and size in bytes. No kernel defines this body; it is that of MMIO without irq."""

    base: int
    size: int


@dataclass(frozen=True, slots=True)
class Mmio:
    """A device: guest-physical base and size in bytes of its registers, and its interrupt's number."""

    base: int
    size: int
    irq: int


Body: TypeAlias = Cpus | ApicCpus | LastCpu | Memory | Mmio

_HEADER: Final = struct.Struct("<IIII")
_RESULT: Final = struct.Struct("<i")

#: How a body lies in the frame. The four bytes behind the interrupt align the structure.
LAYOUTS: Final[dict[type[Body], struct.Struct]] = {
    Cpus: struct.Struct("<B"),
    ApicCpus: struct.Struct("<BB256s"),
    LastCpu: struct.Struct("<I"),
    Memory: struct.Struct("<QQ"),
    Mmio: struct.Struct("<QQI4x"),
}

#: What a request's and a reply's body may be; a type that is not named has none.
BODIES: Final[dict[Direction, dict[FrameType, tuple[type[Body], ...]]]] = {
    Direction.REQUEST: {
        FrameType.ADD_CPU: (Cpus, ApicCpus),
        FrameType.DEL_CPU: (Cpus, ApicCpus),
        FrameType.ADD_MEM: (Memory,),
        FrameType.DEL_MEM: (Memory,),
        FrameType.ADD_MMIO: (Mmio,),
        FrameType.DEL_MMIO: (Mmio,),
    },
    Direction.REPLY: {
        FrameType.ADD_CPU: (LastCpu,),
        FrameType.DEL_CPU: (LastCpu,),
    },
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame.

    Attributes:
        type: what it asks for or answers.
        body: what belongs to that, None for nothing.
        result: of a reply, 0 or a negative errno; None makes it a request.
    """

    type: FrameType
    body: Body | None = None
    result: int | None = None

    @property
    def direction(self) -> Direction:
        """Which way it goes."""
        return Direction.REQUEST if self.result is None else Direction.REPLY

    def encode(self) -> bytes:
        """The frame's 1024 bytes.

        Raises:
            FrameError: a body that this type does not have, or a value that does not fit its field.
        """
        try:
            body = b"" if self.body is None else LAYOUTS[type(self.body)].pack(*astuple(self.body))
            result = b"" if self.result is None else _RESULT.pack(self.result)
        except struct.error as error:
            raise FrameError(f"{self.describe()} does not fit its frame: {error}") from error
        _find_body(self, len(body))
        data = _HEADER.pack(MAGIC, len(body), self.type, 0) + result + body
        return data.ljust(FRAME_SIZE, b"\0")

    @classmethod
    def decode(cls, data: bytes | bytearray, direction: Direction) -> Frame:
        """From 1024 bytes; what is behind the body is of no matter.

        Raises:
            FrameError: wrong size, magic or type, flags that are set, or a body of another size than the type has.
        """
        if len(data) != FRAME_SIZE:
            raise FrameError(f"a frame of {len(data)} bytes must have {FRAME_SIZE}")
        header = _check_header(data)
        offset = _HEADER.size
        result = None
        if direction is Direction.REPLY:
            (result,) = _RESULT.unpack_from(data, offset)
            if not -MAX_ERRNO <= result <= 0:
                raise FrameError(f"a reply has result {result}, it must be 0 or a negative errno down to -{MAX_ERRNO}")
            offset += _RESULT.size
        bare = cls(FrameType(header.msg_type), None, result)
        kind = _find_body(bare, header.msg_size)
        return bare if kind is None else cls(bare.type, kind(*LAYOUTS[kind].unpack_from(data, offset)), result)

    def describe(self) -> str:
        """In a few words, for people: ``ADD_CPU count=1``, ``ADD_CPU → 0, index=1``, ``ADD_MMIO → ENODEV``."""
        parts = [self.type.name]
        if self.result is not None:
            parts.append("→ " + (_errno_name(-self.result) if self.result else "0") + ("," if self.body else ""))
        if self.body is not None:
            parts += [f"{name}={_show(name, value)}" for name, value in asdict(self.body).items()]
        return " ".join(parts)


def _check_header(data: bytes | bytearray) -> Header:
    header = Header(*_HEADER.unpack_from(data))
    if header.magic != MAGIC:
        raise FrameError(f"a frame begins with magic {header.magic:#010x}, it must be {MAGIC:#010x}")
    if header.msg_type not in _TYPES:
        raise FrameError(f"a frame has type {header.msg_type}, it must be one of 0 to {max(_TYPES)}")
    if header.msg_flags:
        raise FrameError(f"a frame has flags {header.msg_flags:#x}, they must be 0")
    return header


def _find_body(frame: Frame, size: int) -> type[Body] | None:
    """The kind of body that a frame with so many bytes of it has, None for an empty one."""
    kinds = BODIES[frame.direction].get(frame.type, ())
    sizes = {LAYOUTS[kind].size: kind for kind in kinds}
    if frame.body is not None and type(frame.body) not in kinds:
        known = " or ".join(kind.__name__ for kind in kinds) or "none"
        raise FrameError(f"{frame.type.name} {frame.direction.value} has body {frame.body!r}, it must be {known}")
    # A request that failed is answered without a body.
    if not size and (not kinds or frame.result):
        return None
    if size not in sizes:
        known = " or ".join(map(str, sizes)) or "0"
        raise FrameError(f"{frame.type.name} {frame.direction.value} has msg_size {size}, it must be {known}")
    return sizes[size]


_GREETING: Final = Frame(FrameType.CONNECT, None, 0)


def _errno_name(number: int) -> str:
    return errno.errorcode.get(number, f"errno {number}")


def _show(name: str, value: int | bytes) -> str:
    if isinstance(value, bytes):
        return value.rstrip(b"\0").hex()
    return hex(value) if name in ("base", "size") else str(value)


class ClientState(enum.Enum):
    """Where the client is; the names are Dragonball's."""

    WAITING_SERVER = "WaitingServer"
    WAITING_SERVICE = "WaitingService"
    SERVICE_CONNECTED = "ServiceConnected"
    SERVICE_BUSY = "ServiceBusy"
    RECONNECT_ERROR = "ReconnectError"


@dataclass(frozen=True, slots=True)
class PassedFrame:
    """What went over the connection, for who wants to look.

    Attributes:
        seconds: when, on the host's monotonic clock (:func:`time.monotonic`).
        direction: which way.
        frame: what it says; None if it is no right frame.
        problem: what is wrong with it, else "".
        data: the bytes, as they went.
    """

    seconds: float
    direction: Direction
    frame: Frame | None
    problem: str
    data: bytes

    @property
    def name(self) -> str:
        """The name of its type."""
        return "malformed" if self.frame is None else self.frame.type.name

    @property
    def fields(self) -> dict[str, int | bytes]:
        """Header, result and body by the names of their fields, as they lie in the frame."""
        if len(self.data) < _HEADER.size:
            return {}
        found: dict[str, int | bytes] = dict(Header(*_HEADER.unpack_from(self.data))._asdict())
        if self.frame is not None:
            if self.frame.result is not None:
                found["result"] = self.frame.result
            if self.frame.body is not None:
                found |= asdict(self.frame.body)
        return found

    def describe(self) -> str:
        """In a few words, for people."""
        return self.problem if self.frame is None else self.frame.describe()


Dial: TypeAlias = Callable[[], Awaitable[socket.socket]]
Observe: TypeAlias = Callable[[Frame, Direction, float], None]


class UpcallClient:
    """The client of one guest's device manager. It connects with the first request, or with :meth:`connect`.

    Requests may come at any time, from any task of the event loop that made the client: one is under way, the others
    wait in the order in which they came. Each ends with its answer or with an UpcallError, and never keeps a later one
    from working. Only :attr:`state` and :attr:`frames` may be read from other threads.

    Args:
        dial: connects to port 219 of the guest; the socket is the client's own from then on.
        observe: called on the event loop with each frame that passed, its direction, and when (:func:`time.monotonic`).
        reply_seconds: how long the guest may take to carry a request out.
        connect_seconds: how long all attempts to connect may take together.
    """

    def __init__(
        self,
        dial: Dial,
        observe: Observe | None = None,
        *,
        reply_seconds: float = REPLY_SECONDS,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> None:
        self._dial = dial
        self._observe = observe
        self._reply_seconds = reply_seconds
        self._connect_seconds = connect_seconds
        self._state = ClientState.WAITING_SERVER
        self._connection: socket.socket | None = None
        self._turn = asyncio.Lock()
        self._patience: asyncio.Timeout | None = None
        self._refusal = ""
        self._closed = False
        self._frames: deque[PassedFrame] = deque(maxlen=RECENT_FRAMES)
        self._frames_lock = threading.Lock()

    @property
    def state(self) -> ClientState:
        """Where the client is."""
        return self._state

    @property
    def frames(self) -> tuple[PassedFrame, ...]:
        """The last frames that passed, oldest first, at most :data:`RECENT_FRAMES`."""
        with self._frames_lock:
            return tuple(self._frames)

    # Requests.

    async def connect(self) -> None:
        """Connect now, so that the next request need not; nothing if there is a connection.

        Raises:
            UpcallUnavailable: the device manager was not reached.
        """
        async with self._turn:
            await self._connected("CONNECT")

    async def add_cpu(self, count: int) -> int:
        """Bring the next ``count`` CPUs up that the guest knows and that are off.

        Returns:
            The index of the last one that came up.

        Raises:
            UpcallError: see the module. Where one does not come up, none does.
        """
        return await self._cpus(FrameType.ADD_CPU, count)

    async def del_cpu(self, count: int) -> int:
        """Take the ``count`` highest CPUs down that are up; never CPU 0.

        Returns:
            The index of the last one that went down, the lowest of them.

        Raises:
            UpcallError: see the module. Where one does not go down, none does.
        """
        return await self._cpus(FrameType.DEL_CPU, count)

    async def add_mem(self, base: int, size: int) -> None:
        """Take ``size`` bytes of memory at ``base`` into use. A guest without a driver for that refuses (EOPNOTSUPP).

        Raises:
            UpcallError: see the module.
        """
        await self.request(Frame(FrameType.ADD_MEM, Memory(base, size)))

    async def del_mem(self, base: int, size: int) -> None:
        """Give up ``size`` bytes of memory at ``base``. A guest without a driver for that refuses (EOPNOTSUPP).

        Raises:
            UpcallError: see the module.
        """
        await self.request(Frame(FrameType.DEL_MEM, Memory(base, size)))

    async def add_mmio(self, base: int, size: int, irq: int) -> None:
        """Find the virtio-mmio device at ``base``; answered once its driver has it.

        Raises:
            UpcallError: see the module. The guest refuses with ENODEV where no slot is, or an empty one.
        """
        await self.request(Frame(FrameType.ADD_MMIO, Mmio(base, size, irq)))

    async def del_mmio(self, base: int, size: int, irq: int) -> None:
        """Give the virtio-mmio device at ``base`` up; answered once no driver has it.

        Raises:
            UpcallError: see the module. The guest refuses with EBUSY while the device is in use.
        """
        await self.request(Frame(FrameType.DEL_MMIO, Mmio(base, size, irq)))

    async def request(self, frame: Frame) -> Frame:
        """Send any request; the reply, whose result is 0.

        Raises:
            UpcallError: see the module.
        """
        data = frame.encode()
        if frame.direction is not Direction.REQUEST:
            raise FrameError(f"{frame.describe()} is a reply and cannot be sent; give a frame without a result")
        async with self._turn:
            return await self._exchange(await self._connected(frame.describe()), frame, data)

    async def _cpus(self, kind: FrameType, count: int) -> int:
        if not 1 <= count <= 255:
            raise FrameError(f"{kind.name} of {count} CPUs must be of 1 to 255")
        reply = await self.request(Frame(kind, Cpus(count)))
        assert isinstance(reply.body, LastCpu)
        return reply.body.index

    # The life of the VM.

    def suspend(self, why: str) -> None:
        """The guest stands still: end the request under way, and refuse others until :meth:`resume`.

        Args:
            why: half a sentence such as ``"the VM is paused"``.
        """
        self._refusal = why
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time())

    def resume(self) -> None:
        """The guest runs again."""
        if not self._closed:
            self._refusal = ""

    def close(self) -> None:
        """Close the connection; the request under way and those that wait end. A second call does nothing."""
        self._closed = True
        self.suspend("the VM has ended")
        if self._patience is None:
            self._drop()

    # The connection.

    @contextlib.asynccontextmanager
    async def _limited(self, what: str, seconds: float) -> AsyncIterator[None]:
        """What may take so long, unless :meth:`suspend` ends it; both are a TimeoutError."""
        if self._refusal:
            raise UpcallUnavailable(f"{what} was not sent: {self._refusal}")
        try:
            async with asyncio.timeout(seconds) as self._patience:
                yield
        finally:
            self._patience = None

    async def _connected(self, what: str) -> socket.socket:
        """The connection, on which nothing has come that was not due; a new one where there is none."""
        self._look()
        if self._connection is not None:
            return self._connection
        cause: Exception | None = None
        try:
            async with self._limited(what, self._connect_seconds):
                for _ in range(ATTEMPTS):
                    try:
                        return await self._attempt()
                    except (VmmError, OSError) as error:
                        cause = error
                    await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            if self._refusal:
                raise UpcallUnavailable(f"{what} was not sent: {self._refusal}") from None
            cause = cause or UpcallError("it does not answer")
        raise UpcallUnavailable(
            f"{what} was not sent, since the guest needs a device manager at its vsock port {PORT}, and time to start "
            f"it: {cause}"
        ) from cause

    async def _attempt(self) -> socket.socket:
        self._state = ClientState.WAITING_SERVER
        try:
            connection = self._connection = await self._dial()
            self._state = ClientState.WAITING_SERVICE
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(connection, SERVICE)
            greeting = await self._receive(connection)
            if greeting != _GREETING:
                raise FrameError(f"the device manager began with {greeting.describe()}, it must be CONNECT → 0")
        except BaseException:
            self._drop()
            raise
        self._rest(connection)
        return connection

    async def _exchange(self, connection: socket.socket, frame: Frame, data: bytes) -> Frame:
        what = frame.describe()
        loop = asyncio.get_running_loop()
        try:
            async with self._limited(what, self._reply_seconds):
                self._state = ClientState.SERVICE_BUSY
                loop.remove_reader(connection)
                await loop.sock_sendall(connection, data)
                self._note(Direction.REQUEST, frame, "", data)
                reply = await self._receive(connection)
                if reply.type is not frame.type:
                    raise FrameError(f"the reply is to {reply.type.name}")
        except TimeoutError:
            self._drop()
            why = self._refusal or f"the guest took longer than {self._reply_seconds:g} s"
            raise UpcallLost(f"{what} was sent, but not answered: {why}") from None
        except (FrameError, OSError) as error:
            self._drop()
            raise UpcallLost(f"{what} was sent, but not answered rightly: {error}") from error
        except UpcallUnavailable:
            raise
        except BaseException:
            self._drop()
            raise
        self._rest(connection)
        if reply.result:
            number = -reply.result
            raise UpcallRefused(f"the guest refused {what}: {os.strerror(number)} ({_errno_name(number)})", number)
        return reply

    async def _receive(self, connection: socket.socket) -> Frame:
        """The next reply. What is wrong shows as soon as the header is there."""
        buffer = bytearray(FRAME_SIZE)
        view, length = memoryview(buffer), 0
        try:
            for end in (_HEADER.size, FRAME_SIZE):
                while length < end:
                    count = await asyncio.get_running_loop().sock_recv_into(connection, view[length:end])
                    if not count:
                        raise FrameError(f"the connection ended after {length} of {FRAME_SIZE} bytes")
                    length += count
                _check_header(buffer)
            frame = Frame.decode(buffer, Direction.REPLY)
        except FrameError as error:
            self._note(Direction.REPLY, None, str(error), bytes(buffer[:length]))
            raise
        self._note(Direction.REPLY, frame, "", bytes(buffer))
        return frame

    def _rest(self, connection: socket.socket) -> None:
        """Nothing is under way, and nothing shall come."""
        self._state = ClientState.SERVICE_CONNECTED
        asyncio.get_running_loop().add_reader(connection, self._look)

    def _look(self) -> None:
        """Drop the connection if something has come on it while nothing was under way."""
        if self._connection is None:
            return
        try:
            data = self._connection.recv(FRAME_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        problem = f"{len(data)} bytes came that nobody had asked for" if data else "the guest closed the connection"
        self._note(Direction.REPLY, None, problem, data)
        self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        self._state = ClientState.RECONNECT_ERROR
        if connection is not None:
            asyncio.get_running_loop().remove_reader(connection)
            connection.close()

    def _note(self, direction: Direction, frame: Frame | None, problem: str, data: bytes) -> None:
        now = time.monotonic()
        with self._frames_lock:
            self._frames.append(PassedFrame(now, direction, frame, problem, data))
        if frame is not None and self._observe is not None:
            # What an observer does wrong is no fault of the request.
            asyncio.get_running_loop().call_soon(self._observe, frame, direction, now)
