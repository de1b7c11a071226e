"""Calls to the agent in the guest: Kata's agent API over ttrpc (``kata_lab/protocol/agent.proto``, ``health.proto``).

The last calls are kept with their times, for whoever wants to see them pass; of all of them, how long they took.
"""

from __future__ import annotations

import asyncio
import socket
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

from kata_lab.errors import KataLabError
from kata_lab.protocol.proto import load
from kata_lab.ttrpc import Client, RpcError, StatusCode

AGENT: Final = "grpc.AgentService"
HEALTH: Final = "grpc.Health"
INTERFACE: Final = load("agent.proto", "health.proto")

RPC_PORT: Final = 1024
LOG_PORT: Final = 1025
DEBUG_CONSOLE_PORT: Final = 1026

DIAL_INTERVAL: Final = 0.01  #: seconds between two attempts to reach the agent
REMEMBERED_CALLS: Final = 1000
REMEMBERED_BYTES: Final = 256  #: of data in a call that is remembered
BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  #: upper bounds of durations in milliseconds

Dial = Callable[[], Awaitable[socket.socket]]


class AgentError(KataLabError):
    """The agent cannot be reached."""


@dataclass(frozen=True, slots=True)
class AgentCall:
    """A call that was made.

    Attributes:
        method: its name.
        request: the message; of data in it only the beginning.
        began: host seconds (``time.monotonic``).
        seconds: until it was answered.
        status: how it ended; OK for an answer.
    """

    method: str
    request: dict[str, Any]
    began: float
    seconds: float
    status: StatusCode


@dataclass(slots=True)
class Durations:
    """How long all calls of one method took.

    Attributes:
        buckets: how many took at most as long as each of :data:`BUCKETS` and longer than the one before; then the rest.
        milliseconds: of all together.
    """

    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    milliseconds: float = 0.0

    def add(self, milliseconds: float) -> None:
        """Count one call."""
        self.buckets[bisect_left(BUCKETS, milliseconds)] += 1
        self.milliseconds += milliseconds

    @property
    def count(self) -> int:
        """How many calls there were."""
        return sum(self.buckets)


class AgentClient:
    """A connection to the agent. An asynchronous context manager.

    Args:
        client: connected to the agent's RPC port.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self.calls: deque[AgentCall] = deque(maxlen=REMEMBERED_CALLS)
        #: Called with every call that has ended.
        self.on_call: Callable[[AgentCall], object] | None = None
        #: By method.
        self.durations: dict[str, Durations] = {}
        #: Tells why the guest is gone, for calls that fail since the connection is lost.
        self.fate: Callable[[], Awaitable[str]] | None = None

    @classmethod
    async def connect(cls, dial: Dial, timeout: float, gone: Callable[[], str | None]) -> AgentClient:
        """Dial until the agent answers a health check.

        Args:
            dial: gives a connected socket, or raises while nobody listens.
            timeout: seconds after which to give up.
            gone: says why there will be no agent any more, or None while there may be one.

        Raises:
            AgentError: it did not answer in time, or never will.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                agent = cls(await Client.over(await dial(), INTERFACE))
                try:
                    await agent.check(max(deadline - time.monotonic(), DIAL_INTERVAL))
                    return agent
                except BaseException:
                    await agent.close()
                    raise
            except (OSError, KataLabError) as error:
                last = error
            if (why := gone()) is not None:
                raise AgentError(f"the guest is gone before its agent answered: {why}") from last
            if time.monotonic() > deadline:
                raise AgentError(f"the agent did not answer within {timeout:g} s: {last}") from last
            await asyncio.sleep(DIAL_INTERVAL)

    async def call(self, method: str, timeout: float | None = None, /, **request: Any) -> dict[str, Any]:
        """Call a method of the AgentService with the fields of its request.

        Raises:
            RpcError: it failed; UNAVAILABLE says why the guest is gone.
        """
        try:
            return await self._call(AGENT, method, request, timeout)
        except RpcError as error:
            if error.code is not StatusCode.UNAVAILABLE or self.lost is None or self.fate is None:
                raise
            raise RpcError(StatusCode.UNAVAILABLE, await self.fate()) from error

    async def check(self, timeout: float | None = None) -> None:
        """Ask the agent whether it serves. RpcError if it does not answer, or says no."""
        answer = await self._call(HEALTH, "Check", {}, timeout)
        if answer["status"] != INTERFACE.enums["grpc.HealthCheckResponse.ServingStatus"]["SERVING"]:
            raise RpcError(StatusCode.UNAVAILABLE, f"the agent says that its status is {answer['status']}")

    async def version(self) -> str:
        """The agent's version."""
        return str((await self._call(HEALTH, "Version", {}, None))["agent_version"])

    async def _call(self, service: str, method: str, request: dict[str, Any], timeout: float | None) -> dict[str, Any]:
        began = time.monotonic()
        status = StatusCode.CANCELLED
        try:
            answer = await self._client.call(service, method, request, timeout)
            status = StatusCode.OK
            return answer
        except RpcError as error:
            status = error.code
            raise
        finally:
            ended = AgentCall(method, _remembered(request), began, time.monotonic() - began, status)
            self.calls.append(ended)
            self.durations.setdefault(method, Durations()).add(ended.seconds * 1000)
            if self.on_call is not None:
                self.on_call(ended)

    @property
    def lost(self) -> RpcError | None:
        """Why the connection is of no more use; None while it is."""
        return self._client.lost

    async def wait_lost(self) -> RpcError:
        """Wait until the connection is of no more use, and say why."""
        return await self._client.wait_lost()

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    async def __aenter__(self) -> AgentClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _remembered(request: dict[str, Any]) -> dict[str, Any]:
    data = request.get("data")
    if not isinstance(data, (bytes, bytearray)) or len(data) <= REMEMBERED_BYTES:
        return request
    return {**request, "data": bytes(data[:REMEMBERED_BYTES])}
