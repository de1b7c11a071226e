"""Calls over ttrpc: client and server over real unix sockets, and bytes that break the protocol."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kata_lab.protocol.proto import Interface, Method, load
from kata_lab.protocol.wire import decode, encode
from kata_lab.ttrpc import Call, Client, RpcError, Server, StatusCode
from kata_lab.ttrpc.frames import HEADER, MAX_DATA, FrameType, pack_frame

ENVELOPE = load("ttrpc.proto").messages


def interface() -> Interface:
    text, number = {1: ("text", "string", "one")}, {1: ("number", "int64", "one")}
    methods = {
        "Upper": Method("t.Text", "t.Text"),
        "Fail": Method("t.Number", "t.Text"),
        "Sleep": Method("t.Text", "t.Text"),
        "Count": Method("t.Number", "t.Number", server_streams=True),
        "Sum": Method("t.Number", "t.Number", client_streams=True),
        "Echo": Method("t.Text", "t.Text", client_streams=True, server_streams=True),
    }
    return Interface({"t.Text": text, "t.Number": number}, {"t.Service": methods})


async def upper(request: dict[str, Any], call: Call) -> dict[str, Any]:
    return {"text": request["text"].upper()}


async def fail(request: dict[str, Any], call: Call) -> dict[str, Any]:
    if request["number"] == 99:
        raise ValueError("a bug")
    raise RpcError(StatusCode(request["number"]), "as you wish")


async def count(request: dict[str, Any], call: Call) -> None:
    for number in range(request["number"]):
        await call.send({"number": number})


async def add(request: dict[str, Any], call: Call) -> dict[str, Any]:
    return {"number": sum([each["number"] async for each in call.messages()])}


async def echo(request: dict[str, Any], call: Call) -> None:
    async for each in call.messages():
        await call.send(each)


class Sleeper:
    """Sleeps until it is cancelled."""

    def __init__(self) -> None:
        self.asleep = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        self.asleep.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        return {}


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[Sleeper]:
    server, sleeper = Server(interface()), Sleeper()
    server.add("t.Service", {"Upper": upper, "Fail": fail, "Sleep": sleeper, "Count": count, "Sum": add, "Echo": echo})
    async with server.listen(path):
        yield sleeper


def run(path: Path, scenario: Callable[[Client, Sleeper], Awaitable[None]]) -> None:
    async def main() -> None:
        async with served(path) as sleeper, await Client.connect(path, interface()) as client:
            await scenario(client, sleeper)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_many_calls_at_once_get_their_own_answers(tmp_path: Path) -> None:
    async def scenario(client: Client, sleeper: Sleeper) -> None:
        texts = [f"text {n}" * (n % 50) for n in range(500)]
        answers = await asyncio.gather(*(client.call("t.Service", "Upper", {"text": each}) for each in texts))
        assert [each["text"] for each in answers] == [each.upper() for each in texts]

    run(tmp_path / "s", scenario)


@pytest.mark.parametrize("code", [StatusCode.NOT_FOUND, StatusCode.FAILED_PRECONDITION, StatusCode.UNAUTHENTICATED])
def test_status_codes_come_through(tmp_path: Path, code: StatusCode) -> None:
    async def scenario(client: Client, sleeper: Sleeper) -> None:
        with pytest.raises(RpcError, match="as you wish") as caught:
            await client.call("t.Service", "Fail", {"number": int(code)})
        assert caught.value.code is code

    run(tmp_path / "s", scenario)


def test_bug_in_a_handler_is_told_as_internal_and_the_server_lives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(client: Client, sleeper: Sleeper) -> None:
        with pytest.raises(RpcError, match="raised ValueError: a bug") as caught:
            await client.call("t.Service", "Fail", {"number": 99})
        assert caught.value.code is StatusCode.INTERNAL
        assert await client.call("t.Service", "Upper", {"text": "x"}) == {"text": "X"}

    run(tmp_path / "s", scenario)


def test_deadline_is_kept_by_both_sides(tmp_path: Path) -> None:
    async def scenario(client: Client, sleeper: Sleeper) -> None:
        with pytest.raises(RpcError) as caught:
            await client.call("t.Service", "Sleep", timeout=0.05)
        assert caught.value.code is StatusCode.DEADLINE_EXCEEDED
        await sleeper.cancelled.wait()

    run(tmp_path / "s", scenario)


def test_client_that_goes_away_cancels_its_calls(tmp_path: Path) -> None:
    async def scenario(client: Client, sleeper: Sleeper) -> None:
        call = asyncio.create_task(client.call("t.Service", "Sleep"))
        await sleeper.asleep.wait()
        await client.close()
        with pytest.raises(RpcError) as caught:
            await call
        assert caught.value.code is StatusCode.UNAVAILABLE
        await sleeper.cancelled.wait()

    run(tmp_path / "s", scenario)


def test_server_that_goes_away_fails_calls_under_way_and_later_ones(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path / "s") as sleeper:
            client = await Client.connect(tmp_path / "s", interface())
            call = asyncio.create_task(client.call("t.Service", "Sleep"))
            await sleeper.asleep.wait()
        for awaited in (call, client.call("t.Service", "Upper")):
            with pytest.raises(RpcError) as caught:
                await awaited
            assert caught.value.code is StatusCode.UNAVAILABLE
        assert client.lost is not None
        await client.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_unknown_methods_and_bad_requests_are_refused_before_they_are_sent(tmp_path: Path) -> None:
    async def scenario(client: Client, sleeper: Sleeper) -> None:
        with pytest.raises(RpcError, match=r"no method t\.Service/Lower"):
            await client.call("t.Service", "Lower")
        with pytest.raises(RpcError, match="has no field 'txt'"):
            await client.call("t.Service", "Upper", {"txt": ""})
        with pytest.raises(RpcError, match="at most 4194304"):
            await client.call("t.Service", "Upper", {"text": "x" * MAX_DATA})

    run(tmp_path / "s", scenario)


def test_streams_from_the_server_to_the_server_and_both_ways(tmp_path: Path) -> None:
    async def scenario(client: Client, sleeper: Sleeper) -> None:
        async with client.stream("t.Service", "Count", {"number": 300}) as stream:
            assert [each["number"] async for each in stream] == list(range(300))
        async with client.stream("t.Service", "Sum") as stream:
            for number in range(100):
                await stream.send({"number": number})
            await stream.send_end()
            assert await stream.receive() == {"number": 4950}
        async with client.stream("t.Service", "Echo") as stream:
            for text in ("a", "", "c"):
                await stream.send({"text": text})
                assert await stream.receive() == {"text": text}
            await stream.send_end()
            assert await stream.receive() is None

    run(tmp_path / "s", scenario)


def test_stream_that_is_left_early_does_not_stop_other_calls(tmp_path: Path) -> None:
    async def scenario(client: Client, sleeper: Sleeper) -> None:
        async with client.stream("t.Service", "Count", {"number": 5000}) as stream:
            assert await stream.receive() == {"number": 0}
        assert await client.call("t.Service", "Upper", {"text": "x"}) == {"text": "X"}

    run(tmp_path / "s", scenario)


def test_socket_belongs_to_its_owner_alone_and_goes_away(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path / "s"):
            assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        assert not (tmp_path / "s").exists()
        with pytest.raises(RpcError, match="nobody listens at"):
            await Client.connect(tmp_path / "s", interface())

    asyncio.run(main())


def request(service: str = "t.Service", method: str = "Upper", payload: bytes = b"") -> bytes:
    return encode(ENVELOPE, "ttrpc.Request", {"service": service, "method": method, "payload": payload})


async def talk(path: Path, data: bytes) -> list[tuple[int, int, str]]:
    """Send raw bytes and no more; the stream, status and message of each answer until the server closes."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    writer.write_eof()
    answers = []
    while header := await reader.read(HEADER.size):
        length, stream, _, _ = HEADER.unpack(header)
        status = decode(ENVELOPE, "ttrpc.Response", await reader.readexactly(length))["status"]
        answers.append((stream, status["code"], status["message"]) if status else (stream, 0, ""))
    writer.close()
    return answers


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        (pack_frame(1, FrameType.REQUEST, b"\xff\xff"), [StatusCode.INVALID_ARGUMENT]),
        (pack_frame(1, FrameType.REQUEST, request(method="Nothing")), [StatusCode.UNIMPLEMENTED]),
        (pack_frame(1, FrameType.REQUEST, request(payload=b"\x0a\x05a")), [StatusCode.INVALID_ARGUMENT]),
        (pack_frame(2, FrameType.REQUEST, request()), []),
        (pack_frame(1, FrameType.RESPONSE, b""), []),
        (pack_frame(1, FrameType.DATA, b""), []),
        (struct.pack(">IIBB", 100, 1, 1, 0) + b"half", []),
        (b"\0\0", []),
        (struct.pack(">IIBB", MAX_DATA + 1, 1, 1, 0) + bytes(MAX_DATA + 1), [StatusCode.RESOURCE_EXHAUSTED]),
    ],
)
def test_bytes_that_break_the_protocol_get_an_error_or_the_end(tmp_path: Path, data: bytes, codes: list[int]) -> None:
    async def main() -> None:
        async with served(tmp_path / "s"), await Client.connect(tmp_path / "s", interface()) as bystander:
            assert [code for _, code, _ in await talk(tmp_path / "s", data)] == codes
            assert await bystander.call("t.Service", "Upper", {"text": "x"}) == {"text": "X"}

    asyncio.run(asyncio.wait_for(main(), 30))


def test_flood_of_calls_is_bounded(tmp_path: Path) -> None:
    async def scenario(client: Client, sleeper: Sleeper) -> None:
        calls = [asyncio.create_task(client.call("t.Service", "Sleep")) for _ in range(1100)]
        refused, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        error = refused.pop().exception()
        assert isinstance(error, RpcError)
        assert error.code is StatusCode.RESOURCE_EXHAUSTED
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    run(tmp_path / "s", scenario)
