"""The VMM process: one VM, served over a unix socket to the one client that owns it.

The first client that says Hello owns the VM, and its connection is the lease on it: when the connection ends, however
that comes, the VM is shut down and the process ends, leaving nothing. Any other client is told so and dismissed, and
one that says nothing is not waited for. What the owner sends wrongly is answered with an error and changes nothing.

The VM's own event loop carries out the actions, as in every process; the loop here only reads and writes the socket, so
that a client that does not read, or reads slowly, holds up nobody: at most :data:`MAX_REQUESTS` requests are taken at
once, and of the console's output as much is kept for the client as the console itself keeps.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from vmm.actions import Empty, VmmAction, VmState
from vmm.config import VmConfig
from vmm.errors import StateError, VmmError
from vmm.microvm import MicroVm
from vmm.rpc import wire
from vmm.rpc.codec import CodecError
from vmm.rpc.endpoint import PrivateListener, require_owner
from vmm.rpc.hotplugs import Hotplugs, ReadHotplugs
from vmm.rpc.process import end_within, on_orphaned, say_listening

HELLO_SECONDS: Final = 10.0  #: until a client must have said Hello
OWNER_SECONDS: Final = 60.0  #: until there must be an owner
MAX_STRANGERS: Final = 16  #: connections that have not said Hello yet
MAX_REQUESTS: Final = 64  #: that are not answered yet
CLOSE_SECONDS: Final = 20.0  #: for shutting everything down before the process just ends
FAREWELL_SECONDS: Final = 1.0  #: for the owner to read how the VM ended

_MAX_WAITING = 4 * MAX_REQUESTS  # messages that the client has not read; then none of its requests is read
_CHUNK = 64 << 10  # bytes of console output in one message
_GATHER_SECONDS = 0.002  # of console output, which comes byte by byte
_ROOM_SECONDS = 0.1  # until typing is answered, if the guest's serial port has no room


class Outbox:
    """What waits for a client to read it, in order; used on the server's loop only.

    Args:
        writer: the connection.
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._items: deque[bytes | bytearray] = deque()
        self._outputs: deque[bytearray] = deque()
        self._output_bytes = 0
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        #: Bytes of console output that are kept at most; what is older is forgotten.
        self.output_limit = _CHUNK

    def put(self, message: wire.Message) -> None:
        """Send a message after all others."""
        self._items.append(wire.pack(message))
        self._filled.set()

    def print(self, data: bytes) -> None:
        """Send console output."""
        last = self._items[-1] if self._items else None
        if not isinstance(last, bytearray) or len(last) + len(data) > _CHUNK:
            last = bytearray()
            self._items.append(last)
            self._outputs.append(last)
        last += data
        self._output_bytes += len(data)
        while self._output_bytes > self.output_limit and len(self._outputs) > 1:
            oldest = self._outputs.popleft()
            self._output_bytes -= len(oldest)
            oldest.clear()
        self._filled.set()

    async def room(self) -> None:
        """Wait until the client has read enough."""
        while len(self._items) > _MAX_WAITING:
            self._emptied.clear()
            await self._emptied.wait()

    async def drained(self) -> None:
        """Wait until everything has been sent."""
        while self._items:
            self._emptied.clear()
            await self._emptied.wait()

    async def run(self) -> None:
        """Send until the connection ends."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._items:
                item = self._items.popleft()
                self._writer.write(self._pack_output(item) if isinstance(item, bytearray) else item)
                self._emptied.set()
                await self._writer.drain()

    def _pack_output(self, output: bytearray) -> bytes:
        if not output:
            return b""  # forgotten meanwhile
        self._outputs.popleft()
        self._output_bytes -= len(output)
        return wire.pack(wire.ConsoleOutput(bytes(output)))


class ServedVm:
    """The VM, what its client was told of it, and the actions that only a VMM in its own process has.

    Args:
        loop: the server's event loop.
        outbox: where events go.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, outbox: Outbox) -> None:
        self._loop = loop
        self._outbox = outbox
        self._vm: MicroVm | None = None
        self._told_state = VmState.CONFIGURED
        self._told_config: VmConfig | None = None
        self._trace: object = None
        self._told_milestones = 0
        self._printed = bytearray()
        self._print_lock = threading.Lock()
        self._own: dict[type[Any], Callable[[Any], Awaitable[object]]] = {
            wire.GetThreadIds: self._get_thread_ids,
            wire.ReadMetrics: self._read_metrics,
            ReadHotplugs: self._read_hotplugs,
            wire.TypeOnConsole: self._type,
        }

    def request(self, action: VmmAction[Any]) -> concurrent.futures.Future[Any] | Awaitable[Any]:
        """Start an action.

        Raises:
            VmmError: it cannot be started.
        """
        if isinstance(action, wire.CreateMicroVm):
            return self._create(action)
        if self._vm is None:
            raise StateError(f"{action.name} came before there is a VM; CreateMicroVm goes first")
        own = self._own.get(type(action))
        return self._vm.request(action) if own is None else own(action)

    async def _create(self, action: wire.CreateMicroVm) -> Empty:
        if self._vm is not None:
            raise StateError("the VMM process has its VM already; start another process for another VM")
        self._vm = vm = MicroVm(action.config)
        self._told_config = vm.config
        self._outbox.output_limit = action.config.console.limit_bytes
        vm.console.subscribe(self._print)
        vm.ended.add_done_callback(lambda _: self._call_soon(self.tell))
        return Empty()

    @property
    def _made(self) -> MicroVm:
        assert self._vm is not None
        return self._vm

    async def _get_thread_ids(self, action: wire.GetThreadIds) -> wire.ThreadIds:
        return wire.ThreadIds(self._made.thread_ids)

    async def _read_metrics(self, action: wire.ReadMetrics) -> wire.Counters:
        return wire.Counters(self._made.metrics())

    async def _read_hotplugs(self, action: ReadHotplugs) -> Hotplugs:
        return Hotplugs(self._made.hotplugs)

    async def _type(self, action: wire.TypeOnConsole) -> wire.Typed:
        uart = self._made.machine.board.uart
        count = uart.receive(action.data)
        if not count and action.data:
            await asyncio.to_thread(uart.wait_for_room, _ROOM_SECONDS)
            count = uart.receive(action.data)
        return wire.Typed(count)

    # Events.

    def _call_soon(self, callback: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the process ends
            self._loop.call_soon_threadsafe(callback)

    def _print(self, data: bytes) -> None:
        """On a vCPU's thread."""
        with self._print_lock:
            first = not self._printed
            self._printed += data
        if first:
            self._call_soon(lambda: self._loop.call_later(_GATHER_SECONDS, self.tell))

    def tell(self) -> None:
        """Send what the client does not know yet of the VM."""
        vm = self._vm
        if vm is None:
            return
        end = vm.end
        with self._print_lock:
            printed, self._printed = self._printed, bytearray()
        if printed:
            self._outbox.print(bytes(printed))
        self._tell_milestones(vm)
        config, told = vm.config, self._told_config
        if config is not told and config != told:
            self._told_config = config
            self._outbox.put(wire.ConfigurationChanged(config))
        if vm.state is VmState.STOPPED:
            if end is not None and self._told_state is not VmState.STOPPED:
                self._told_state = VmState.STOPPED
                self._outbox.put(wire.VmEnded(end, vm.metrics()))
        elif vm.state is not self._told_state:
            self._told_state = vm.state
            self._outbox.put(wire.StateChanged(vm.state))

    def _tell_milestones(self, vm: MicroVm) -> None:
        if vm.trace is not self._trace:
            self._trace, self._told_milestones = vm.trace, 0
        reached = vm.trace.milestones
        if len(reached) > self._told_milestones:
            self._outbox.put(wire.MilestonesReached(reached[self._told_milestones :]))
            self._told_milestones = len(reached)

    def close(self) -> None:
        """Shut the VM down; waits for its threads."""
        if self._vm is not None:
            self._vm.close()


class Session:
    """The owner's connection.

    Args:
        reader, writer: the connection, whose Hello has been read.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._outbox = Outbox(writer)
        self._loop = asyncio.get_running_loop()
        self.vm = ServedVm(self._loop, self._outbox)
        self._unanswered = 0
        self._connected = True

    async def run(self) -> None:
        """Serve requests until the connection ends."""
        self._outbox.put(wire.Welcome(wire.PROTOCOL, wire.version(), os.getpid()))
        sending = asyncio.create_task(self._outbox.run())
        reading = asyncio.create_task(self._read())
        try:
            await asyncio.wait([sending, reading], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._connected = False
            for task in (sending, reading):
                task.cancel()
            for result in await asyncio.gather(sending, reading, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, (OSError, EOFError)):
                    raise result

    async def close(self) -> None:
        """Shut the VM down, and tell the owner, if it still is."""
        await asyncio.to_thread(self.vm.close)
        self.vm.tell()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS if self._connected else 0):
                await self._outbox.drained()

    async def _read(self) -> None:
        while True:
            try:
                data = await read_frame(self._reader)
            except CodecError as error:
                self._outbox.put(wire.failure(None, error, "reading"))
            else:
                self._take(data)
            await self._outbox.room()

    def _take(self, data: bytes) -> None:
        try:
            request = wire.unpack(data)
            if not isinstance(request, wire.Request):
                raise CodecError(f"a client sends requests, not {type(request).__name__}")
        except VmmError as error:
            self._outbox.put(wire.failure(wire.request_number(data), error, "reading"))
            return
        number, action = request.number, request.action
        if self._unanswered >= MAX_REQUESTS:
            busy = wire.BusyError(f"{action.name} is one request too many, {MAX_REQUESTS} are not answered yet")
            self._outbox.put(wire.failure(number, busy, action.name))
            return
        try:
            started = self.vm.request(action)
        except Exception as error:
            self._outbox.put(wire.failure(number, error, action.name))
            return
        self._unanswered += 1
        if isinstance(started, concurrent.futures.Future):
            started.add_done_callback(lambda future: self._done_elsewhere(number, action, future))
        else:
            own = asyncio.ensure_future(started)
            own.add_done_callback(lambda future: self._answer(number, action, future))

    def _done_elsewhere(self, number: int, action: VmmAction[Any], future: concurrent.futures.Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the process ends
            self._loop.call_soon_threadsafe(self._answer, number, action, future)

    def _answer(
        self, number: int, action: VmmAction[Any], future: concurrent.futures.Future[Any] | asyncio.Future[Any]
    ) -> None:
        self._unanswered -= 1
        self.vm.tell()
        try:
            self._outbox.put(wire.Answer(number, future.result()))
        except (Exception, asyncio.CancelledError) as error:
            self._outbox.put(wire.failure(number, error, action.name))


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next message.

    Raises:
        CodecError: it is longer than a frame may be; it was passed over, and the next one can be read.
        EOFError: the connection ended, between two messages or within one.
    """
    (length,) = wire.LENGTH.unpack(await reader.readexactly(wire.LENGTH.size))
    if length <= wire.MAX_FRAME:
        return await reader.readexactly(length)
    left = length
    while left:
        passed = await reader.read(min(left, _CHUNK))
        if not passed:
            raise EOFError
        left -= len(passed)
    raise CodecError(f"a message of {length} bytes came, a message has at most {wire.MAX_FRAME}")


class VmServer:
    """Serves one VM at a socket.

    Args:
        listener: the socket.
    """

    def __init__(self, listener: PrivateListener) -> None:
        self._listener = listener
        self._over = asyncio.Event()
        self._session: Session | None = None
        self._strangers = 0

    def end(self) -> None:
        """Shut the VM down and return from :meth:`run`."""
        self._over.set()

    async def run(self) -> None:
        """Serve until the owner has gone, or nobody became the owner in time."""
        loop = asyncio.get_running_loop()
        server = await asyncio.start_unix_server(self._connected, sock=self._listener.socket, limit=_CHUNK)
        unowned = loop.call_later(OWNER_SECONDS, self._unowned)
        try:
            say_listening()
            await self._over.wait()
        finally:
            unowned.cancel()
            end_within(CLOSE_SECONDS)
            server.close()
            if self._session is not None:
                await self._session.close()

    def _unowned(self) -> None:
        if self._session is None:
            self.end()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # the process ends
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection: socket.socket = writer.get_extra_info("socket")
        if self._strangers >= MAX_STRANGERS:
            return
        self._strangers += 1
        try:
            require_owner(connection)
            async with asyncio.timeout(HELLO_SECONDS):
                wire.require_same_version(await read_frame(reader), "the VMM process")
            if self._session is not None:
                raise wire.RpcError("the VM has an owner already; start a VMM process of your own")
            # Nothing is awaited in between: of two clients at once one becomes the owner.
            self._session = session = Session(reader, writer)
        except VmmError as error:
            writer.write(wire.pack(wire.Refused(str(error))))
            async with asyncio.timeout(HELLO_SECONDS):
                await writer.drain()
            return
        finally:
            self._strangers -= 1
        try:
            await session.run()
        finally:
            self.end()


async def serve(path: Path) -> None:
    """Serve a VM at ``path`` until its owner, or the process that started this one, has gone.

    Raises:
        RpcError: no socket can be made there.
    """
    listener = PrivateListener(path)
    try:
        server = VmServer(listener)
        loop = asyncio.get_running_loop()
        on_orphaned(loop, server.end)
        loop.add_signal_handler(signal.SIGTERM, server.end)
        await server.run()
    finally:
        listener.close()
