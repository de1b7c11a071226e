"""The serial port: a National Semiconductor NS16550A, register for register.

Follows the PC16550D data sheet (National Semiconductor, 1995), section 8. Registers, one byte each, at offset::

          read                            write
    0     RBR received byte               THR byte to send             (DLAB = 1: DLL divisor, low)
    1     IER interrupt enable            IER                          (DLAB = 1: DLM divisor, high)
    2     IIR which interrupt             FCR FIFO control
    3     LCR line control, bit 7 = DLAB  LCR
    4     MCR modem control               MCR
    5     LSR line status                 -
    6     MSR modem status                -
    7     SCR scratch                     SCR

Time does not pass on this line, and that decides a few things:

- A byte is sent when it is written, so THR is always empty. The THRE interrupt becomes pending when a byte is written
  or when its enable bit goes from 0 to 1, and reading IIR while it is reported acknowledges it (table IV).
  So a driver may write as many bytes for one interrupt as it likes: the device tree tells it :data:`SEND_AT_ONCE`
  instead of the 16 of the data sheet, which spares a guest that prints much an interrupt and three reads for each 16.
- The receive FIFO is the front of the host's queue: 16 bytes, or 1 with FIFOs off. Bytes below the trigger level are
  reported as a character timeout at once, since on a line of infinite speed nothing else would have come.
- The host honours hardware flow control, as a terminal with RTS wired would: bytes stay in its queue while MCR has RTS
  off, and a FIFO reset gives unread bytes back to the queue. So a driver that resets the port when it opens it loses
  nothing that was typed before. A guest that has never written MCR is taken to be ready.

An access wider than a byte reads the register at its offset, zero-extended, or writes its low byte, as QEMU's model
does; offsets above 7 read 0. Left out: baud rate, word length, parity, breaks, framing errors, and the DMA signals.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from vmm.irq import IrqLine

UART_SIZE: Final = 0x100
SEND_AT_ONCE: Final = 256  #: bytes that a driver writes after it found THR empty; any number is right here

_LSR: Final = 5

_IER_RECEIVED: Final = 0x01
_IER_THRE: Final = 0x02
_IER_LINE_STATUS: Final = 0x04
_IER_MODEM_STATUS: Final = 0x08

# IIR bits 3..0, table IV of the data sheet, highest priority first.
_IIR_LINE_STATUS: Final = 0x06
_IIR_RECEIVED: Final = 0x04
_IIR_TIMEOUT: Final = 0x0C
_IIR_THRE: Final = 0x02
_IIR_MODEM_STATUS: Final = 0x00
_IIR_NONE: Final = 0x01
_IIR_FIFOS_ON: Final = 0xC0

_FCR_ENABLE: Final = 0x01
_FCR_RESET_RECEIVER: Final = 0x02
_TRIGGER_LEVELS: Final = (1, 4, 8, 14)

_LCR_DLAB: Final = 0x80

_MCR_DTR: Final = 0x01
_MCR_RTS: Final = 0x02
_MCR_OUT1: Final = 0x04
_MCR_OUT2: Final = 0x08
_MCR_LOOP: Final = 0x10

_LSR_DATA_READY: Final = 0x01
_LSR_OVERRUN: Final = 0x02
_LSR_TRANSMITTER_IDLE: Final = 0x60  # THRE and TEMT

_MSR_CTS: Final = 0x10
_MSR_DSR: Final = 0x20
_MSR_RI: Final = 0x40
_MSR_DCD: Final = 0x80
_TERMINAL_SIGNALS: Final = _MSR_CTS | _MSR_DSR | _MSR_DCD

_FIFO_DEPTH: Final = 16
_ONE_BYTE: Final = tuple(bytes([value]) for value in range(256))


class Uart16550:
    """A 16550A between a guest and the host's end of the line.

    Args:
        output: called with what the guest sends, on the thread of the vCPU that sent it, with no lock held.
        interrupt: the port's interrupt line.
        capacity: bytes that may wait for the guest in the host's queue.
    """

    def __init__(self, output: Callable[[bytes], None], interrupt: IrqLine, capacity: int = 64 * 1024) -> None:
        self._output = output
        self._interrupt = interrupt
        self._capacity = capacity
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._waiting_for_room = 0
        self._queue = bytearray()
        self._loop = bytearray()
        self._ready = True
        self._ier = self._lcr = self._mcr = self._scratch = 0
        self._divisor = 0
        self._fifos_on = False
        self._depth = self._trigger = 1
        self._overrun = 0
        self._thre_pending = False
        self._modem_delta = 0

    def receive(self, data: bytes) -> int:
        """Queue bytes for the guest, from any thread, without waiting; returns how many of them were taken."""
        with self._lock:
            taken = data[: max(self._capacity - len(self._queue), 0)]
            self._queue += taken
            self._drive_interrupt()
        return len(taken)

    def wait_for_room(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until half of the queue is free, and return whether it is."""
        with self._room:
            self._waiting_for_room += 1
            try:
                return self._room.wait_for(lambda: len(self._queue) <= self._capacity // 2, timeout)
            finally:
                self._waiting_for_room -= 1

    @property
    def queued(self) -> int:
        """Bytes from the host that the guest has not read yet."""
        return len(self._queue)

    def read(self, offset: int, width: int) -> int:
        """Read a register, with the side effects the data sheet gives it."""
        if offset == _LSR and not self._overrun:
            # A polling driver comes here once per byte; without side effects there is nothing to lock.
            return _LSR_TRANSMITTER_IDLE | _LSR_DATA_READY if self._available() else _LSR_TRANSMITTER_IDLE
        with self._lock:
            match offset:
                case 0:
                    if self._lcr & _LCR_DLAB:
                        return self._divisor & 0xFF
                    return self._take_byte()
                case 2:
                    identification = self._identify()
                    if identification == _IIR_THRE:
                        self._thre_pending = False
                        self._drive_interrupt()
                    return identification | (_IIR_FIFOS_ON if self._fifos_on else 0)
                case 1:
                    return self._divisor >> 8 if self._lcr & _LCR_DLAB else self._ier
                case 3:
                    return self._lcr
                case 4:
                    return self._mcr
                case 5:
                    status = _LSR_TRANSMITTER_IDLE | self._overrun | (_LSR_DATA_READY if self._available() else 0)
                    self._overrun = 0
                    self._drive_interrupt()
                    return status
                case 6:
                    status = self._signals() | self._modem_delta
                    self._modem_delta = 0
                    self._drive_interrupt()
                    return status
                case 7:
                    return self._scratch
                case _:
                    return 0

    def write(self, offset: int, width: int, value: int) -> None:
        """Write a register; a byte written to THR is sent at once."""
        value &= 0xFF
        with self._lock:
            sent = False
            if offset or self._lcr & _LCR_DLAB:
                self._write_control(offset, value)
            else:
                self._thre_pending = True
                if self._mcr & _MCR_LOOP:
                    self._send_to_self(value)
                else:
                    sent = True
                if self._ier:
                    self._drive_interrupt()
        # Outside the lock: who listens may type an answer right away.
        if sent:
            self._output(_ONE_BYTE[value])

    def _write_control(self, offset: int, value: int) -> None:
        match offset:
            case 0:
                self._divisor = self._divisor & 0xFF00 | value
            case 1 if self._lcr & _LCR_DLAB:
                self._divisor = self._divisor & 0x00FF | value << 8
            case 1:
                if value & ~self._ier & _IER_THRE:
                    self._thre_pending = True
                self._ier = value & 0x0F
                self._drive_interrupt()
            case 2:
                self._control_fifos(value)
                self._drive_interrupt()
            case 3:
                self._lcr = value
            case 4:
                self._control_modem(value & 0x1F)
                self._drive_interrupt()
            case 7:
                self._scratch = value

    def _available(self) -> int:
        """Bytes in the receive FIFO."""
        if self._mcr & _MCR_LOOP:
            return len(self._loop)
        return min(len(self._queue), self._depth) if self._ready else 0

    def _take_byte(self) -> int:
        if not self._available():
            return 0
        source = self._loop if self._mcr & _MCR_LOOP else self._queue
        value = source[0]
        del source[:1]
        if self._waiting_for_room and len(self._queue) <= self._capacity // 2:
            self._room.notify_all()
        self._drive_interrupt()
        return value

    def _identify(self) -> int:
        """IIR bits 3..0: the enabled interrupt of the highest priority."""
        enabled = self._ier
        if enabled & _IER_LINE_STATUS and self._overrun:
            return _IIR_LINE_STATUS
        if enabled & _IER_RECEIVED and (available := self._available()):
            return _IIR_RECEIVED if available >= self._trigger else _IIR_TIMEOUT
        if enabled & _IER_THRE and self._thre_pending:
            return _IIR_THRE
        if enabled & _IER_MODEM_STATUS and self._modem_delta:
            return _IIR_MODEM_STATUS
        return _IIR_NONE

    def _drive_interrupt(self) -> None:
        self._interrupt.set(self._identify() != _IIR_NONE)

    def _control_fifos(self, value: int) -> None:
        # 8.4: turning the FIFOs on or off empties them; the other bits count only while bit 0 is written as 1.
        fifos_on = bool(value & _FCR_ENABLE)
        if fifos_on != self._fifos_on or (fifos_on and value & _FCR_RESET_RECEIVER):
            self._loop.clear()
        self._fifos_on = fifos_on
        self._depth = _FIFO_DEPTH if fifos_on else 1
        self._trigger = _TRIGGER_LEVELS[value >> 6] if fifos_on else 1

    def _control_modem(self, value: int) -> None:
        before = self._signals()
        if not value & _MCR_LOOP:
            self._loop.clear()
            self._ready = bool(value & _MCR_RTS)
        self._mcr = value
        after = self._signals()
        changed = before ^ after
        # 8.8: bits 0, 1 and 3 tell of any change, bit 2 only of the end of a ring.
        self._modem_delta |= (changed & (_MSR_CTS | _MSR_DSR | _MSR_DCD)) >> 4 | (before & ~after & _MSR_RI) >> 4

    def _signals(self) -> int:
        """MSR bits 7..4: the terminal is always there; in loopback the outputs come back as inputs (8.7)."""
        mcr = self._mcr
        if not mcr & _MCR_LOOP:
            return _TERMINAL_SIGNALS
        return (
            (_MSR_CTS if mcr & _MCR_RTS else 0)
            | (_MSR_DSR if mcr & _MCR_DTR else 0)
            | (_MSR_RI if mcr & _MCR_OUT1 else 0)
            | (_MSR_DCD if mcr & _MCR_OUT2 else 0)
        )

    def _send_to_self(self, value: int) -> None:
        if len(self._loop) < self._depth:
            self._loop.append(value)
            return
        self._overrun = _LSR_OVERRUN
        # With FIFOs off the new byte replaces the unread one, with FIFOs on it is lost (8.3, overrun).
        if not self._fifos_on:
            self._loop[0] = value
