"""The console: collecting, expecting, typing."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from vmm.console import Console, ConsoleClosed
from vmm.devices.uart16550 import Uart16550
from vmm.errors import ConsoleTimeout, StateError
from vmm.irq import IrqLine


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, name="guest")
    thread.start()
    return thread


def test_output_is_kept_as_bytes_and_as_text() -> None:
    console = Console()

    for byte in "größe\r\n".encode() + b"\xff!":
        console.feed(bytes([byte]))

    assert console.output == b"gr\xc3\xb6\xc3\x9fe\r\n\xff!"
    assert console.text == "größe\r\n\ufffd!"


def test_character_that_has_not_arrived_whole_is_not_shown_yet() -> None:
    console = Console()

    console.feed(b"a\xc3")
    assert console.text == "a"
    console.feed(b"\xb6")

    assert console.text == "aö"


def test_only_the_last_output_is_kept() -> None:
    console = Console(limit=1000)

    for number in range(10_000):
        console.feed(b"%05d\n" % number)

    assert len(console.output) == 1000
    assert console.output.endswith(b"09998\n09999\n")
    assert console.text == console.output.decode()
    assert console.expect("09999", timeout=0)


def test_last_lines_come_without_line_ends() -> None:
    console = Console()
    console.feed(b"one\r\ntwo\r\nthree\r\n$ ")

    assert console.lines(2) == ["three", "$ "]
    assert console.lines(10) == ["one", "two", "three", "$ "]
    assert console.lines(0) == []


def test_expect_finds_what_is_there_already() -> None:
    console = Console()
    console.feed(b"Debian login: ")

    match = console.expect("login:", timeout=0)

    assert match.string[: match.start()] == "Debian "


def test_expect_searches_after_the_last_match_only() -> None:
    console = Console()
    console.feed(b"# ls\nbin\n# ")

    console.expect("# ", timeout=0)
    match = console.expect("# ", timeout=0)

    assert match.string[: match.start()] == "ls\nbin\n"
    with pytest.raises(ConsoleTimeout):
        console.expect("# ", timeout=0)


def test_string_is_literal_and_pattern_is_a_regular_expression() -> None:
    console = Console()
    console.feed(b"took 12.5 s (of 60)")

    match = console.expect(re.compile(r"took ([\d.]+) s"), timeout=0)
    console.expect("(of 60)", timeout=0)

    assert match[1] == "12.5"


@pytest.mark.parametrize("pattern", ["login:", re.compile("log.n:")])
def test_expect_waits_for_output_that_comes_byte_by_byte(pattern: str | re.Pattern[str]) -> None:
    console = Console()

    def boot() -> None:
        for byte in b"x" * 500 + b"logout: login: ":
            console.feed(bytes([byte]))
            if byte != ord("x"):
                time.sleep(0.001)

    guest = in_background(boot)
    match = console.expect(pattern, timeout=10)
    guest.join()

    assert match[0] == "login:"


def test_timeout_names_the_pattern_and_shows_the_last_lines() -> None:
    console = Console()
    console.feed(b"Booting\r\nKernel panic - not syncing\r\n")

    with pytest.raises(ConsoleTimeout, match=r"did not show 'login:' within 0\.02 s.*Booting.*Kernel panic"):
        console.expect("login:", timeout=0.02)
    with pytest.raises(ConsoleTimeout, match=r"/log\.n:/"):
        console.expect(re.compile("log.n:"), timeout=0.02)


def test_expect_ends_at_once_when_the_machine_ends() -> None:
    console = Console()
    console.feed(b"Power down\n")
    ending = threading.Timer(0.05, console.close, ["the guest shut down"])
    ending.start()

    with pytest.raises(ConsoleClosed, match=r"no longer show 'login:', since the guest shut down.*Power down"):
        console.expect("login:", timeout=60)

    ending.join()


def test_output_that_came_before_the_end_can_still_be_expected() -> None:
    console = Console()
    console.feed(b"Power down\n")
    console.close("the guest shut down")

    assert console.expect("Power down")


def test_several_threads_may_expect_at_once() -> None:
    console = Console()
    found: list[str] = []

    def wait_for(wanted: str) -> None:
        found.append(console.expect(wanted, 10)[0])

    threads = [in_background(partial(wait_for, wanted)) for wanted in ("one;", "two;")]

    console.feed(b"one;")
    threads[0].join()
    console.feed(b"two;")
    threads[1].join()

    assert found == ["one;", "two;"]


def test_subscribers_hear_everything_until_they_leave() -> None:
    console = Console()
    heard: list[bytes] = []

    console.feed(b"before")
    console.subscribe(heard.append)
    console.feed(b"hello")
    console.unsubscribe(heard.append)
    console.unsubscribe(heard.append)
    console.feed(b"after")

    assert heard == [b"hello"]


def test_subscriber_may_use_the_console() -> None:
    console = Console()
    uart = Uart16550(console.feed, IrqLine(lambda level: None))
    console.attach(uart)

    def log_in(data: bytes) -> None:
        if console.text.endswith("login: "):
            console.write("root\n")

    console.subscribe(log_in)
    for byte in b"login: ":
        uart.write(0, 1, byte)

    assert bytes(uart.read(0, 1) for _ in range(5)) == b"root\n"


def test_writing_to_no_machine_is_refused() -> None:
    with pytest.raises(StateError, match="cannot type 3 bytes: no machine is connected"):
        Console().write("ls\n")


def test_writing_to_an_ended_machine_is_refused() -> None:
    console = Console()
    console.attach(Uart16550(console.feed, IrqLine(lambda level: None)))
    console.close("the guest shut down")

    with pytest.raises(ConsoleClosed, match="the guest shut down"):
        console.write("ls\n")


def test_writing_more_than_the_guest_reads_times_out() -> None:
    console = Console()
    console.attach(Uart16550(console.feed, IrqLine(lambda level: None), capacity=100))

    with pytest.raises(ConsoleTimeout, match=r"read nothing of its console for 0\.05 s and 50 bytes"):
        console.write(bytes(150), timeout=0.05)


def test_long_text_waits_for_the_guest_and_arrives_whole() -> None:
    console = Console()
    uart = Uart16550(console.feed, IrqLine(lambda level: None), capacity=512)
    console.attach(uart)
    text = bytes(range(256)) * 100
    arrived = bytearray()

    typist = in_background(lambda: console.write(text))
    while len(arrived) < len(text):
        if uart.read(5, 1) & 1:
            arrived.append(uart.read(0, 1))
    typist.join()

    assert arrived == text


def test_attaching_again_opens_a_closed_console() -> None:
    console = Console()
    console.close("the guest shut down")
    uart = Uart16550(console.feed, IrqLine(lambda level: None))

    console.attach(uart)
    console.write("x")

    assert uart.queued == 1
