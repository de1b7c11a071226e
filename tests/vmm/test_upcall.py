"""The client of the device manager against one that is killed, hangs, lies, and answers late, twice or with garbage."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm import upcall
from vmm.errors import VmmError
from vmm.upcall import (
    FRAME_SIZE,
    ClientState,
    Cpus,
    Direction,
    Frame,
    FrameError,
    FrameType,
    LastCpu,
    Mmio,
    UpcallClient,
    UpcallError,
    UpcallLost,
    UpcallRefused,
    UpcallUnavailable,
)

CONNECT = Frame(FrameType.CONNECT, None, 0).encode()
SHORT = 1.0  # seconds of patience where nothing answers
SLOT = (0x1000_1000, 0x1000, 1)


class Peer:
    """The guest's end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    async def receive(self, length: int) -> bytes:
        """So many bytes; fewer at the end."""
        data = b""
        while len(data) < length:
            part = await asyncio.get_running_loop().sock_recv(self._connection, length - len(data))
            if not part:
                break
            data += part
        return data

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._connection, data)

    async def greet(self) -> None:
        assert await self.receive(1) == b"d"
        await self.send(CONNECT)

    async def request(self) -> Frame:
        return Frame.decode(await self.receive(FRAME_SIZE), Direction.REQUEST)

    async def ended(self) -> None:
        """Until the client has closed its end."""
        with contextlib.suppress(ConnectionError):
            while await self.receive(1):
                pass


Life: TypeAlias = Callable[[Peer], Coroutine[Any, Any, None]]
Work: TypeAlias = Callable[[UpcallClient, "Manager"], Awaitable[None]]


async def answers(peer: Peer) -> None:
    """A device manager as it should be; the index of a CPU is how many were asked for."""
    with contextlib.suppress(ConnectionError):
        await peer.greet()
        while data := await peer.receive(FRAME_SIZE):
            frame = Frame.decode(data, Direction.REQUEST)
            body = LastCpu(frame.body.count) if isinstance(frame.body, Cpus) else None
            await peer.send(Frame(frame.type, body, 0).encode())


def replies(data: bytes) -> Life:
    """A device manager that answers its first request with these bytes and then waits for the client to go."""

    async def live(peer: Peer) -> None:
        await peer.greet()
        await peer.request()
        await peer.send(data)
        await peer.ended()

    return live


class Manager:
    """The guest: one life for each connection, the last one for all that follow. An asynchronous context manager.

    Args:
        refusals: how dialling fails before it succeeds.
    """

    def __init__(self, *lives: Life, refusals: Iterable[Exception] = ()) -> None:
        self._lives = lives
        self._refusals = iter(refusals)
        self.tasks: list[asyncio.Task[None]] = []

    async def dial(self) -> socket.socket:
        for refusal in self._refusals:
            raise refusal
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        life = self._lives[min(len(self.tasks), len(self._lives) - 1)]
        self.tasks.append(asyncio.create_task(self._serve(life, theirs)))
        return ours

    async def _serve(self, life: Life, connection: socket.socket) -> None:
        with connection:
            await life(Peer(connection))

    @property
    def connections(self) -> int:
        return len(self.tasks)

    async def __aenter__(self) -> Manager:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        for result in await asyncio.gather(*self.tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


@contextlib.asynccontextmanager
async def guest(
    *lives: Life, refusals: Iterable[Exception] = (), **wishes: Any
) -> AsyncIterator[tuple[UpcallClient, Manager]]:
    """A client and its guest."""
    async with Manager(*lives, refusals=refusals) as manager:
        client = UpcallClient(manager.dial, **wishes)
        try:
            yield client, manager
        finally:
            client.close()


def run(work: Work, *lives: Life, **wishes: Any) -> None:
    """Do something with a client, in bounded time."""

    async def main() -> None:
        async with guest(*lives, **wishes) as (client, manager):
            await work(client, manager)

    asyncio.run(asyncio.wait_for(main(), 60))


async def reached(client: UpcallClient, state: ClientState) -> None:
    while client.state is not state:
        await asyncio.sleep(0.001)


# What goes right.


def test_requests_are_answered_over_one_connection() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        assert client.state.value == "WaitingServer"
        assert await client.add_cpu(3) == 3
        assert await client.del_cpu(2) == 2
        await client.add_mmio(*SLOT)
        await client.del_mmio(*SLOT)
        await client.add_mem(1 << 32, 1 << 27)
        await client.del_mem(1 << 32, 1 << 27)
        assert client.state.value == "ServiceConnected"
        assert manager.connections == 1

    run(work, answers)


def test_two_requests_at_once_are_sent_one_after_the_other() -> None:
    seen: list[str] = []

    async def live(peer: Peer) -> None:
        await peer.greet()
        for count in (1, 2, 3):
            frame = await peer.request()
            assert frame.body == Cpus(count)
            seen.append("asked")
            await asyncio.sleep(0)
            seen.append("answered")
            await peer.send(Frame(frame.type, LastCpu(count), 0).encode())
        await peer.ended()

    async def work(client: UpcallClient, manager: Manager) -> None:
        tasks = [asyncio.create_task(client.add_cpu(count)) for count in (1, 2, 3)]
        assert await asyncio.gather(*tasks) == [1, 2, 3]

    run(work, live)
    assert seen == ["asked", "answered"] * 3


def test_states_follow_a_request() -> None:
    greeting, answer = asyncio.Event(), asyncio.Event()

    async def live(peer: Peer) -> None:
        await peer.receive(1)
        await greeting.wait()
        await peer.send(CONNECT)
        frame = await peer.request()
        await answer.wait()
        await peer.send(Frame(frame.type, None, 0).encode())

    async def work(client: UpcallClient, manager: Manager) -> None:
        task = asyncio.create_task(client.add_mmio(*SLOT))
        await reached(client, ClientState.WAITING_SERVICE)
        greeting.set()
        await reached(client, ClientState.SERVICE_BUSY)
        answer.set()
        await task
        # The guest has closed the connection by now, or is about to.
        await reached(client, ClientState.RECONNECT_ERROR)

    run(work, live)


def test_connecting_ahead_saves_the_first_request_from_it() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        await client.connect()
        assert client.state is ClientState.SERVICE_CONNECTED
        await client.connect()
        assert await client.add_cpu(1) == 1
        assert manager.connections == 1

    run(work, answers)


def test_a_guest_that_is_late_to_listen_is_dialled_again() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        assert await client.add_cpu(1) == 1

    run(work, answers, refusals=[VmmError("no driver yet"), ConnectionRefusedError("nobody listens")] * 3)


def test_what_the_guest_refuses_is_told_and_the_connection_stays() -> None:
    async def live(peer: Peer) -> None:
        await peer.greet()
        frame = await peer.request()
        await peer.send(Frame(frame.type, None, -errno.EBUSY).encode())
        frame = await peer.request()
        await peer.send(Frame(frame.type, LastCpu(0), -errno.ENODEV).encode())
        await answers_without_greeting(peer)

    async def answers_without_greeting(peer: Peer) -> None:
        frame = await peer.request()
        await peer.send(Frame(frame.type, LastCpu(7), 0).encode())
        await peer.ended()

    async def work(client: UpcallClient, manager: Manager) -> None:
        with pytest.raises(UpcallRefused, match=r"the guest refused DEL_MMIO .*busy \(EBUSY\)") as refused:
            await client.del_mmio(*SLOT)
        assert refused.value.errno == errno.EBUSY
        with pytest.raises(UpcallRefused, match="ENODEV"):
            await client.add_cpu(9)
        assert await client.add_cpu(1) == 7
        assert manager.connections == 1

    run(work, live)


@pytest.mark.parametrize("count", [0, -1, 256])
def test_a_number_of_cpus_that_no_frame_carries_is_refused(count: int) -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        with pytest.raises(FrameError, match=f"of {count} CPUs must be of 1 to 255"):
            await client.add_cpu(count)
        assert manager.connections == 0

    run(work, answers)


def test_a_reply_cannot_be_sent() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        with pytest.raises(FrameError, match="is a reply and cannot be sent"):
            await client.request(Frame(FrameType.ADD_MMIO, None, 0))

    run(work, answers)


# What goes wrong.


async def is_killed(peer: Peer) -> None:
    await peer.greet()
    await peer.request()


async def closes_half_way(peer: Peer) -> None:
    await peer.greet()
    await peer.request()
    await peer.send(Frame(FrameType.ADD_CPU, LastCpu(1), 0).encode()[:600])


def patched(place: int, value: bytes) -> bytes:
    data = bytearray(Frame(FrameType.ADD_CPU, LastCpu(1), 0).encode())
    data[place : place + len(value)] = value
    return bytes(data)


WRONG: dict[str, tuple[Life, str]] = {
    "killed": (is_killed, "the connection ended after 0 of 1024 bytes"),
    "half a frame": (closes_half_way, "the connection ended after 600 of 1024 bytes"),
    "magic": (replies(patched(0, b"\1")), "begins with magic 0x444d0101, it must be 0x444d0100"),
    "size": (replies(patched(4, b"\5")), "ADD_CPU from the guest has msg_size 5, it must be 4"),
    "no body": (replies(patched(4, b"\0")), "ADD_CPU from the guest has msg_size 0, it must be 4"),
    "type": (replies(patched(8, b"\2")), "the reply is to DEL_CPU"),
    "unknown type": (replies(patched(8, b"\x10")), "has type 16, it must be one of 0 to 8"),
    "flags": (replies(patched(12, b"\1")), "has flags 0x1, they must be 0"),
    "positive result": (replies(patched(16, b"\1")), "has result 1, it must be 0 or a negative errno"),
    "connect again": (replies(CONNECT), "the reply is to CONNECT"),
    "garbage": (replies(b"\xa5" * 5000), "begins with magic 0xa5a5a5a5"),
    "short garbage": (replies(b"guest: \x1b[31mpanic"), "begins with magic"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_told_and_the_next_request_works(name: str) -> None:
    life, message = WRONG[name]

    async def work(client: UpcallClient, manager: Manager) -> None:
        with pytest.raises(UpcallLost, match=f"ADD_CPU count=1 was sent, but not answered rightly: .*{message}"):
            await client.add_cpu(1)
        assert client.state is ClientState.RECONNECT_ERROR
        assert client.frames[-1].frame is None or client.frames[-1].name in ("DEL_CPU", "CONNECT")
        assert await client.add_cpu(2) == 2
        assert manager.connections == 2

    run(work, life, answers)


def test_a_manager_that_hangs_is_given_up_and_the_next_request_works() -> None:
    async def hangs(peer: Peer) -> None:
        await peer.greet()
        await peer.request()
        await asyncio.Event().wait()

    async def work(client: UpcallClient, manager: Manager) -> None:
        with pytest.raises(UpcallLost, match="was sent, but not answered: the guest took longer than 1 s"):
            await client.add_cpu(1)
        assert await client.add_cpu(2) == 2

    run(work, hangs, answers, reply_seconds=SHORT)


def test_half_an_answer_does_not_last_longer_than_a_whole_one() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        with pytest.raises(UpcallLost, match="took longer than 1 s"):
            await client.add_cpu(1)
        assert await client.add_cpu(2) == 2

    run(work, replies(patched(0, b"")[:500]), answers, reply_seconds=SHORT)


def test_an_answer_that_comes_too_late_is_not_that_of_the_next_request() -> None:
    given_up = asyncio.Event()

    async def is_late(peer: Peer) -> None:
        await peer.greet()
        frame = await peer.request()
        await given_up.wait()
        with contextlib.suppress(ConnectionError):
            await peer.send(Frame(frame.type, LastCpu(99), 0).encode())

    async def work(client: UpcallClient, manager: Manager) -> None:
        with pytest.raises(UpcallLost):
            await client.add_cpu(1)
        given_up.set()
        assert [await client.add_cpu(count) for count in (2, 3)] == [2, 3]
        assert manager.connections == 2

    run(work, is_late, answers, reply_seconds=SHORT)


def test_an_answer_that_comes_twice_is_not_that_of_the_next_request() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        assert await client.add_cpu(1) == 1
        assert await client.add_cpu(2) == 2
        assert manager.connections == 2
        assert any("1024 bytes came that nobody had asked for" in each.describe() for each in client.frames)

    run(work, replies(2 * patched(0, b"")), answers)


def test_an_answer_that_is_too_long_costs_the_connection_and_not_the_next_request() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        assert await client.add_cpu(1) == 1
        assert await client.add_cpu(2) == 2
        assert manager.connections == 2

    run(work, replies(patched(0, b"") + b"x"), answers)


def test_a_connection_that_ends_between_requests_is_made_anew() -> None:
    async def serves_one(peer: Peer) -> None:
        await peer.greet()
        frame = await peer.request()
        await peer.send(Frame(frame.type, LastCpu(5), 0).encode())

    async def work(client: UpcallClient, manager: Manager) -> None:
        for number in range(1, 4):
            assert await client.add_cpu(1) == 5
            await reached(client, ClientState.RECONNECT_ERROR)
            assert manager.connections == number

    run(work, serves_one)


def greets_with(data: bytes) -> Life:
    async def live(peer: Peer) -> None:
        await peer.receive(1)
        await peer.send(data)
        await peer.ended()

    return live


async def closes_at_once(peer: Peer) -> None:
    await peer.receive(1)


@pytest.mark.parametrize(
    "life",
    [
        greets_with(Frame(FrameType.CONNECT, None, -errno.EBUSY).encode()),
        greets_with(Frame(FrameType.ADD_MMIO, None, 0).encode()),
        greets_with(b"\xff" * 3000),
        closes_at_once,
    ],
    ids=["refuses", "answers something else", "garbage", "closes"],
)
def test_a_wrong_greeting_is_tried_again(life: Life) -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        assert await client.add_cpu(4) == 4
        assert manager.connections == 3

    run(work, life, life, answers)


def test_no_greeting_ends_in_an_error_and_the_next_request_works() -> None:
    async def says_nothing(peer: Peer) -> None:
        await peer.ended()

    async def work(client: UpcallClient, manager: Manager) -> None:
        with pytest.raises(UpcallUnavailable, match="ADD_CPU count=1 was not sent, since the guest needs a device"):
            await client.add_cpu(1)
        assert client.state is ClientState.RECONNECT_ERROR
        assert await client.add_cpu(2) == 2

    run(work, says_nothing, answers, connect_seconds=SHORT)


def test_attempts_to_connect_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upcall, "RETRY_SECONDS", 0.0)
    refusals = [VmmError(f"refusal {number}") for number in range(1, 502)]

    async def work(client: UpcallClient, manager: Manager) -> None:
        with pytest.raises(UpcallUnavailable, match=r"its vsock port 219, .*: refusal 500$"):
            await client.add_cpu(1)
        assert await client.add_cpu(2) == 2

    run(work, answers, refusals=refusals)


# The VM's life, and the callers'.


async def never_answers(peer: Peer) -> None:
    await peer.greet()
    await peer.request()
    await peer.ended()


def test_a_pause_ends_the_request_under_way_and_those_that_wait() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        tasks = [asyncio.create_task(client.add_cpu(count)) for count in (1, 2)]
        await reached(client, ClientState.SERVICE_BUSY)
        client.suspend("the VM is paused")
        first, second = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(first, UpcallLost)
        assert str(first) == "ADD_CPU count=1 was sent, but not answered: the VM is paused"
        assert isinstance(second, UpcallUnavailable)
        assert str(second) == "ADD_CPU count=2 was not sent: the VM is paused"
        with pytest.raises(UpcallUnavailable, match="the VM is paused"):
            await client.add_mmio(*SLOT)
        client.resume()
        assert await client.add_cpu(3) == 3

    run(work, never_answers, answers)


def test_a_pause_ends_an_attempt_to_connect() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        task = asyncio.create_task(client.add_cpu(1))
        await reached(client, ClientState.WAITING_SERVICE)
        client.suspend("the VM is paused")
        with pytest.raises(UpcallUnavailable, match="ADD_CPU count=1 was not sent: the VM is paused"):
            await task
        client.resume()
        assert await client.add_cpu(2) == 2

    async def says_nothing(peer: Peer) -> None:
        await peer.ended()

    run(work, says_nothing, answers)


def test_a_connection_that_rests_survives_a_pause() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        await client.connect()
        client.suspend("the VM is paused")
        with pytest.raises(UpcallUnavailable):
            await client.add_cpu(1)
        assert client.state is ClientState.SERVICE_CONNECTED
        client.resume()
        assert await client.add_cpu(1) == 1
        assert manager.connections == 1

    run(work, answers)


def test_the_end_of_the_vm_ends_requests_for_good() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        task = asyncio.create_task(client.add_cpu(1))
        await reached(client, ClientState.SERVICE_BUSY)
        client.close()
        with pytest.raises(UpcallLost, match="the VM has ended"):
            await task
        client.close()
        client.resume()
        with pytest.raises(UpcallUnavailable, match="the VM has ended"):
            await client.add_cpu(1)
        await manager.tasks[0]

    run(work, never_answers)


def test_a_caller_that_goes_away_leaves_nothing_for_the_next() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        task = asyncio.create_task(client.add_cpu(1))
        await reached(client, ClientState.SERVICE_BUSY)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.state is ClientState.RECONNECT_ERROR
        assert await client.add_cpu(2) == 2

    run(work, never_answers, answers)


# What can be seen.


def test_frames_that_passed_are_kept_and_shown() -> None:
    shown: list[tuple[Frame, Direction, float]] = []

    async def work(client: UpcallClient, manager: Manager) -> None:
        await client.add_cpu(2)
        await client.add_mmio(*SLOT)
        await asyncio.sleep(0)
        frames = client.frames
        assert [each.describe() for each in frames] == [
            "CONNECT → 0",
            "ADD_CPU count=2",
            "ADD_CPU → 0, index=2",
            "ADD_MMIO base=0x10001000 size=0x1000 irq=1",
            "ADD_MMIO → 0",
        ]
        assert frames[3].name == "ADD_MMIO"
        assert frames[3].direction is Direction.REQUEST
        header = {"magic": 0x444D0100, "msg_size": 24, "msg_type": 5, "msg_flags": 0}
        assert frames[3].fields == header | {"base": 0x10001000, "size": 0x1000, "irq": 1}
        assert frames[3].data == Frame(FrameType.ADD_MMIO, Mmio(*SLOT)).encode()
        assert frames[2].fields["result"] == 0
        assert frames[2].fields["index"] == 2
        assert [each.seconds for each in frames] == sorted(each.seconds for each in frames)
        assert shown == [(each.frame, each.direction, each.seconds) for each in frames]

    run(work, answers, observe=lambda *seen: shown.append(seen))


def test_what_is_no_frame_is_kept_too() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        with pytest.raises(UpcallLost):
            await client.add_cpu(1)
        malformed = client.frames[-1]
        assert malformed.name == "malformed"
        assert malformed.fields["magic"] == 0x6E776F64
        assert "magic" in malformed.describe()
        assert malformed.data == b"down and out now"

    run(work, replies(b"down and out now"))


def test_an_observer_that_fails_fails_no_request() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        failures: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: failures.append(what["exception"]))
        assert await client.add_cpu(1) == 1
        await asyncio.sleep(0)
        assert [type(each) for each in failures] == [ZeroDivisionError] * 3

    def fail(frame: Frame, direction: Direction, seconds: float) -> None:
        raise ZeroDivisionError

    run(work, answers, observe=fail)


def test_the_record_of_frames_is_bounded() -> None:
    async def work(client: UpcallClient, manager: Manager) -> None:
        for _ in range(upcall.RECENT_FRAMES):
            await client.add_cpu(1)
        assert len(client.frames) == upcall.RECENT_FRAMES
        assert client.frames[-1].describe() == "ADD_CPU → 0, index=1"

    run(work, answers)


@given(st.lists(st.binary(max_size=40) | st.sampled_from([CONNECT, patched(0, b""), patched(4, b"\0")]), max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_a_guest_says_the_next_request_works(said: list[bytes]) -> None:
    async def babbles(peer: Peer) -> None:
        await peer.greet()
        await peer.request()
        with contextlib.suppress(ConnectionError):
            for part in said:
                await peer.send(part)
                await asyncio.sleep(0)

    async def work(client: UpcallClient, manager: Manager) -> None:
        try:
            assert await client.add_cpu(1) == 1
        except UpcallError:
            assert b"".join(said)[:FRAME_SIZE] != patched(0, b"")
        await asyncio.wait(manager.tasks[:1])
        assert await client.add_cpu(2) == 2
        assert await client.add_cpu(3) == 3

    run(work, babbles, answers)
