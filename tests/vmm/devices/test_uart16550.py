"""The 16550A, driven through its registers as Linux's 8250 driver drives it."""

from __future__ import annotations

import threading

import pytest

from vmm.devices.uart16550 import Uart16550
from vmm.irq import IrqLine

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

IER_RECEIVED, IER_THRE, IER_LINE_STATUS, IER_MODEM_STATUS = 1, 2, 4, 8
IIR_NONE, IIR_THRE, IIR_RECEIVED, IIR_LINE_STATUS, IIR_TIMEOUT, IIR_MODEM_STATUS = 0x01, 0x02, 0x04, 0x06, 0x0C, 0x00
FIFOS_ON = 0xC0
DTR, RTS, OUT1, OUT2, LOOP = 1, 2, 4, 8, 16


class Port:
    """A UART with what it sent and the state of its interrupt line."""

    def __init__(self, capacity: int = 64 * 1024) -> None:
        self.sent = bytearray()
        self.line = IrqLine(lambda level: None)
        self.uart = Uart16550(self.sent.extend, self.line, capacity)

    def read(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    def read_all(self) -> bytes:
        got = bytearray()
        while self.read(LSR) & 1:
            got.append(self.read(RBR))
        return bytes(got)


def test_written_bytes_are_sent_at_once() -> None:
    port = Port()

    for byte in b"hello\r\n":
        port.write(THR, byte)

    assert port.sent == b"hello\r\n"
    assert port.read(LSR) == 0x60


def test_received_bytes_are_read_in_order() -> None:
    port = Port()
    port.write(FCR, 0x01)

    assert port.uart.receive(b"abc") == 3

    assert port.read(LSR) == 0x61
    assert port.read_all() == b"abc"
    assert port.read(LSR) == 0x60
    assert port.read(RBR) == 0


def test_divisor_latch_hides_the_data_registers() -> None:
    port = Port()
    port.write(IER, IER_LINE_STATUS)
    port.uart.receive(b"x")

    port.write(LCR, 0x83)
    port.write(DLL, 0x0D)
    port.write(DLM, 0x01)
    assert (port.read(DLL), port.read(DLM)) == (0x0D, 0x01)
    port.write(LCR, 0x03)

    assert port.sent == b""
    assert port.read(IER) == IER_LINE_STATUS
    assert port.read(RBR) == ord("x")


def test_probe_of_interrupt_enables_and_scratch_finds_a_16550a() -> None:
    port = Port()

    port.write(IER, 0xFF)
    assert port.read(IER) == 0x0F
    port.write(IER, 0)
    port.write(SCR, 0xA5)
    assert port.read(SCR) == 0xA5
    assert port.read(IIR) == IIR_NONE
    port.write(FCR, 0x01)
    assert port.read(IIR) == FIFOS_ON | IIR_NONE
    port.write(FCR, 0x00)
    assert port.read(IIR) == IIR_NONE


def test_transmitter_interrupt_comes_with_its_enable_bit_and_goes_with_the_reading_of_iir() -> None:
    port = Port()

    port.write(IER, IER_THRE)
    assert port.line.level
    assert port.read(IIR) == IIR_THRE
    assert not port.line.level
    assert port.read(IIR) == IIR_NONE

    port.write(THR, ord("x"))
    assert port.line.level
    assert port.read(IIR) == IIR_THRE


def test_enabling_the_transmitter_interrupt_anew_raises_it_anew() -> None:
    # Linux tries this at start-up and falls back to polling with a timer if it fails (UART_BUG_THRE, UART_BUG_TXEN).
    port = Port()
    for _ in range(2):
        port.write(IER, IER_THRE)
        assert port.read(IIR) == IIR_THRE
        port.write(IER, 0)
        assert port.read(IIR) == IIR_NONE


def test_writing_the_same_enables_again_does_not_raise_the_transmitter_interrupt() -> None:
    port = Port()
    port.write(IER, IER_THRE)
    port.read(IIR)

    port.write(IER, IER_THRE | IER_RECEIVED)

    assert not port.line.level


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_received_data_below_the_trigger_level_is_a_timeout(fcr: int, trigger: int) -> None:
    port = Port()
    port.write(FCR, fcr)
    port.write(IER, IER_RECEIVED)
    assert not port.line.level

    port.uart.receive(b"z" * (trigger - 1))
    if trigger > 1:
        assert port.read(IIR) == FIFOS_ON | IIR_TIMEOUT
    port.uart.receive(b"z")

    assert port.line.level
    assert port.read(IIR) == FIFOS_ON | IIR_RECEIVED
    port.read_all()
    assert not port.line.level
    assert port.read(IIR) == FIFOS_ON | IIR_NONE


def test_interrupts_are_identified_by_priority() -> None:
    port = Port()
    port.write(MCR, LOOP)
    port.write(IER, 0x0F)
    port.write(MCR, LOOP | RTS)
    port.write(THR, 1)
    port.write(THR, 2)

    seen = [port.read(IIR)]
    port.read(LSR)
    seen.append(port.read(IIR))
    port.read(RBR)
    seen.append(port.read(IIR))
    seen.append(port.read(IIR))
    port.read(MSR)
    seen.append(port.read(IIR))

    assert seen == [IIR_LINE_STATUS, IIR_RECEIVED, IIR_THRE, IIR_MODEM_STATUS, IIR_NONE]
    assert not port.line.level


def test_loopback_feeds_the_receiver_and_not_the_line() -> None:
    port = Port()
    port.uart.receive(b"host")
    port.write(FCR, 0x01)
    port.write(MCR, LOOP | RTS)

    for byte in b"self":
        port.write(THR, byte)

    assert port.read_all() == b"self"
    assert port.sent == b""
    port.write(MCR, RTS)
    assert port.read_all() == b"host"


def test_loopback_returns_the_modem_outputs_as_inputs() -> None:
    port = Port()
    assert port.read(MSR) == 0xB0

    port.write(MCR, LOOP | RTS | OUT2)
    assert port.read(MSR) & 0xF0 == 0x90
    port.write(MCR, LOOP | DTR | OUT1)

    assert port.read(MSR) & 0xF0 == 0x60
    port.write(MCR, LOOP)
    assert port.read(MSR) == 0x06
    assert port.read(MSR) == 0x00


def test_loopback_overrun_is_reported_once() -> None:
    port = Port()
    port.write(FCR, 0x01)
    port.write(MCR, LOOP)

    for byte in range(17):
        port.write(THR, byte)

    assert port.read(LSR) == 0x63
    assert port.read(LSR) == 0x61
    assert port.read_all() == bytes(range(16))


def test_reset_of_the_fifo_loses_nothing_the_host_typed() -> None:
    port = Port()
    port.write(FCR, 0x01)
    port.uart.receive(b"typed early")
    port.write(MCR, DTR)

    # What Linux does when it opens a port (8250_port.c): clear the FIFOs, read every status register and RBR.
    for value in (0x01, 0x07, 0x00):
        port.write(FCR, value)
    for register in (LSR, RBR, IIR, MSR):
        port.read(register)
    port.write(FCR, 0x81)
    port.write(IER, IER_RECEIVED)
    assert not port.line.level
    port.write(MCR, DTR | RTS)

    assert port.line.level
    assert port.read_all() == b"typed early"


def test_megabyte_typed_at_once_arrives_whole() -> None:
    port = Port()
    port.write(FCR, 0x81)
    text = bytes(range(256)) * 4096
    arrived = bytearray()

    def type_all() -> None:
        rest = memoryview(text)
        while rest:
            rest = rest[port.uart.receive(bytes(rest)) :]
            if rest:
                port.uart.wait_for_room(10)

    typist = threading.Thread(target=type_all, name="typist")
    typist.start()
    while len(arrived) < len(text):
        if port.read(LSR) & 1:
            arrived.append(port.read(RBR))
    typist.join()

    assert arrived == text
    assert port.read(LSR) == 0x60


def test_queue_takes_no_more_than_its_capacity() -> None:
    port = Port(capacity=100)

    assert port.uart.receive(bytes(70)) == 70
    assert port.uart.receive(bytes(70)) == 30
    assert port.uart.receive(b"x") == 0

    assert port.uart.queued == 100
    assert not port.uart.wait_for_room(0)
    for _ in range(50):
        port.read(RBR)
    assert port.uart.wait_for_room(0)


def test_receiver_may_answer_what_it_hears() -> None:
    line = IrqLine(lambda level: None)
    uart = Uart16550(lambda data: answer(data), line)

    def answer(data: bytes) -> None:
        uart.receive(data.upper())

    uart.write(THR, 1, ord("q"))

    assert uart.read(RBR, 1) == ord("Q")


@pytest.mark.parametrize("width", [2, 4, 8])
def test_wide_access_reaches_one_register(width: int) -> None:
    port = Port()

    port.uart.write(SCR, width, 0x1234_5678)
    port.uart.write(THR, width, 0x41_42_43_44)

    assert port.uart.read(SCR, width) == 0x78
    assert port.sent == b"D"


def test_offsets_beyond_the_registers_read_zero() -> None:
    port = Port()

    port.write(8, 0xFF)
    port.write(LSR, 0xFF)
    port.write(MSR, 0xFF)

    assert [port.read(offset) for offset in (8, 0x7F, 0xFF)] == [0, 0, 0]
    assert (port.read(LSR), port.read(MSR)) == (0x60, 0xB0)
