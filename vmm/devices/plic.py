"""The platform-level interrupt controller: it picks which device interrupt each hart sees.

Follows the RISC-V Platform-Level Interrupt Controller Specification 1.0.0. A context is one hart at one privilege; who
builds the board decides which context is which and connects each to an output. Register map (all registers 32 bits)::

    0x000000 + 4 * source             priority of the source, 0 (never) .. 7
    0x001000 + 4 * (source / 32)      pending bits, read-only
    0x002000 + 0x80 * context         enable bits, 32 sources to a word
    0x200000 + 0x1000 * context       priority threshold
    0x200004 + 0x1000 * context       claim (read) and complete (write)

Inputs are level-triggered: a gateway forwards one request when its wire is high and then stays shut until the source is
completed (section 1.2). A request that was forwarded stays pending when the wire falls before the claim, as the section
says. In-range words that hold no register read 0 and ignore writes. As on SiFive's parts and QEMU's model, only aligned
32-bit accesses are served; others raise BusError. Left out: edge-triggered gateways.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from vmm.errors import BusError, ConfigError

PLIC_SIZE: Final = 0x60_0000
MAX_SOURCES: Final = 127
MAX_CONTEXTS: Final = 1024
MAX_PRIORITY: Final = 7

_PENDING: Final = 0x1000
_ENABLE: Final = 0x2000
_ENABLE_STRIDE: Final = 0x80
_CONTEXT: Final = 0x20_0000
_CONTEXT_STRIDE: Final = 0x1000
_WORD: Final = 0xFFFF_FFFF


class Plic:
    """An interrupt controller with inputs 1..``sources`` and one output per context.

    Args:
        sources: number of inputs, 1..127.
        outputs: one callable per context, called with the new level of that context's external interrupt. It is called
            with the controller locked and must not call back into it.

    Raises:
        ConfigError: a number of sources or contexts that the register map does not hold.
    """

    def __init__(self, sources: int, outputs: Sequence[Callable[[bool], None]]) -> None:
        if not 1 <= sources <= MAX_SOURCES:
            raise ConfigError(f"a PLIC with {sources} interrupt sources must have 1 to {MAX_SOURCES}")
        if not 1 <= len(outputs) <= MAX_CONTEXTS:
            raise ConfigError(f"a PLIC with {len(outputs)} contexts must have 1 to {MAX_CONTEXTS}")
        self.sources = sources
        self.contexts = len(outputs)
        self._outputs = tuple(outputs)
        self._lock = threading.Lock()
        # One bit per source in each of these; bit 0 is never set, since source 0 means "no interrupt".
        self._valid = (1 << (sources + 1)) - 2
        self._wires = 0
        self._pending = 0
        self._in_service = 0
        self._priority = [0] * (sources + 1)
        self._enabled = [0] * self.contexts
        self._threshold = [0] * self.contexts
        # Enabled sources whose priority is above the context's threshold: those that raise its output.
        self._eligible = [0] * self.contexts
        self._raised = [False] * self.contexts

    def set_input(self, source: int, level: bool) -> None:
        """Set the wire of ``source``, from any thread.

        Raises:
            ConfigError: there is no such input.
        """
        if not 1 <= source <= self.sources:
            raise ConfigError(f"interrupt source {source} does not exist; this PLIC has 1 to {self.sources}")
        bit = 1 << source
        with self._lock:
            if not level:
                self._wires &= ~bit
                return
            self._wires |= bit
            if not (self._pending | self._in_service) & bit:
                self._pending |= bit
                self._drive_outputs()

    def read(self, offset: int, width: int) -> int:
        """Read a register; reading the claim register claims.

        Raises:
            BusError: the access is not an aligned 32-bit one.
        """
        self._require_word("read", offset, width)
        with self._lock:
            if offset >= _CONTEXT:
                context, register = divmod(offset - _CONTEXT, _CONTEXT_STRIDE)
                if context >= self.contexts:
                    return 0
                if register == 4:
                    return self._claim(context)
                return self._threshold[context] if register == 0 else 0
            if offset >= _ENABLE:
                context, position = divmod(offset - _ENABLE, _ENABLE_STRIDE)
                return self._enabled[context] >> 8 * position & _WORD if context < self.contexts else 0
            if offset >= _PENDING:
                return self._pending >> 8 * (offset - _PENDING) & _WORD
            source = offset // 4
            return self._priority[source] if source <= self.sources else 0

    def write(self, offset: int, width: int, value: int) -> None:
        """Write a register; writing the claim register completes.

        Raises:
            BusError: the access is not an aligned 32-bit one.
        """
        self._require_word("write", offset, width)
        with self._lock:
            if offset >= _CONTEXT:
                context, register = divmod(offset - _CONTEXT, _CONTEXT_STRIDE)
                if context >= self.contexts:
                    return
                if register == 4:
                    self._complete(context, value & _WORD)
                elif register == 0:
                    self._threshold[context] = value & MAX_PRIORITY
                    self._choose_eligible(context)
            elif offset >= _ENABLE:
                context, position = divmod(offset - _ENABLE, _ENABLE_STRIDE)
                if context >= self.contexts:
                    return
                kept = self._enabled[context] & ~(_WORD << 8 * position)
                self._enabled[context] = (kept | (value & _WORD) << 8 * position) & self._valid
                self._choose_eligible(context)
            elif 4 <= offset <= 4 * self.sources:
                self._priority[offset // 4] = value & MAX_PRIORITY
                for context in range(self.contexts):
                    self._choose_eligible(context)
            self._drive_outputs()

    def _require_word(self, kind: str, offset: int, width: int) -> None:
        if width != 4 or offset & 3:
            raise BusError(
                f"the PLIC refuses a {kind} of {width} bytes at its offset {offset:#x};"
                " it serves aligned words of 4 bytes"
            )

    def _claim(self, context: int) -> int:
        """Take the pending source of the highest priority, the lowest number among equals; 0 when there is none."""
        # Chapter 8: the threshold does not affect a claim. Priority 0 means "never interrupt".
        candidates = self._pending & self._enabled[context]
        best = 0
        while candidates:
            source = (candidates & -candidates).bit_length() - 1
            candidates &= candidates - 1
            if self._priority[source] > self._priority[best]:
                best = source
        if best:
            self._pending &= ~(1 << best)
            self._in_service |= 1 << best
            self._drive_outputs()
        return best

    def _complete(self, context: int, source: int) -> None:
        """Open the source's gateway again; a wire that is still high asks anew."""
        # Chapter 9: an identifier that is not enabled for the target is silently ignored.
        if source > self.sources:
            return
        bit = (1 << source) & self._enabled[context] & self._in_service
        self._in_service &= ~bit
        self._pending |= bit & self._wires

    def _choose_eligible(self, context: int) -> None:
        threshold = self._threshold[context]
        eligible = 0
        remaining = self._enabled[context]
        while remaining:
            lowest = remaining & -remaining
            remaining ^= lowest
            if self._priority[lowest.bit_length() - 1] > threshold:
                eligible |= lowest
        self._eligible[context] = eligible

    def _drive_outputs(self) -> None:
        for context, eligible in enumerate(self._eligible):
            level = self._pending & eligible != 0
            if level != self._raised[context]:
                self._raised[context] = level
                self._outputs[context](level)
