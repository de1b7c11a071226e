"""Standard streams and terminals of processes in a guest."""

from __future__ import annotations

import asyncio
import hashlib
import random
import signal

import pytest

from kata_lab.ttrpc import RpcError
from tests.kata_lab.agent.guest import AgentGuest, InGuest, StatusCode

MEBIBYTES = 8
DEVICES = [
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
]


async def _read_all(guest: AgentGuest, container: InGuest, exec_id: str, method: str = "ReadStdout") -> bytes:
    data = bytearray()
    while chunk := (await guest.agent.call(method, **container.ids(exec_id), len=1 << 17))["data"]:
        data += chunk
    return bytes(data)


def test_binary_data_goes_through_and_comes_back(guest: AgentGuest) -> None:
    data = random.Random(5).randbytes(300_000)
    with guest.container(["/bin/cat"]) as container:

        async def both() -> bytes:
            reading = asyncio.create_task(_read_all(guest, container, container.id))
            for start in range(0, len(data), 50_000):
                part = data[start : start + 50_000]
                answer = await guest.agent.call("WriteStdin", **container.ids(), data=part)
                assert answer["len"] == len(part)
            await guest.agent.call("CloseStdin", **container.ids())
            return await reading

        assert guest.run(both()) == data
        assert container.wait() == 0


def test_much_output_comes_whole_in_both_streams(guest: AgentGuest) -> None:
    script = f"dd if=/dev/zero bs=65536 count={MEBIBYTES * 16} 2>/dev/null | tr '\\0' x; echo done >&2"
    with guest.container(["/bin/sh", "-c", script], mounts=DEVICES) as container:

        async def both() -> tuple[bytes, bytes]:
            return await asyncio.gather(
                _read_all(guest, container, container.id), _read_all(guest, container, container.id, "ReadStderr")
            )

        output, errors = guest.run(both())
        assert hashlib.sha256(output).digest() == hashlib.sha256(b"x" * (MEBIBYTES << 20)).digest()
        assert errors == b"done\n"
        assert container.wait() == 0


def test_two_readers_of_one_stream_share_what_comes(guest: AgentGuest) -> None:
    with guest.container(["/bin/sh", "-c", "while read x; do echo $x; done"]) as container:

        async def both() -> bytes:
            readers = [asyncio.create_task(_read_all(guest, container, container.id)) for _ in range(3)]
            await asyncio.sleep(0.05)
            for number in range(20):
                await guest.agent.call("WriteStdin", **container.ids(), data=f"{number}\n".encode())
            await guest.agent.call("CloseStdin", **container.ids())
            return b"".join(await asyncio.gather(*readers))

        assert sorted(map(int, guest.run(both()).split())) == list(range(20))


def test_a_client_that_leaves_in_the_middle_of_calls_takes_nothing_with_it(guest: AgentGuest) -> None:
    with guest.container(["/bin/sh", "-c", "read x; echo got $x; exit 7"]) as container:
        descriptors = guest.metric("kata_agent_process_open_fds")

        async def leave() -> None:
            other = await guest.agent.connect(lambda: guest.hypervisor.dial(1024), 30, guest.hypervisor.ended)
            calls = [
                asyncio.create_task(other.call(method, **container.ids(), **more))
                for method, more in (("ReadStdout", {"len": 10}), ("WaitProcess", {}), ("ReadStderr", {"len": 10}))
            ]
            await asyncio.sleep(0.1)
            await other.close()
            await asyncio.gather(*calls, return_exceptions=True)

        for _ in range(3):
            guest.run(leave())
        container.write(b"it\n", close=True)
        assert container.finish() == (7, "got it\n")
        guest.run(asyncio.sleep(0.1))
        assert guest.metric("kata_agent_process_open_fds") <= descriptors


def test_a_deadline_ends_a_read_and_the_next_one_gets_the_data(guest: AgentGuest) -> None:
    with guest.container(["/bin/cat"]) as container:

        async def late() -> None:
            for _ in range(3):
                with pytest.raises(RpcError) as failed:
                    await guest.agent.call("ReadStdout", 0.05, **container.ids(), len=10)
                assert failed.value.code is StatusCode.DEADLINE_EXCEEDED

        async def next_one() -> bytes:
            await guest.agent.call("WriteStdin", **container.ids(), data=b"late")
            await guest.agent.call("CloseStdin", **container.ids())
            return await _read_all(guest, container, container.id)

        guest.run(late())
        # The guest's own deadline is over later than ours, but before a process that began after it has slept.
        container.exec("sleeper", ["/bin/sleep", "1"])
        assert container.wait("sleeper") == 0
        assert guest.run(next_one()) == b"late"


def test_input_that_nobody_reads_is_refused(guest: AgentGuest) -> None:
    with guest.container(["/bin/true"]) as container:
        assert container.wait() == 0
        error = guest.refused("WriteStdin", **container.ids(), data=b"x" * 10)
        assert (error.code, "reads no more" in str(error)) == (StatusCode.FAILED_PRECONDITION, True)
        container.write(b"", close=True)
        container.write(b"", close=True)
        error = guest.refused("WriteStdin", **container.ids(), data=b"x")
        assert (error.code, "is closed" in str(error)) == (StatusCode.FAILED_PRECONDITION, True)


def test_a_write_that_waits_for_room_ends_with_its_process(guest: AgentGuest) -> None:
    with guest.container(["/bin/sleep", "1000"]) as container:

        async def fill() -> StatusCode:
            writing = asyncio.create_task(guest.agent.call("WriteStdin", **container.ids(), data=bytes(200_000)))
            await asyncio.sleep(0.05)
            assert not writing.done()
            await guest.agent.call("SignalProcess", **container.ids(), signal=int(signal.SIGKILL))
            try:
                await writing
            except RpcError as error:
                return error.code
            return StatusCode.OK

        assert guest.run(fill()) is StatusCode.FAILED_PRECONDITION


def test_a_terminal_has_a_size_echo_and_an_end_of_file(guest: AgentGuest) -> None:
    script = "tty; stty size; read x; stty size; cat; echo end"
    with guest.container(
        ["/bin/sh", "-c", script], terminal=True, consoleSize={"height": 24, "width": 80}, mounts=DEVICES
    ) as container:
        assert container.read(until=b"24 80\r\n").startswith(b"/dev/")
        guest.call("TtyWinResize", **container.ids(), row=50, column=132)
        container.write(b"line\n")
        assert container.read(until=b"50 132\r\n") == b"line\r\n50 132\r\n"
        container.write(b"", close=True)
        assert container.read() == b"end\r\n"
        assert container.read(method="ReadStderr") == b""
        assert container.wait() == 0


def test_an_exec_on_a_terminal_is_interrupted_by_its_key(guest: AgentGuest) -> None:
    with guest.container(["/bin/sleep", "1000"], mounts=DEVICES) as container:
        container.exec("t", ["/bin/sh", "-c", "test -t 0 && echo ready; sleep 1000"], terminal=True)
        container.read("t", until=b"ready\r\n")
        container.write(b"\x03", "t")
        assert container.wait("t") == 128 + signal.SIGINT
        assert container.read("t") == b"^C"


def test_fifty_processes_at_once_keep_their_outputs_apart(guest: AgentGuest) -> None:
    with guest.container(["/bin/sleep", "1000"]) as container:

        async def one(number: int) -> tuple[int, bytes]:
            name = f"e{number}"
            process = {"Args": ["/bin/sh", "-c", f"cat; exit {number}"], "Env": ["PATH=/bin"], "Cwd": "/"}
            await guest.agent.call("ExecProcess", **container.ids(name), process=process)
            reading = asyncio.create_task(_read_all(guest, container, name))
            await guest.agent.call("WriteStdin", **container.ids(name), data=f"{number}\n".encode() * 100)
            await guest.agent.call("CloseStdin", **container.ids(name))
            status = (await guest.agent.call("WaitProcess", **container.ids(name)))["status"]
            return status, await reading

        async def all_of_them() -> list[tuple[int, bytes]]:
            return await asyncio.gather(*(one(number) for number in range(50)))

        descriptors = guest.metric("kata_agent_process_open_fds")
        assert guest.run(all_of_them()) == [(number, f"{number}\n".encode() * 100) for number in range(50)]
        for number in range(50):
            assert container.read(f"e{number}", "ReadStderr") == b""
        assert guest.metric("kata_agent_process_open_fds") == descriptors
        assert container.wait("e49") == 49
