"""A ttrpc server for MicroPython (ttrpc, PROTOCOL.md, version 1.0: unary calls) on vsock.

Every call is a task of its own. What a client may cost is bounded: the length of a frame, and the calls under way.
"""

import asyncio
import sys

import linux
from interface import MESSAGES, METHODS
from streams import listen
from wire import WireError, encode

OK, CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, ALREADY_EXISTS = range(7)
PERMISSION_DENIED, RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE, UNIMPLEMENTED = range(7, 13)
INTERNAL, UNAVAILABLE = 13, 14

MAX_FRAME = 1 << 19
MAX_CALLS = 1024
MAX_OUTPUT = 1 << 17  # bytes of a stream in one answer
_REQUEST, _RESPONSE = 1, 2
_HEADER = 10
_BEFORE = 32  # bytes in front of a stream's data, for all headers


class RpcError(Exception):
    """A call that fails: a gRPC status code and a sentence."""

    def __init__(self, code, message):
        super().__init__(code, message)
        self.code = code
        self.message = message


class Output:
    """An answer that is the next data of a stream: it goes from the descriptor into what is sent.

    ``at_end`` is called when the stream has ended.
    """

    def __init__(self, stream, limit, at_end):
        self.stream = stream
        self.limit = min(limit or MAX_OUTPUT, MAX_OUTPUT)
        self.at_end = at_end


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return out


class Connection:
    """One client."""

    def __init__(self, stream, handlers, reader):
        self._stream = stream
        self._handlers = handlers
        self._read_message = reader.read
        self._writing = asyncio.Lock()
        self._tasks = set()
        self._buffer = bytearray(4096)
        self._start = self._end = 0
        self._output = None

    async def serve(self):
        header = bytearray(_HEADER)
        try:
            while await self._read_into(header):
                length = int.from_bytes(header[0:4], "big")
                number = int.from_bytes(header[4:8], "big")
                if header[8] != _REQUEST or not number & 1:
                    break
                error = None
                if length > MAX_FRAME:
                    error = RpcError(RESOURCE_EXHAUSTED, f"a request of {length} bytes is longer than {MAX_FRAME}")
                elif len(self._tasks) >= MAX_CALLS:
                    error = RpcError(RESOURCE_EXHAUSTED, f"{MAX_CALLS} calls are under way")
                else:
                    try:
                        data = bytearray(length)
                    except MemoryError:
                        error = RpcError(RESOURCE_EXHAUSTED, f"the agent has no memory for {length} bytes")
                if error is not None:
                    if not await self._skip(length):
                        break
                    await self._refuse(number, error)
                elif await self._read_into(data):
                    self._tasks.add(asyncio.create_task(self._run(number, data)))
                    data = None
                else:
                    break
        except OSError:
            pass  # the client is gone
        finally:
            for task in list(self._tasks):
                task.cancel()
            self._stream.close()

    async def _read_into(self, target):
        """Fill ``target``; False where the stream ends."""
        view, done = memoryview(target), 0
        while done < len(view):
            if self._start == self._end:
                rest = len(view) - done
                if rest >= len(self._buffer):
                    count = await self._stream.read(view[done:], rest)
                    if count == 0:
                        return False
                    done += count
                    continue
                self._start, self._end = 0, await self._stream.read(self._buffer, len(self._buffer))
                if self._end == 0:
                    return False
            count = min(len(view) - done, self._end - self._start)
            view[done : done + count] = memoryview(self._buffer)[self._start : self._start + count]
            self._start += count
            done += count
        return True

    async def _skip(self, length):
        scratch = memoryview(bytearray(4096))
        while length > 0:
            if not await self._read_into(scratch[: min(length, len(scratch))]):
                return False
            length -= min(length, len(scratch))
        return True

    async def _run(self, number, data):
        name = "a request"
        try:
            try:
                request = self._read_message("ttrpc.Request", memoryview(data))
                data = None
                name = request["service"] + "/" + request["method"]
                handler = self._handlers.get(name)
                if handler is None:
                    raise RpcError(UNIMPLEMENTED, f"the agent has no method {name}")
                asked, answered = METHODS[name]
                message = self._read_message(asked, memoryview(request["payload"]))
                timeout = request["timeout_nano"]
                request = None
                answer = await _within(timeout, handler(message))
                message = None
                if isinstance(answer, Output):
                    await _within(timeout, answer.stream.readable())
                    while not await self._send_output(number, answer):
                        await _within(timeout, answer.stream.readable())
                else:
                    payload = encode(MESSAGES, answered, answer or {})
                    await self._send(number, encode(MESSAGES, "ttrpc.Response", {"payload": payload}))
            except RpcError as error:
                await self._refuse(number, error)
            except WireError as error:
                await self._refuse(number, RpcError(INVALID_ARGUMENT, str(error)))
            except asyncio.TimeoutError:
                await self._refuse(number, RpcError(DEADLINE_EXCEEDED, f"{name} did not end in time"))
            except OSError as error:
                await self._refuse(number, RpcError(INTERNAL, f"{name}: {linux.explain(error)}"))
            except MemoryError:
                await self._refuse(number, RpcError(RESOURCE_EXHAUSTED, f"the agent has no memory for {name}"))
            except Exception as error:
                sys.print_exception(error)
                await self._refuse(number, RpcError(INTERNAL, f"{name} raised {type(error).__name__}: {error}"))
        except OSError:
            pass  # the client is gone
        finally:
            self._tasks.discard(asyncio.current_task())

    async def _refuse(self, number, error):
        status = {"code": error.code, "message": error.message}
        await self._send(number, encode(MESSAGES, "ttrpc.Response", {"status": status}))

    async def _send(self, number, data):
        header = len(data).to_bytes(4, "big") + number.to_bytes(4, "big") + bytes((_RESPONSE, 0))
        await self._writing.acquire()
        try:
            await self._stream.write(header + data)
        finally:
            self._writing.release()

    async def _send_output(self, number, output):
        """Send Response{payload: {1: data}}, with data read into the place from where it is sent.

        False if there was none after all, since another reader was faster.
        """
        await self._writing.acquire()
        try:
            if self._output is None:
                self._output = memoryview(bytearray(_BEFORE + MAX_OUTPUT))
            count = output.stream.read_now(self._output[_BEFORE:], output.limit)
            if count < 0:
                return False
            head = bytearray(_HEADER)
            if count:
                inner = b"\x0a" + _varint(count)
                head += b"\x12" + _varint(len(inner) + count) + inner
            head[0:4] = (len(head) - _HEADER + count).to_bytes(4, "big")
            head[4:8] = number.to_bytes(4, "big")
            head[8] = _RESPONSE
            start = _BEFORE - len(head)
            self._output[start:_BEFORE] = head
            await self._stream.write(self._output[start : _BEFORE + count])
        finally:
            self._writing.release()
        if count == 0:
            output.at_end()
        return True


async def _within(nanoseconds, waiting):
    """Await it, for so long at most; for ever if that is not positive."""
    if nanoseconds <= 0:
        return await waiting
    return await asyncio.wait_for(waiting, nanoseconds / 1e9)


async def serve(port, handlers, reader):
    """Serve every connection to a port of this guest; ``reader`` reads requests (requests.py)."""
    listener = await listen(port)
    while True:
        asyncio.create_task(Connection(await listener.accept(), handlers, reader).serve())
