"""What the runtime says of its sandboxes: the logger ``kata_lab``, with a sandbox's name in every record.

::

    log_as_json(sys.stderr)
    {"ts": "2026-03-01T12:00:00.123Z", "level": "info", "msg": "sandbox runs", "logger": "kata_lab.runtime", …}

Names of fields are those of Kata Containers' own logs (``level``, ``msg``, ``ts``, ``sandbox``, ``container``). What
the agent logs, a JSON object on each line of its log port, becomes records of ``kata_lab.agent``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from kata_lab.errors import KataLabError

LONGEST_LINE: Final = 1 << 16  #: bytes of a line of the agent's log

# A library says nothing unless somebody listens.
for _name in ("kata_lab.runtime", "kata_lab.agent"):
    logging.getLogger(_name).addHandler(logging.NullHandler())

_PLAIN: Final = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}


class SandboxLogger(logging.LoggerAdapter[logging.Logger]):
    """Puts the sandbox's name into every record, beside what ``extra`` says.

    Attributes:
        listeners: each is called with every message, whether a handler wants it or not, on the thread that logs.
    """

    def __init__(self, logger: logging.Logger, extra: Mapping[str, object] | None = None) -> None:
        super().__init__(logger, extra)
        self.listeners: list[Callable[[str], object]] = []

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """As :class:`logging.LoggerAdapter`."""
        for listener in tuple(self.listeners):
            listener(str(msg))
        super().log(level, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """As :class:`logging.LoggerAdapter`."""
        return msg, {**kwargs, "extra": {**(self.extra or {}), **(kwargs.get("extra") or {})}}


def logger_of(sandbox_id: str) -> SandboxLogger:
    """The logger of one sandbox."""
    return SandboxLogger(logging.getLogger("kata_lab.runtime"), {"sandbox": sandbox_id})


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, with everything that its ``extra`` says."""

    def format(self, record: logging.LogRecord) -> str:
        """As :meth:`logging.Formatter.format`."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "ts": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "msg": record.getMessage(),
            "logger": record.name,
        }
        line |= {name: value for name, value in vars(record).items() if name not in _PLAIN and name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@contextlib.contextmanager
def log_as_json(stream: TextIO, level: int = logging.INFO) -> Iterator[None]:
    """Write what ``kata_lab`` logs to a stream, one JSON object on each line, within the ``with`` block."""
    logger = logging.getLogger("kata_lab")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


async def follow_agent_log(dial: Callable[[], Awaitable[socket.socket]], log: SandboxLogger) -> None:
    """Hand on what the agent logs, until the connection ends.

    Args:
        dial: connects to its log port.
        log: of its sandbox.
    """
    try:
        reader, writer = await asyncio.open_connection(sock=await dial(), limit=LONGEST_LINE)
    except (OSError, KataLabError):
        # An agent without a log port.
        return
    agent_log = SandboxLogger(logging.getLogger("kata_lab.agent"), log.extra)
    try:
        # A line that is too long is no log of an agent's.
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                _hand_on(line, agent_log)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _hand_on(line: bytes, log: SandboxLogger) -> None:
    try:
        told = json.loads(line)
        message, level = str(told["msg"]), str(told.get("level", "info")).upper()
    except (ValueError, TypeError, KeyError, AttributeError):
        message, level = line.decode(errors="replace").strip(), "INFO"
    number = logging.getLevelNamesMapping().get(level, logging.INFO)
    # Words of a guest are data, not a format.
    log.log(number, "%s", message)
