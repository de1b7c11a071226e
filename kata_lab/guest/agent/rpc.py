"""A ttrpc server for MicroPython (ttrpc, PROTOCOL.md, version 1.0: unary calls) on a descriptor of a vsock connection.

Every call is a task of its own. What a client may cost is bounded: the length of a frame, and the calls under way.
"""

import asyncio
import sys

import linux
from interface import MESSAGES, METHODS
from wire import WireError, decode, encode

OK, CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, ALREADY_EXISTS = range(7)
PERMISSION_DENIED, RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE, UNIMPLEMENTED = range(7, 13)
INTERNAL, UNAVAILABLE = 13, 14

MAX_FRAME = 1 << 20
MAX_CALLS = 256
_REQUEST, _RESPONSE = 1, 2


class RpcError(Exception):
    """A call that fails: a gRPC status code and a sentence."""

    def __init__(self, code, message):
        super().__init__(code, message)
        self.code = code
        self.message = message


class Raw:
    """An answer whose message is one field 1 of bytes, which are sent as they are."""

    def __init__(self, data):
        self.data = data


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return out


class Connection:
    """One client."""

    def __init__(self, descriptor, handlers):
        self._descriptor = descriptor
        self._handlers = handlers
        self._writing = asyncio.Lock()
        self._tasks = set()
        self._buffer = bytearray(8192)
        self._start = self._end = 0

    async def serve(self):
        header = bytearray(10)
        try:
            while await self._read_into(header):
                length = int.from_bytes(header[0:4], "big")
                stream = int.from_bytes(header[4:8], "big")
                if header[8] != _REQUEST or not stream & 1:
                    break
                if length > MAX_FRAME:
                    await self._skip(length)
                    text = f"a request of {length} bytes is longer than {MAX_FRAME}"
                    await self._refuse(stream, RpcError(RESOURCE_EXHAUSTED, text))
                    continue
                data = bytearray(length)
                if not await self._read_into(data):
                    break
                if len(self._tasks) >= MAX_CALLS:
                    await self._refuse(stream, RpcError(RESOURCE_EXHAUSTED, f"{MAX_CALLS} calls are under way"))
                    continue
                self._tasks.add(asyncio.create_task(self._run(stream, data)))
        except OSError:
            pass  # the client is gone
        finally:
            for task in list(self._tasks):
                task.cancel()
            linux.close(self._descriptor)

    async def _read_into(self, target):
        """Fill ``target``; False where the stream ends."""
        view, done = memoryview(target), 0
        while done < len(target):
            if self._start == self._end:
                rest = len(target) - done
                if rest >= len(self._buffer):
                    count = await self._receive(view[done:], rest)
                    if count <= 0:
                        return False
                    done += count
                    continue
                self._start, self._end = 0, await self._receive(self._buffer, len(self._buffer))
                if self._end <= 0:
                    self._end = 0
                    return False
            count = min(len(target) - done, self._end - self._start)
            view[done : done + count] = memoryview(self._buffer)[self._start : self._start + count]
            self._start += count
            done += count
        return True

    async def _receive(self, buffer, length):
        while True:
            count = linux.read_now(self._descriptor, buffer, length)
            if count >= 0:
                return count
            await linux.readable(self._descriptor)

    async def _skip(self, length):
        scratch = bytearray(8192)
        while length > 0:
            part = min(length, len(scratch))
            if not await self._read_into(memoryview(scratch)[:part]):
                break
            length -= part

    async def _run(self, stream, data):
        try:
            try:
                request = decode(MESSAGES, "ttrpc.Request", data)
                name = request["service"] + "/" + request["method"]
                handler = self._handlers.get(name)
                if handler is None or name not in METHODS:
                    raise RpcError(UNIMPLEMENTED, f"the agent has no method {name}")
                message = decode(MESSAGES, METHODS[name][0], request["payload"])
                timeout = request["timeout_nano"]
                if timeout > 0:
                    answer = await asyncio.wait_for(handler(message), timeout / 1e9)
                else:
                    answer = await handler(message)
                if isinstance(answer, Raw):
                    await self._send_raw(stream, answer.data)
                else:
                    payload = encode(MESSAGES, METHODS[name][1], answer or {})
                    await self._send(stream, encode(MESSAGES, "ttrpc.Response", {"payload": payload}))
            except RpcError as error:
                await self._refuse(stream, error)
            except WireError as error:
                await self._refuse(stream, RpcError(INVALID_ARGUMENT, str(error)))
            except asyncio.TimeoutError:
                await self._refuse(stream, RpcError(DEADLINE_EXCEEDED, f"{name} did not end in time"))
            except OSError as error:
                number = error.args[0] if error.args else 0
                await self._refuse(stream, RpcError(INTERNAL, f"{name} failed: {error}, errno {number}"))
            except MemoryError as error:
                await self._refuse(stream, RpcError(RESOURCE_EXHAUSTED, f"the agent has no memory for this: {error}"))
            except Exception as error:
                sys.print_exception(error)
                await self._refuse(stream, RpcError(INTERNAL, f"{name} raised {type(error).__name__}: {error}"))
        except OSError:
            pass  # the client is gone
        finally:
            self._tasks.discard(asyncio.current_task())

    async def _refuse(self, stream, error):
        status = {"code": error.code, "message": error.message}
        await self._send(stream, encode(MESSAGES, "ttrpc.Response", {"status": status}))

    async def _send(self, stream, data):
        header = len(data).to_bytes(4, "big") + stream.to_bytes(4, "big") + bytes((_RESPONSE, 0))
        await self._writing.acquire()
        try:
            await linux.write_all(self._descriptor, header + data)
        finally:
            self._writing.release()

    async def _send_raw(self, stream, data):
        """Response{payload: {1: data}} without copying the data."""
        inner = b"\x0a" + _varint(len(data)) if len(data) else b""
        outer = b"\x12" + _varint(len(inner) + len(data)) + inner if len(data) else b""
        length = len(outer) + len(data)
        header = length.to_bytes(4, "big") + stream.to_bytes(4, "big") + bytes((_RESPONSE, 0))
        await self._writing.acquire()
        try:
            await linux.write_all(self._descriptor, header + outer)
            if len(data):
                await linux.write_all(self._descriptor, data)
        finally:
            self._writing.release()


async def serve(port, handlers):
    """Serve every connection to a vsock port of this guest."""
    listener = linux.listen_vsock(port)
    while True:
        asyncio.create_task(Connection(await linux.accept(listener), handlers).serve())
